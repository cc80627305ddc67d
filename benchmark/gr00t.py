"""GR00T on Pick-v0: how far PPO takes the clone of an expert, by policy, deterministic and on fresh seeds.

    python benchmark/gr00t.py --seeds 1 2 3                             # both policies from the same warm start
    python benchmark/gr00t.py --seeds 1 --policies gr00t --num-iterations 50
    python benchmark/gr00t.py --policies mlp --seeds 1 2 3              # the state task
    python benchmark/gr00t.py --policies gr00t --seeds 1 --run runs/...  # a run that was trained already
    python benchmark/gr00t.py --policies gr00t --seeds 1 --variant "noise correlated by 0.8" --noise-correlation 0.8

Per seed one tiny GR00T is cloned, and every policy starts from it with the same samples per iteration. Unknown flags
go to ppo_gr00t.py. Results of policies, variants and seeds that were not asked for stay in the file. Beside the JSON, a
picture of the curves: a step of GR00T's is a chunk of 8 actions, one of the mlp's a single action. Evaluations while
training are of --eval-episodes episodes, first and last of --episodes fresh ones.
"""

import json
import time
from pathlib import Path

import tools
import torch

import ppo_gr00t
from common import checkpoint
from common.envs.pick import PickEnv
from common.envs.pick_eval import evaluate

POLICIES = ("gr00t", "gaussian-residual", "mlp")
CURVES = ("env/success", "eval/success_rate", "charts/episodic_length", "charts/SPS", "losses/kl", "losses/clipfrac")
COLOURS = ("tab:green", "tab:orange", "tab:gray", "tab:red", "tab:purple")


def success(path: Path, episodes: int) -> dict:
    """The deterministic policy of a checkpoint on seeds that no training had."""
    state = checkpoint.load(path, ppo_gr00t.SCRIPT)
    args = ppo_gr00t.Args(**{k: v for k, v in state["args"].items() if k in ppo_gr00t.Args.__dataclass_fields__})
    envs = PickEnv(1, "cpu", cfg=args, physics_threads=1)
    agent, flow = ppo_gr00t.make_agent(envs, args)
    envs.close()
    agent.load_state_dict(state["agent"])
    if flow:
        flow.generator = torch.Generator().manual_seed(tools.EVAL_SEED)
    return evaluate(agent, args, "cpu", episodes, tools.EVAL_SEED)


def measure(run_dir: Path, episodes: int) -> dict:
    """Success before and after PPO, the curves, and what it cost; of a run that was stopped, its newest model's."""
    last = checkpoint.latest(run_dir)
    state = checkpoint.load(last, ppo_gr00t.SCRIPT)
    found = {"after": success(last, episodes)}
    first = run_dir / "checkpoints" / "model_0.pt"
    if first.exists():
        found["before"] = success(first, episodes)
        found["gain"] = found["after"]["success_rate"] - found["before"]["success_rate"]
    scalars = tools.read_scalars(run_dir)
    kept = {"global_step": state["global_step"], "iterations": state["iteration"], "wall_seconds": state["elapsed"]}
    other = {"log_dir", "config", "track", "model_path", "model", "resume"}  # where things lie is of no interest
    kept["settings"] = {name: value for name, value in state["args"].items() if name not in other}
    return found | {"summary": kept, "curves": {name: scalars[name] for name in CURVES if name in scalars}}


def draw(runs: dict, path: Path):
    """Success of the deterministic policy by samples: the evaluations while training, one line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mlp = {name: by_seed for name, by_seed in runs.items() if name.startswith("mlp")}
    panels = [panel for panel in ({name: runs[name] for name in runs.keys() - mlp.keys()}, mlp) if panel]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 3.6), layout="constrained", squeeze=False)
    for panel, ax in zip(panels, axes[0], strict=True):
        for colour, (name, by_seed) in zip(COLOURS, sorted(panel.items()), strict=False):
            for i, run in enumerate(by_seed.values()):
                points = [(step, 100 * value) for step, value in run["curves"].get("eval/success_rate", [])]
                points.append((run["summary"]["global_step"], 100 * run["after"]["success_rate"]))
                if "before" in run:
                    points.insert(0, (0, 100 * run["before"]["success_rate"]))
                steps, rates = zip(*points, strict=True)
                thousands = [step / 1000 for step in steps]
                ax.plot(thousands, rates, color=colour, label=name if i == 0 else None, marker=".")
        unit = "actions" if panel is mlp else "chunks"
        ax.set(xlabel=f"thousand {unit}", ylabel="success of the deterministic policy (%)", ylim=(0, 100))
        ax.set_xlim(left=0)
        ax.legend()
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=140)


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES[:2]))
    parser.add_argument("--episodes", type=int, default=256, help="of the evaluations before and after")
    parser.add_argument("--run", type=Path, help="folder of a finished or stopped run, instead of training one")
    parser.add_argument("--variant", default="", help="stands beside the policy's name in the results")
    args, flags = parser.parse_known_args()
    began, folder = time.time(), tools.new_folder(args, "gr00t")
    file = args.out / "gr00t.json"
    runs = json.loads(file.read_text())["figures"]["runs"] if file.exists() else {}
    for seed in args.seeds:
        start = None  # the first policy's warm start, which the second one shares
        for policy in args.policies:
            run_dir = args.run or folder / f"{policy}_{seed}"
            command = ["--policy", policy, "--seed", seed, "--log-dir", run_dir, "--no-save-video", *flags]
            command += ["--model-path", start] if start else []
            print(f"{policy}, seed {seed}", flush=True)
            log = run_dir.with_suffix(".log")
            if not args.run:
                tools.finish(tools.start("ppo_gr00t.py", command, log), log)
            run = {"flags": [str(flag) for flag in flags]} | measure(run_dir, args.episodes)
            if policy != "mlp":
                start = start or run_dir / "warm_start"
            by_seed = runs.setdefault(f"{policy}, {args.variant}" if args.variant else policy, {})
            if "before" not in run and policy != "mlp":  # its warm start is that of the first policy
                run["before"] = runs["gr00t"][str(seed)]["before"]
                run["gain"] = run["after"]["success_rate"] - run["before"]["success_rate"]
            by_seed[str(seed)] = run
            gain = f", {100 * run['gain']:+.1f} points" if "gain" in run else ""
            print(f"  success {run['after']['success_rate']:.1%}{gain}", flush=True)
            tools.write(args, "gr00t", args.seeds, None, began, {"runs": runs})
            draw(runs, args.out / "gr00t.png")


if __name__ == "__main__":
    main()
