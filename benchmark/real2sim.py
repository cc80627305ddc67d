"""Pick-and-place by SAC, PPO and DDPG: success of the deterministic policies on fresh seeds, in steps and in minutes.

    python benchmark/real2sim.py --algorithms sac --seeds 1 2 3
    python benchmark/real2sim.py --algorithms ppo ddpg --seeds 1
    python benchmark/real2sim.py --algorithms cleanrl --seeds 1                # SAC as in CleanRL, beside ours
    python benchmark/real2sim.py --algorithms sac --seeds 1 --run runs/...     # a run that was trained already

Every run has its script's own preset and is evaluated on the way (`--eval-interval`), which costs minutes that are
counted. Unknown flags go to the scripts. Results of algorithms and seeds that were not asked for stay in the file.
Success: the object is at the goal when the episode's time is up.
"""

import importlib
import json
import time
from dataclasses import replace
from pathlib import Path

import tools
from matplotlib.figure import Figure

from common import checkpoint
from common.envs.real2sim import Real2SimEnv
from common.envs.real2sim_eval import evaluate, plain

COLOURS = {"sac": "tab:blue", "ppo": "tab:orange", "ddpg": "tab:green", "cleanrl": "tab:red"}
# {name: (script, flags beside its preset's)}; cleanrl: what its sac_continuous_action.py does, at eight environments
ALGORITHMS = {name: (f"{name}_real2sim_mjx", []) for name in ("sac", "ppo", "ddpg")}
CLEANRL = ["--preset", "gymnasium", "--num-envs", 8, "--observation", "full", "--eval-interval", 100]
ALGORITHMS["cleanrl"] = ("sac_real2sim_mjx", [*CLEANRL, "--total-timesteps", 300_000])
GOAL = 0.9  # success that counts as learned


def measure(run_dir, script: str, episodes: int) -> dict:
    """The last policy of a run on fresh seeds, and the success of the policies on the way to it."""
    module = importlib.import_module(script)
    state = checkpoint.load(run_dir, script)
    args = module.Args(**{name: v for name, v in state["args"].items() if name in module.Args.__dataclass_fields__})
    envs = Real2SimEnv(1, "cpu", cfg=args)
    agent = module.Agent(envs, args)
    envs.close()
    agent.load_state_dict(state["agent"])
    result = evaluate(agent, replace(plain(args), backend="mujoco"), "cpu", episodes, tools.EVAL_SEED)
    low, high = result["success_ci95"]
    print(f"  success {result['success_rate']:.1%} ({low:.1%} to {high:.1%}) of {result['episodes']}", flush=True)
    scalars = tools.read_scalars(run_dir)
    seconds = dict(scalars["charts/elapsed"])
    curve = []
    for step, success in scalars.get("eval/success_rate", []):
        near = min(seconds, key=lambda logged: abs(logged - step))
        curve.append({"steps": step, "minutes": seconds[near] * step / near / 60, "success_rate": success})
    learned = next((point for point in curve if point["success_rate"] >= GOAL), None)
    summary = {"steps": state["global_step"], "minutes": state["elapsed"] / 60, "num_envs": args.num_envs}
    summary |= {"ranks": len(state["ranks"]), "learned_at": learned}
    return {"evaluation": result, "summary": summary, "curve": curve}


def plot(runs: dict, path: Path):
    """Success against environment steps, and against minutes, a line per run."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, key, label, scale in zip(
        figure.subplots(1, 2, sharey=True), ("steps", "minutes"), ("million steps", "minutes"), (1e6, 1), strict=True
    ):
        for algorithm, seeds in runs.items():
            for number, run in enumerate(seeds.values()):
                last = run["summary"] | {"success_rate": run["evaluation"]["success_rate"]}
                points = [{"steps": 0, "minutes": 0, "success_rate": 0.0}, *run["curve"], last]
                style = {"color": COLOURS[algorithm], "label": algorithm if number == 0 else None}
                axes.plot([p[key] / scale for p in points], [p["success_rate"] for p in points], **style)
        axes.axhline(GOAL, color="grey", linewidth=0.8, linestyle="--")
        axes.set(xlabel=label, ylim=(0, 1.02), xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("success, deterministic policy")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=["sac", "ppo", "ddpg"])
    parser.add_argument("--episodes", type=int, default=512)
    parser.add_argument("--run", type=Path, help="folder of a finished or stopped run, instead of training one")
    args, flags = parser.parse_known_args()
    began, folder = time.time(), tools.new_folder(args, "real2sim")
    file = args.out / "real2sim.json"
    runs = json.loads(file.read_text())["figures"]["runs"] if file.exists() else {}
    for algorithm in args.algorithms:
        script, own = ALGORITHMS[algorithm]
        for seed in args.seeds:
            run_dir = args.run or folder / f"{algorithm}_{seed}"
            print(f"{algorithm}, seed {seed}", flush=True)
            if not args.run:
                log = run_dir.with_suffix(".log")
                command = ["--seed", seed, "--log-dir", run_dir, *own, *flags]
                tools.finish(tools.start(f"{script}.py", command, log), log)
            run = {"flags": [*own, *flags]} | measure(run_dir, script, args.episodes)
            runs.setdefault(algorithm, {})[str(seed)] = run
            tools.write(args, "real2sim", args.seeds, None, began, {"runs": runs})
            plot(runs, args.out / "real2sim.png")


if __name__ == "__main__":
    main()
