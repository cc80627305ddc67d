"""GR00T on Pick-v0: how far PPO takes the clone of an expert, by policy, deterministic and on fresh seeds.

    python benchmark/gr00t.py --seeds 1 2 3                             # both policies from the same warm start
    python benchmark/gr00t.py --seeds 1 --policies gr00t --num-iterations 50
    python benchmark/gr00t.py --policies mlp --seeds 1 2 3              # the state task
    python benchmark/gr00t.py --policies gr00t --seeds 1 --run runs/...  # a run that was trained already

Per seed one tiny GR00T is cloned, and every policy starts from it with the same samples per iteration. Unknown flags
go to ppo_gr00t.py. Results of policies and seeds that were not asked for stay in the file. Beside the JSON, a picture
of the curves. Evaluations while training are of --eval-episodes episodes, first and last of --episodes fresh ones.
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
COLOURS = {"gr00t": "tab:green", "gaussian-residual": "tab:orange", "mlp": "tab:blue"}


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

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for policy, by_seed in runs.items():
        for i, run in enumerate(by_seed.values()):
            points = [(step, 100 * value) for step, value in run["curves"].get("eval/success_rate", [])]
            points.append((run["summary"]["global_step"], 100 * run["after"]["success_rate"]))
            if "before" in run:
                points.insert(0, (0, 100 * run["before"]["success_rate"]))
            axes.plot(*zip(*points, strict=True), color=COLOURS[policy], label=policy if i == 0 else None, marker=".")
    axes.set(xlabel="environment steps", ylabel="success (%)", ylim=(0, 100))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=140)


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES[:2]))
    parser.add_argument("--episodes", type=int, default=256, help="of the evaluations before and after")
    parser.add_argument("--run", type=Path, help="folder of a finished or stopped run, instead of training one")
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
            by_seed = runs.setdefault(policy, {})
            if "before" not in run and policy == "gaussian-residual":
                run["before"] = runs["gr00t"][str(seed)]["before"]
                run["gain"] = run["after"]["success_rate"] - run["before"]["success_rate"]
            by_seed[str(seed)] = run
            gain = f", {100 * run['gain']:+.1f} points" if "gain" in run else ""
            print(f"  success {run['after']['success_rate']:.1%}{gain}", flush=True)
            tools.write(args, "gr00t", args.seeds, None, began, {"runs": runs})
            draw(runs, args.out / "gr00t.png")


if __name__ == "__main__":
    main()
