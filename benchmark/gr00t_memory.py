"""The memory of fine-tuning the full GR00T N1.5, computed: built on the device "meta", which has shapes and no numbers.

    python benchmark/gr00t_memory.py

Counts of parameters are those of lerobot's own classes, beside the published ones. Static memory: weights that never
change in bfloat16, and of what is trained the float32 master, its gradient, Adam's two moments and, at the peak of an
update, the gradient once more, by parameter and concatenated (common/flat_adam.py). Per sample: every tensor that
autograd keeps for the backward pass of ppo_loss, as `saved_tensors_hooks` sees them, without those that are parameters,
in float32 and halved for bfloat16. Not in it: what an allocator adds, the workspace of kernels, and, with gradient
checkpointing, the one block whose activations are computed again. Nothing was run on a GPU.
"""

import contextlib
import io
import time
from types import SimpleNamespace

import numpy as np
import tools
import torch
from gymnasium.spaces import Box, Dict, Discrete

import ppo_gr00t
from common import gr00t

# Millions: the parts of the head as published (docs/gr00t.md), and the backbone.
PUBLISHED = {"action_head": 1068.8, "dit": 550, "action_encoder": 228, "vl_self_attention": 201, "state_encoder": 52}
PUBLISHED |= {"action_decoder": 35, "backbone": 1340}
TOKENS = 570  # of two pictures of 256 tokens each, and of text
GB = 1e9
LIMIT = 40  # GB
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
VARIANTS = {"head, all 32 embodiments": "head", "head, one embodiment": "head", "LoRA of rank 16": "lora"}
PICTURES = Box(0, 255, (224, 224, 3), np.uint8)


def millions(module) -> float:
    return round(sum(p.numel() for p in module.parameters()) / 1e6, 1)


def build(source: str = ""):
    return gr00t.build(gr00t.FULL, gr00t.FULL_EAGLE)


def make_agent(tune: str):
    """The script's own agent around the full model, on "meta"."""
    gr00t.load = build
    gr00t.token_table = lambda network, source, sentences, n: (
        [torch.zeros(len(sentences), TOKENS, dtype=torch.long)] * 2
    )
    args = ppo_gr00t.Args(tune=tune, bc_tune=tune, critic_hidden=(2048, 1024, 512))
    spaces = {"front": PICTURES, "wrist": PICTURES, "state": Box(-1, 1, (20,)), "instruction": Discrete(20)}
    envs = SimpleNamespace(single_observation_space=Dict(spaces), single_action_space=Box(-1, 1, (8, 7)))
    with torch.device("meta"):
        agent, _ = ppo_gr00t.make_agent(envs, args)
    agent.set_trainable(ppo_gr00t.stages(args)[0])
    return agent, args


def saved_bytes(agent, args, batch: int) -> int:
    """Of the tensors that autograd keeps for `batch` samples of ppo_loss, each storage once."""
    steps = {"one": 1, "all": agent.num_flow_steps}[args.sde_steps]
    empty = lambda *shape: torch.empty(*shape, device="meta")  # noqa: E731
    obs = {"state": empty(batch, 1, 64), "instruction": torch.empty(batch, dtype=torch.long, device="meta")}
    obs[agent.network.encodes] = empty(batch, TOKENS, 2048)
    action = {"step": torch.empty(batch, steps, dtype=torch.long, device="meta")}
    action |= {"x": empty(batch, steps, 16, 32), "next": empty(batch, steps, 8, 7), "action": empty(batch, 8, 7)}
    minibatch = {"obs": obs, "actions": action, "dists": empty(batch, steps, 8, 7), "old_std": agent.step_std}
    minibatch |= {name: empty(batch) for name in ("logprobs", "advantages", "returns", "values")}
    parameters = {p.untyped_storage()._cdata for p in agent.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = tensor, storage.nbytes()  # held, or its number could be given to another one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = ppo_gr00t.ppo_loss(agent, args, minibatch)
    assert loss.requires_grad
    return sum(size for _, size in kept.values())


def static(agent, embodiments: int) -> dict:
    """GB by part; of the unsliced head, what the other 31 embodiments add."""
    trained = [p for name, p in agent.named_parameters() if p.requires_grad and not name.startswith("critic")]
    critic = sum(p.numel() for p in agent.critic.parameters())
    trained = sum(p.numel() for p in trained)
    frozen = sum(p.numel() for p in agent.parameters()) - trained - critic
    if embodiments > 1:
        per_slot = sum(
            p.numel()
            for name, p in agent.named_parameters()
            if name.endswith((".W", ".b")) and ("_encoder" in name or "action_decoder" in name)
        )
        trained += (embodiments - 1) * per_slot
    sizes = {"frozen": 2 * frozen, "trained": 16 * trained, "critic": 16 * critic, "gradients": 8 * (trained + critic)}
    millions = {"trained_millions": trained / 1e6, "critic_millions": critic / 1e6, "frozen_millions": frozen / 1e6}
    return {f"{name}_gb": size / GB for name, size in sizes.items()} | millions


def measure(variant: str) -> list[dict]:
    """A row for each choice of noisy steps, without and with gradient checkpointing."""
    agent, args = make_agent(VARIANTS[variant])
    fixed = static(agent, 32 if "32" in variant else 1)
    total = sum(fixed[f"{name}_gb"] for name in ("frozen", "trained", "critic", "gradients"))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            gr00t.checkpoint_blocks(agent.network.model)
        for args.sde_steps in ("one", "all"):
            one, three = (saved_bytes(agent, args, batch) for batch in (1, 3))
            per_sample = (three - one) / 2 / GB  # float32
            row = {"variant": variant, "sde_steps": args.sde_steps, "gradient_checkpointing": checkpointing}
            row |= {"static": fixed, "static_gb": total, "per_sample_fp32_gb": per_sample}
            row["micro_batch"] = {
                size: {"fp32_gb": total + size * per_sample, "bf16_gb": total + size * per_sample / 2}
                for size in MICRO_BATCHES
            }
            fits = [size for size, cells in row["micro_batch"].items() if cells["bf16_gb"] < LIMIT]
            row["largest_micro_batch_below_40_gb_bf16"] = max(fits, default=0)
            found.append(row)
            what = f"{variant:26} {args.sde_steps:4} checkpointing {checkpointing!s:5}"
            sizes = f"static {total:5.1f} GB, {per_sample * 500:6.1f} MB a sample in bf16"
            print(f"{what} {sizes}, below {LIMIT} GB up to {max(fits, default=0)}", flush=True)
    return found


def main():
    args = tools.parser(__doc__).parse_args()
    began = time.time()
    with contextlib.redirect_stdout(io.StringIO()), torch.device("meta"):
        whole = build()
    head = whole.action_head
    counts = {"action_head": millions(head), "dit": millions(head.model), "backbone": millions(whole.backbone)}
    counts |= {name: millions(getattr(head, name)) for name in PUBLISHED if hasattr(head, name)}
    gr00t.keep_embodiment(whole, 31)
    counts["action_head, one embodiment"] = millions(head)
    for name, count in counts.items():
        print(f"{name:28} {count:8.1f} M   published {PUBLISHED.get(name, '')}")
    rows = [row for variant in VARIANTS for row in measure(variant)]
    counts["stored_mb_per_chunk_bf16"] = TOKENS * 2048 * 2 / 1e6
    tools.write(args, "gr00t_memory", [], None, began, {"millions": counts, "published": PUBLISHED, "rows": rows})


if __name__ == "__main__":
    main()
