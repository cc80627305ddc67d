"""Peg insertion: how far the deterministic policy gets from each kind of observation, on fresh seeds.

    python benchmark/peg_insert.py --variants state --seeds 1
    python benchmark/peg_insert.py --variants all rgb tactile blind --seeds 1 2 3

    python benchmark/peg_insert.py --variants all --seeds 1 --run runs/...        # a run that was trained already

Every variant is trained with the script's own preset and evaluated at five difficulties. Unknown flags go to
ppo_multimodal_peginsert.py. Results of variants and seeds that were not asked for stay in the file.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import tools
import torch
from matplotlib.figure import Figure

import ppo_multimodal_peginsert as ppo
from common import checkpoint
from common.envs.peg_insert import PegInsertEnv
from common.envs.peg_insert_eval import LEVELS, evaluate, plain

MULTIMODAL = ["--observation", "multimodal", "--modalities"]
VARIANTS = {
    "state": [],
    "all": [*MULTIMODAL, "rgb", "tactile", "proprio"],
    "rgb": [*MULTIMODAL, "rgb", "proprio"],
    "tactile": [*MULTIMODAL, "tactile", "proprio"],
    "blind": [*MULTIMODAL, "proprio"],
}
CURVES = ("env/success", "env/difficulty", "charts/episodic_return", "charts/SPS")


def push_down(obs: torch.Tensor) -> torch.Tensor:
    """A policy that looks at nothing: what pushing straight down from where the hand begins is worth."""
    return torch.tensor([0.0, 0, -0.6, 0, 0, 0]).expand(len(obs), 6)


def measure(run_dir, episodes: int, difficulties: list[float]) -> dict:
    """The last policy of a run at `difficulties`, and the curves of its training."""
    state = checkpoint.load(run_dir, ppo.SCRIPT)
    args = ppo.Args(**{name: v for name, v in state["args"].items() if name in ppo.Args.__dataclass_fields__})
    envs = PegInsertEnv(1, "cpu", cfg=args)
    agent = ppo.Agent(envs, args)
    envs.close()
    agent.load_state_dict(state["agent"])
    levels, straight = [], []
    for level in difficulties:
        result = evaluate(agent, replace(plain(args), difficulty=level), "cpu", episodes, tools.EVAL_SEED)
        levels.append(result)
        unseeing = replace(plain(args), difficulty=level, observation="state")
        straight.append(evaluate(push_down, unseeing, "cpu", episodes, tools.EVAL_SEED))
        low, high = result["success_ci95"]
        print(f"  difficulty {level}: success {result['success_rate']:.1%} ({low:.1%} to {high:.1%})", flush=True)
    scalars = tools.read_scalars(run_dir)
    kept = {"global_step": state["global_step"], "iterations": state["iteration"], "wall_seconds": state["elapsed"]}
    curves = {name: scalars[name] for name in CURVES if name in scalars}
    return {"levels": levels, "straight_down": straight, "summary": kept, "curves": curves}


def plot(runs: dict, path: Path):
    """Of the runs from modalities: success while training, of the sampling policy, and after it of the deterministic
    one, at the highest difficulty that was tried."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    curves, ends = figure.subplots(1, 2)
    variants = [name for name in VARIANTS if name in runs and name != "state"]
    for place, variant in enumerate(variants):
        for seed, run in runs[variant].items():
            curve = run["curves"].get("env/success", [])
            label = variant if seed == next(iter(runs[variant])) else None
            curves.plot([s / 1000 for s, _ in curve], [v for _, v in curve], color=f"C{place}", lw=1, label=label)
            result = run["levels"][-1]
            x = place + 0.12 * (list(runs[variant]).index(seed) - (len(runs[variant]) - 1) / 2)
            ends.plot([x, x], result["success_ci95"], color=f"C{place}")
            ends.plot(x, result["success_rate"], "o", color=f"C{place}")
    curves.set(xlabel="thousand steps", ylabel="success while training", ylim=(-0.02, 1.02))
    curves.legend()
    ends.set(ylabel="success, deterministic policy", xlim=(-0.5, len(variants) - 0.5), ylim=(-0.02, 1.02))
    ends.set_xticks(range(len(variants)), variants)
    figure.savefig(path, dpi=110)


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["state"])
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="difficulties of the evaluations")
    parser.add_argument("--run", type=Path, help="folder of a finished or stopped run, instead of training one")
    args, flags = parser.parse_known_args()
    began, folder = time.time(), tools.new_folder(args, "peg_insert")
    file = args.out / "peg_insert.json"
    runs = json.loads(file.read_text())["figures"]["runs"] if file.exists() else {}
    for variant in args.variants:
        for seed in args.seeds:
            run_dir = args.run or folder / f"{variant}_{seed}"
            command = ["--seed", seed, "--log-dir", run_dir, *VARIANTS[variant], *flags]
            print(f"{variant}, seed {seed}", flush=True)
            if not args.run:
                log = run_dir.with_suffix(".log")
                tools.finish(tools.start("ppo_multimodal_peginsert.py", command, log), log)
            run = {"flags": [*VARIANTS[variant], *flags]} | measure(run_dir, args.episodes, args.levels)
            runs.setdefault(variant, {})[str(seed)] = run
            tools.write(args, "peg_insert", args.seeds, None, began, {"runs": runs})
            plot(runs, args.out / "peg_insert.png")


if __name__ == "__main__":
    main()
