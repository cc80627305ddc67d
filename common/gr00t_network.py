"""GR00T as functions for a robot of any size: features of what it observes, and the velocity of its flow of actions."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import gr00t
from common.cli import check, check_flag

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = ("critic", "lora", "projector", "dit", "adapter", "llm", "vision")  # of an agent, in unfreezing order
TUNE = {"lora": ["lora"], "projector": ["projector"], "dit": ["dit"], "head": ["projector", "dit", "adapter"]}
TUNE |= {"all": ["projector", "dit", "adapter", "llm", "vision"]}


@dataclass
class Gr00tConfig:
    """The model's flags."""

    model: str = "tiny"
    """GR00T's weights: tiny (random, of the real classes), a folder, or a name on the hub; --model-path sets it too"""
    embodiment: str = "new_embodiment"  # the slot of the model that learns the robot, by name or number
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """what the network runs in (autocast) and frozen weights are kept in; what is trained, and all sums, in float32"""
    tune: Literal[*TUNE] = "head"
    """what PPO trains beside the critic: projector: encoders and decoder of state and action; dit: the DiT; head: both
    and the attention over vision and language; lora: low-rank adapters on the DiT's attention; all: head, the top of
    the language model and the vision model"""
    unfreeze_schedule: tuple[str, ...] = ()
    """in place of --tune: parts and the iterations at which they begin to learn, such as critic:0 lora:2 dit:50"""
    lora_rank: int = 16  # rank of the low-rank adapters
    llm_layers: int = 2  # how many of the top layers of the language model belong to the part llm
    gradient_checkpointing: bool = False  # compute the activations of the head's blocks twice to save memory
    memory_limit: float = 0.9  # share of a GPU's memory above which a warning is printed


def check_flags(args):
    """The ranges of the model's flags and, unless `args.policy` is mlp, what else it needs: its packages, pictures and
    chunks of actions.
    """
    for name in ("lora_rank", "llm_layers", "memory_limit"):
        check_flag(args, getattr(args, name) > 0, name, "a number above 0")
    stages(args)
    if args.policy == "mlp":
        return
    absent = gr00t.missing()
    check(not absent, f"--policy {args.policy} needs {absent}; {gr00t.INSTALL}, or take --policy mlp")
    check_flag(args, args.observation == "images", "observation", f"images with --policy {args.policy}")
    check_flag(args, args.chunk > 1, "chunk", "2 or more with GR00T, whose actions are chunks")
    check(not args.compile and not args.cuda_graphs, "--compile and --cuda-graphs take --policy mlp")


def stages(args: Gr00tConfig) -> dict[int, list[str]]:
    """{iteration: the parts of PARTS that learn from there on}, of --unfreeze-schedule or else of --tune."""
    if not args.unfreeze_schedule:
        return {0: ["critic", *TUNE[args.tune]]}
    begins = {}
    for entry in args.unfreeze_schedule:
        name, _, iteration = entry.partition(":")
        takes = f"part:iteration, with the parts {', '.join(PARTS)}, such as critic:0 dit:20"
        check(name in PARTS and iteration.isdecimal(), f"--unfreeze-schedule got {entry!r}; it takes {takes}")
        begins[name] = int(iteration)
    check("critic" in begins and not begins["critic"], "--unfreeze-schedule takes critic:0 among its entries")
    return {at: [name for name in begins if begins[name] <= at] for at in sorted(set(begins.values()))}


def parts_at(args, iteration: int) -> list[str]:
    """The parts that learn in `iteration`; none of a model that `args.policy` takes as it is."""
    if args.policy != "gr00t":
        return []
    by_iteration = stages(args)
    return by_iteration[max(at for at in by_iteration if at <= max(0, iteration))]


class Network(nn.Module):
    """One embodiment of GR00T, with the ranges of the robot's states and actions, which are mapped to [-1, 1].

    `encode` computes of an observation all that does not depend on what is trained; `context` the rest. Weights that
    are never trained are kept in `precision`, in which the network runs (autocast); velocities are float32. Dropout
    is off. Of a model that was loaded, the state_dict leaves out what is never trained.
    """

    def __init__(self, args, spaces, action_shape: tuple[int, int], sentences: tuple[str, ...], parts: set[str]):
        """args: model, embodiment, precision, lora_rank, llm_layers and gradient_checkpointing, of the script's flags.
        spaces: of a robot's observation, {camera: pictures, "state", "instruction": index into `sentences`}.
        action_shape: (chunk, action_dim). parts: those of PARTS that are ever trained.
        """
        super().__init__()
        self.model = gr00t.load(args.model)
        gr00t.keep_embodiment(self.model, gr00t.embodiment_slot(args.embodiment))
        if "lora" in parts:
            gr00t.add_lora(self.model, args.lora_rank)
        if args.gradient_checkpointing:
            gr00t.checkpoint_blocks(self.model)
        self.model.eval()
        head = self.model.action_head
        self.num_flow_steps, self.num_buckets = head.num_inference_timesteps, head.num_timestep_buckets
        self.horizon, self.width, self.state_width = head.action_horizon, head.action_dim, head.config.max_state_dim
        self.feature_dim = head.config.backbone_embedding_dim + head.config.input_embedding_dim
        self.chunk, self.action_dim = action_shape
        self.state_dim = spaces["state"].shape[0]
        for what, size, most in (
            ("actions of", self.action_dim, self.width),
            ("states of", self.state_dim, self.state_width),
            ("chunks of", self.chunk, self.horizon),
        ):
            check(size <= most, f"the task has {what} {size}; GR00T takes at most {most}")
        self.cameras = [name for name, space in spaces.items() if len(space.shape) == 3]
        ids, mask = gr00t.token_table(self.model, args.model, sentences, len(self.cameras))
        self.register_buffer("token_ids", ids)
        self.register_buffer("token_mask", mask)
        self.register_buffer("state_range", torch.zeros(2, self.state_dim))
        self.register_buffer("action_range", torch.zeros(2, self.action_dim))

        self.dtype, self.llm_layers = DTYPES[args.precision], args.llm_layers
        self.constant = {name for name, _ in self.named_parameters() if self.part(name) not in parts}
        for name in self.constant:
            self.get_parameter(name).data = self.get_parameter(name).data.to(self.dtype)
        if args.model != "tiny":
            self.register_state_dict_post_hook(_leave_out_constant)
            self.register_load_state_dict_pre_hook(_fill_in_constant)
        self.set_trainable([])

    # --- what is trained

    def part(self, name: str) -> str:
        """The part in PARTS that a parameter belongs to: projector is what encodes and decodes states and actions,
        adapter the attention over vision and language, llm the top `llm_layers`; "" what is never trained.
        """
        if "lora_" in name:
            return "lora"
        if ".language_model." in name:
            kept = len(self.model.backbone.eagle_model.language_model.model.layers) - self.llm_layers
            layer = name.partition(".layers.")[2].partition(".")[0]
            return "llm" if layer.isdecimal() and int(layer) >= kept else ""
        if ".vision_model." in name or ".mlp1." in name:
            return "vision"
        if ".vlln." in name or ".vl_self_attention." in name:
            return "adapter"
        return "dit" if ".action_head.model." in name or name.startswith("action_head.model.") else "projector"

    def set_trainable(self, parts):
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.part(name) in parts)
        # How far `encode` goes.
        self.encodes = "features" if "adapter" in parts else "context"
        if {"llm", "vision"} & set(parts):
            self.encodes = "pictures"

    # --- ranges and padding

    def set_ranges(self, state: torch.Tensor, action: torch.Tensor):
        """The least and the greatest of each component, (2, state_dim) and (2, action_dim)."""
        for name, found in (("state", state), ("action", action)):
            expected = getattr(self, f"{name}_range")
            sizes = f"statistics of {found.shape[1]} components of the {name}, the task has {expected.shape[1]}"
            check(found.shape == expected.shape, f"--model got {sizes}; it takes a model of this robot, or one without")
            expected.copy_(found)

    def read_ranges(self, source: str, embodiment: str) -> dict:
        """Takes the ranges that the model `source` has beside it; gives what `gr00t.read_statistics` does."""
        known = gr00t.read_statistics(source, embodiment)
        if known:
            self.set_ranges(torch.tensor(known["state"]), torch.tensor(known["action"]))
        return known

    def save(self, folder: Path, task: str):
        """The model with its adapters merged, its ranges, and the task that it has learned, as `gr00t.load` reads."""
        gr00t.save(gr00t.merged(self.model), folder, self.ranges(), task)

    def ranges(self) -> dict[str, torch.Tensor]:
        return {"state": self.state_range, "action": self.action_range}

    def normalise_state(self, state: torch.Tensor) -> torch.Tensor:
        """(batch, state_dim) to (batch, 1, 64), padded with zeros."""
        low, high = self.state_range
        state = (2 * (state - low) / (high - low).clamp(min=1e-6) - 1).clamp(-3, 3)
        return F.pad(state, (0, self.state_width - self.state_dim))[:, None]

    def normalise_action(self, action: torch.Tensor) -> torch.Tensor:
        """(..., action_dim) of the robot to what the flow gives."""
        low, high = self.action_range
        return 2 * (action - low) / (high - low) - 1

    def robot_action(self, action: torch.Tensor) -> torch.Tensor:
        """The way back."""
        low, high = self.action_range
        return low + (action + 1) / 2 * (high - low)

    def executed(self, x: torch.Tensor) -> torch.Tensor:
        """Of (..., horizon, width) what the robot executes: (..., chunk, action_dim)."""
        return x[..., : self.chunk, : self.action_dim]

    # --- the network

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.token_ids.device.type, self.dtype)

    def backbone(self, obs: dict) -> torch.Tensor:
        """(batch, tokens, width) of pictures and sentences."""
        rows = obs["instruction"]
        pictures = [obs[name] for name in self.cameras]
        with self.autocast():
            return gr00t.features(self.model, self.token_ids[rows], self.token_mask[rows], pictures).to(self.dtype)

    def adapter(self, features: torch.Tensor) -> torch.Tensor:
        head = self.model.action_head
        with self.autocast():
            return head.vl_self_attention(head.vlln(features)).to(self.dtype)

    @torch.no_grad()
    def encode(self, obs: dict) -> dict:
        """What is stored of the robot's observation: its state, normalised, its instruction, and one of what the DiT
        attends to (`context`), the backbone's features (`features`) or, if that learns, the pictures themselves.
        """
        encoded = {"state": self.normalise_state(obs["state"]), "instruction": obs["instruction"]}
        if self.encodes == "pictures":
            return encoded | {name: obs[name] for name in self.cameras}
        features = self.backbone(obs)
        return encoded | {self.encodes: features if self.encodes == "features" else self.adapter(features)}

    def context(self, obs: dict) -> torch.Tensor:
        """What the DiT attends to, (batch, tokens, width), of an encoded observation."""
        if "context" in obs:
            return obs["context"]
        return self.adapter(obs["features"] if "features" in obs else self.backbone(obs))

    def embedding(self, context: torch.Tensor, obs: dict) -> torch.Tensor:
        """(batch, feature_dim): the mean token, without padding, and the state's feature. It moves neither."""
        mask = self.token_mask[obs["instruction"]][..., None].float()
        mean = (context.float() * mask).sum(1) / mask.sum(1)
        with self.autocast():
            state = self.model.action_head.state_encoder(obs["state"], torch.zeros_like(obs["instruction"]))[:, 0]
        return torch.cat((mean, state.float()), 1).detach()

    def training_times(self, number: int) -> torch.Tensor:
        """(number,) times of the flow, 0 to 1, drawn as in GR00T's own training: more often near the noise."""
        config = self.model.action_head.config
        beta = torch.distributions.Beta(config.noise_beta_alpha, config.noise_beta_beta)
        return (config.noise_s - beta.sample((number,))) / config.noise_s

    def velocity(self, context, state, x, time) -> torch.Tensor:
        """(batch, horizon, width) at x, of `time` (batch,) from 0, noise, to `num_buckets`, data."""
        head = self.model.action_head
        slot = torch.zeros_like(time)  # the one embodiment that is kept
        with self.autocast():
            actions = head.action_encoder(x, time, slot) + head.position_embedding.weight[: self.horizon]
            future = head.future_tokens.weight.expand(len(x), -1, -1)
            tokens = torch.cat((head.state_encoder(state, slot), future, actions), 1)
            hidden = head.model(hidden_states=tokens, encoder_hidden_states=context, timestep=time)
            return head.action_decoder(hidden, slot)[:, -self.horizon :].float()


def _leave_out_constant(network, state: dict, prefix: str, metadata):
    for name in network.constant:
        state.pop(prefix + name)


def _fill_in_constant(network, state: dict, prefix: str, *args):
    for name in network.constant:
        state.setdefault(prefix + name, network.get_parameter(name).detach())
