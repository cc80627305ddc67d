"""GR00T N1.5 in lerobot's own classes: tiny or at full size, from a folder or the hub, with one embodiment and one
length of text.

Sizes of the published model are those of its config.json (huggingface.co/nvidia/GR00T-N1.5-3B) and of the Eagle 2.5
that it was made of (Qwen3 1.7B, SigLIP2 so400m).
"""

import contextlib
import copy
import functools
import importlib.util
import io
import json
import os
import sys
import sysconfig
import types
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common.cli import check, fail
from common.files import write_json

INSTALL = "pip install -r requirements.txt && pip install --no-deps -r requirements-no-deps.txt"
NEEDS = ("lerobot", "transformers", "diffusers", "peft", "tree", "einops", "huggingface_hub")
# The slots of the published model that lerobot names.
EMBODIMENTS = {"so100": 2, "unitree_g1": 3, "oxe_droid": 17, "gr1": 24, "agibot_genie1": 26, "new_embodiment": 31}
EAGLE_ASSETS = "lerobot/eagle2hg-processor-groot-n1p5"  # config and tokenizer of the backbone
IMAGE_TOKEN, PAD_TOKEN, FIRST_WORD = 5, 0, 6  # of the tiny model
TEXT_LENGTH = 10  # words of the tiny model's instructions

FULL = {
    "backbone_cfg": {"tune_llm": False, "tune_visual": False, "select_layer": 12, "project_to_dim": None},
    "action_head_cfg": {
        "add_pos_embed": True,
        "model_dtype": "float32",
        "diffusion_model_cfg": {
            "num_attention_heads": 32,
            "attention_head_dim": 48,
            "output_dim": 1024,
            "num_layers": 16,
            "dropout": 0.2,
            "norm_type": "ada_norm",
            "interleave_self_attention": True,
            "final_dropout": True,
            "positional_embeddings": None,
            "cross_attention_dim": 2048,
        },
        "vl_self_attention_cfg": {
            "num_attention_heads": 32,
            "attention_head_dim": 64,
            "num_layers": 4,
            "dropout": 0.2,
            "final_dropout": True,
            "positional_embeddings": None,
        },
        "input_embedding_dim": 1536,
        "backbone_embedding_dim": 2048,
        "hidden_size": 1024,
        "max_seq_len": 1024,
        "action_dim": 32,
        "action_horizon": 16,
        "max_state_dim": 64,
        "max_action_dim": 32,
        "noise_beta_alpha": 1.5,
        "noise_beta_beta": 1.0,
        "noise_s": 0.999,
        "num_timestep_buckets": 1000,
        "num_inference_timesteps": 4,
        "max_num_embodiments": 32,
        "num_target_vision_tokens": 32,
        "use_vlln": True,
        "tune_projector": True,
        "tune_diffusion_model": True,
    },
    "action_horizon": 16,
    "action_dim": 32,
    "compute_dtype": "float32",
}
FULL_EAGLE = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "text_config": {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151680,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "select_layer": -1,
    "force_image_size": 224,
    "image_token_index": 151669,
    "use_pixel_shuffle": False,
    "mlp_connector_layers": 1,
}


def tiny(width: int = 64, layers: int = 2) -> tuple[dict, dict]:
    """Configurations of the model and its Eagle, of the real classes at a size that a CPU trains."""
    model, eagle = copy.deepcopy(FULL), copy.deepcopy(FULL_EAGLE)
    attention = {"num_attention_heads": 4, "attention_head_dim": width // 4, "dropout": 0.0}
    head = model["action_head_cfg"]
    head["diffusion_model_cfg"] |= attention | {
        "num_layers": layers,
        "output_dim": width,
        "cross_attention_dim": width,
    }
    head["vl_self_attention_cfg"] |= attention | {"num_layers": 1}
    head |= {"input_embedding_dim": width, "backbone_embedding_dim": width, "hidden_size": width, "max_seq_len": 64}
    head |= {"num_target_vision_tokens": 4}
    model["backbone_cfg"] |= {"select_layer": layers}
    transformer = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    eagle["vision_config"] |= transformer | {"num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    eagle["text_config"] |= transformer | {"num_attention_heads": 4, "num_key_value_heads": 2}
    eagle["text_config"] |= {"head_dim": width // 4, "vocab_size": 64, "max_position_embeddings": 128}
    eagle |= {"force_image_size": 56, "image_token_index": IMAGE_TOKEN}
    return model, eagle


def missing() -> str:
    """The first of GR00T's packages that is not installed, or ""."""
    absent = (name for name in NEEDS if name not in sys.modules and importlib.util.find_spec(name) is None)
    return next(absent, "")


@functools.cache
def classes():
    """lerobot's module `groot_n1`, and its `Eagle25VLConfig`.

    lerobot's own `__init__` files import cameras, datasets and a torchvision that this project does without, so empty
    packages with their folders stand in for them.
    """
    packages = Path(sysconfig.get_paths()["purelib"])
    for name in ("lerobot", "lerobot.policies", "lerobot.policies.groot"):
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__path__ = [str(packages.joinpath(*name.split(".")))]
            sys.modules[name] = module
    from lerobot.policies.groot import groot_n1
    from lerobot.policies.groot.eagle2_hg_model.configuration_eagle2_5_vl import Eagle25VLConfig

    groot_n1.ensure_eagle_cache_ready = lambda *args: None  # it would look on the hub
    return groot_n1, Eagle25VLConfig


@contextlib.contextmanager
def _eagle(config: dict):
    """Within it lerobot's backbone is built of `config`, with torch's attention in place of flash attention."""
    from transformers import Qwen3ForCausalLM, SiglipVisionModel

    groot_n1, Eagle25VLConfig = classes()
    from lerobot.policies.groot.eagle2_hg_model.modeling_eagle2_5_vl import Eagle25VLForConditionalGeneration

    class Config:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            return Eagle25VLConfig(**copy.deepcopy(config), _attn_implementation="eager")

    class Model:
        @staticmethod
        def from_config(eagle, **kwargs):
            vision = SiglipVisionModel._from_config(eagle.vision_config, attn_implementation="sdpa")
            language = Qwen3ForCausalLM._from_config(eagle.text_config, attn_implementation="sdpa")
            return Eagle25VLForConditionalGeneration(eagle, vision_model=vision, language_model=language)

    from lerobot.policies.groot.action_head import flow_matching_action_head

    # Without values, on the device "meta", a distribution cannot check its own.
    flow_matching_action_head.Beta = functools.partial(torch.distributions.Beta, validate_args=False)
    before = groot_n1.AutoConfig, groot_n1.AutoModel
    groot_n1.AutoConfig, groot_n1.AutoModel = Config, Model
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every choice it makes
            yield groot_n1
    finally:
        groot_n1.AutoConfig, groot_n1.AutoModel = before


def build(model: dict, eagle: dict) -> nn.Module:
    """A GR00TN15 with random weights; inside `torch.device("meta")` with none."""
    with _eagle(eagle) as groot_n1:
        network = groot_n1.GR00TN15(groot_n1.GR00TN15Config(**copy.deepcopy(model)), local_model_path="")
    network.eagle_config = eagle
    return network.eval()


@torch.no_grad()
def spread(network: nn.Module) -> nn.Module:
    """Random weights as large as a narrow network should have; their usual deviation of 0.02 is for wide ones."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.reset_parameters()
        elif type(layer).__name__ == "CategorySpecificLinear":
            layer.W.normal_(0, layer.W.shape[1] ** -0.5)
    return network


def find(source: str) -> Path:
    """The folder of a model: `source` itself, or what the hub's cache or the hub has under that name."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        takes = "it takes tiny, a folder with config.json and *.safetensors, or a name on the hub"
        check(source.count("/") == 1 and not source.startswith("."), f"--model got {source!r}, no folder; {takes}")
        try:
            folder = Path(snapshot_download(source))
        except Exception as error:  # of the network, of the cache, of permissions: a dozen types
            offline = "; HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else ""
            first = str(error).strip().partition("\n")[0]
            fail(f"--model got {source!r}, whose weights are not here and could not be fetched{offline} ({first})")
    for name, what in (("config.json", "configuration"), ("*.safetensors", "weights")):
        check(any(folder.glob(name)), f"--model got {source!r}, which holds no {what} ({name}); it takes a whole model")
    return folder


def eagle_folder(folder: Path) -> Path:
    """Where the backbone's config and tokenizer are: `folder`/eagle, or lerobot's cache, filled from the hub."""
    if (folder / "eagle" / "config.json").is_file():
        return folder / "eagle"
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(EAGLE_ASSETS))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        fail(f"the tokenizer of GR00T's backbone, {EAGLE_ASSETS}, is not here and could not be fetched ({first})")


def load(source: str) -> nn.Module:
    """The model of a folder or of a name on the hub, in float32 on the CPU; `tiny` is one with random weights."""
    if source == "tiny":
        return spread(build(*tiny()))
    from transformers import PreTrainedModel

    folder = find(source)
    try:
        eagle = json.loads((eagle_folder(folder) / "config.json").read_text())
        with _eagle(eagle) as groot_n1:
            from_pretrained = PreTrainedModel.from_pretrained.__func__  # GR00TN15's own asks the hub first
            network, found = from_pretrained(
                groot_n1.GR00TN15, str(folder), local_model_path=str(folder), output_loading_info=True
            )
    except Exception as error:  # of JSON, of safetensors, of a configuration that lacks something: a dozen types
        first = str(error).strip().partition("\n")[0]
        fail(f"--model got {source!r}, which cannot be read as GR00T N1.5 ({first})")
    absent = found["missing_keys"]
    check(
        not absent,
        f"--model got {source!r}, whose weights lack {len(absent)} tensors, such as {next(iter(absent), '')}",
    )
    network.eagle_config = eagle
    return network.float().eval()


def save(network: nn.Module, folder: str | Path, statistics: dict[str, torch.Tensor], task: str):
    """Writes what `load` and `read_statistics` read: the model, the ranges of state and action, the task it learned."""
    folder = Path(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        network.save_pretrained(folder, safe_serialization=True)
    model = {name: getattr(network.config, name) for name in FULL}
    model["action_head_cfg"] = model["action_head_cfg"] | {"max_num_embodiments": num_embodiments(network)}
    write_json(folder / "config.json", model | {"model_type": "gr00t_n1_5"})
    (folder / "eagle").mkdir(exist_ok=True)
    write_json(folder / "eagle" / "config.json", network.eagle_config)
    write_json(folder / "statistics.json", {name: ends.tolist() for name, ends in statistics.items()} | {"task": task})


def read_statistics(source: str, embodiment: str) -> dict:
    """{"state": [least, greatest], "action": ..., "task": ...} of a model's folder, {} where it has none.

    Of a published folder those of `experiment_cfg/metadata.json`, parts one after the other in its order.
    """
    if source == "tiny":
        return {}
    folder = find(source)
    if (folder / "statistics.json").is_file():
        return json.loads((folder / "statistics.json").read_text())
    published = folder / "experiment_cfg" / "metadata.json"
    if not published.is_file():
        return {}
    found = json.loads(published.read_text()).get(embodiment, {}).get("statistics", {})
    parts = {kind: found[kind].values() for kind in ("state", "action") if kind in found}
    return {kind: [sum((part[end] for part in of), []) for end in ("min", "max")] for kind, of in parts.items()}


def num_embodiments(network: nn.Module) -> int:
    return network.action_head.state_encoder.layer1.W.shape[0]


def embodiment_slot(name: str) -> int:
    """The number of an embodiment, by name or number; anything else ends with one sentence."""
    slot = EMBODIMENTS.get(name, int(name) if name.isdecimal() else -1)
    known = ", ".join(EMBODIMENTS)
    check(0 <= slot < 32, f"--embodiment got {name!r}; it takes {known}, or a slot from 0 to 31")
    return slot


@torch.no_grad()
def keep_embodiment(network: nn.Module, slot: int):
    """Of each weight that the embodiments have one of, only that of `slot` is kept, as number 0."""
    for layer in network.action_head.modules():
        if type(layer).__name__ == "CategorySpecificLinear":
            kept = slot if len(layer.W) > 1 else 0
            layer.W = nn.Parameter(layer.W[kept : kept + 1].clone())
            layer.b = nn.Parameter(layer.b[kept : kept + 1].clone())
            layer.num_categories = 1
            layer.forward = types.MethodType(_one_embodiment, layer)


def _one_embodiment(layer: nn.Module, x: torch.Tensor, cat_ids: torch.Tensor) -> torch.Tensor:
    """What CategorySpecificLinear does, without a copy of the weights for every row."""
    return x @ layer.W[0] + layer.b[0]


def image_tokens(network: nn.Module) -> int:
    """Tokens of one picture."""
    return network.backbone.eagle_model.num_image_token


def token_table(network: nn.Module, source: str, sentences: tuple[str, ...], num_images: int):
    """Token ids and attention mask, int64 (sentences, length) each, all of one length: the model's actions depend on
    how much padding there is.
    """
    if network.eagle_config["text_config"]["vocab_size"] == 64:  # tiny: words in the order of the alphabet
        words = sorted({word for sentence in sentences for word in sentence.split()})
        check(len(words) <= 64 - FIRST_WORD, f"the tiny model knows {64 - FIRST_WORD} words, the task has {len(words)}")
        ids = torch.full((len(sentences), num_images * image_tokens(network) + TEXT_LENGTH), IMAGE_TOKEN)
        ids[:, -TEXT_LENGTH:] = PAD_TOKEN
        for row, sentence in zip(ids, sentences, strict=True):
            text = torch.tensor([FIRST_WORD + words.index(word) for word in sentence.split()])
            row[len(row) - TEXT_LENGTH :][: len(text)] = text
        return ids, (ids != PAD_TOKEN).long()
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(str(eagle_folder(find(source))), trust_remote_code=True, use_fast=True)
    processor.tokenizer.padding_side = "left"
    picture = Image.new("RGB", (image_size(network),) * 2)
    texts, pictures = [], []
    for sentence in sentences:  # the list's brackets and quotes are part of the text that the model was trained with
        content = [{"type": "image", "image": picture}] * num_images + [{"type": "text", "text": str([sentence])}]
        talk = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
        pictures += processor.process_vision_info(talk)[0]
    tiles = {"min_dynamic_tiles": 1, "max_dynamic_tiles": 1, "use_thumbnail": False}
    found = processor(text=texts, images=pictures, images_kwargs=tiles, return_tensors="pt", padding=True)
    return found["input_ids"], found["attention_mask"]


def image_size(network: nn.Module) -> int:
    return network.eagle_config["force_image_size"]


def pixel_values(network: nn.Module, pictures: list[torch.Tensor]) -> torch.Tensor:
    """Each camera's uint8 (batch, height, width, 3) to float32 (batch * cameras, 3, size, size) from -1 to 1."""
    pixels = torch.stack(pictures, 1).flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
    size = image_size(network)
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return pixels


def checkpoint_blocks(network: nn.Module):
    """Gradient checkpointing of the blocks of the DiT and of the vision-language attention; lerobot has a flag for it
    that nothing reads.
    """
    for stack in (network.action_head.model, network.action_head.vl_self_attention):
        for block in stack.transformer_blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def features(network: nn.Module, ids: torch.Tensor, mask: torch.Tensor, pictures: list[torch.Tensor]) -> torch.Tensor:
    """The backbone's, of pictures as `pixel_values` takes and rows of the token table: (batch, length, width)."""
    inputs = {"eagle_input_ids": ids, "eagle_attention_mask": mask, "eagle_image_sizes": None}
    return network.backbone.forward_eagle(inputs | {"eagle_pixel_values": pixel_values(network, pictures)})[0]


def add_lora(network: nn.Module, rank: int):
    """Low-rank adapters (Hu et al. 2021) on the attention of the DiT, which begin at no change; named `lora_`."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    inject_adapter_in_model(config, network.action_head.model)


def merged(network: nn.Module) -> nn.Module:
    """A copy in which the adapters are part of the weights that they adapt."""
    network = copy.deepcopy(network)
    for name, layer in list(network.named_modules()):
        if hasattr(layer, "lora_A"):
            layer.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, layer.base_layer)
    return network


class GpuMemory:
    """Peak of the memory on a GPU between two readings, and one warning where it comes near to what there is."""

    def __init__(self, device: torch.device, limit: float):
        """limit: share of the device's memory above which it warns."""
        self.device, self.limit, self.warned = device, limit, False

    def read(self) -> dict[str, float]:
        """{"charts/gpu_memory_gb": peak in 1e9 bytes since the last reading}; {} on a CPU."""
        if self.device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated(self.device) / 1e9
        total = torch.cuda.get_device_properties(self.device).total_memory / 1e9
        torch.cuda.reset_peak_memory_stats(self.device)
        if peak > self.limit * total and not self.warned:
            self.warned = True
            lower = "lower --micro-batch-size or take --tune lora before it runs out"
            print(f"warning: {peak:.1f} of {total:.1f} GB of the GPU's memory were in use; {lower}", flush=True)
        return {"charts/gpu_memory_gb": peak}
