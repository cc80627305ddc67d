"""ppo_continuous_isaac.py on tasks of seconds: CartPole, its speed, a memory task, a MultiDiscrete task.

    python benchmark/isaac_small.py --seeds 1 2 3

Every checkpoint is evaluated, after all training, with the deterministic policy: 100 episodes on seeds that no training
has. A task is solved at a mean return of 475 of 500. The time to solve is the wall time from the start of the process,
imports included, until the first checkpoint that solves it was on the disk. The memory task, CartPole without its
velocities, is trained with the LSTM and with the MLP for the same number of steps. Speed: steps per second of whole
training on CartPole-v1 with the flags in SPEED, that policy evaluated like the others. Flags this script does not know
go to all trainings.
"""

import json
import time
from pathlib import Path

import tools
from matplotlib.figure import Figure

import ppo_continuous_isaac as ppo
from common import checkpoint
from common.envs.isaac_eval import evaluate

SOLVED = 475.0
SPEED = {"num_envs": 64, "num_steps": 32, "num_minibatches": 4, "update_epochs": 4, "learning_rate": 1e-3}
TASKS = {
    "cartpole": {"env_id": "CartPole-v1", "total_timesteps": 100_000},
    "speed": {"env_id": "CartPole-v1", "total_timesteps": 500_000} | SPEED,
    "masked_lstm": {"env_id": "CartPoleMasked-v0", "total_timesteps": 400_000, "lstm": True},
    "masked_mlp": {"env_id": "CartPoleMasked-v0", "total_timesteps": 400_000, "lstm": False},
    "multidiscrete": {"env_id": "CartPoleMultiDiscrete-v0", "total_timesteps": 150_000},
}
NAMES = {
    "cartpole": "CartPole-v1",
    "speed": "CartPole-v1, the flags of SPEED",
    "masked_lstm": "CartPoleMasked-v0, LSTM",
    "masked_mlp": "CartPoleMasked-v0, MLP",
    "multidiscrete": "CartPoleMultiDiscrete-v0",
}


def train(run_dir: Path, flags: list) -> list[tuple[Path, float]]:
    """[(checkpoint, seconds from the start of the process until it was on the disk)]."""
    log, start = run_dir.with_suffix(".log"), time.time()
    flags = ["--log-dir", run_dir, "--device", "cpu", "--no-save-video", *flags]
    tools.finish(tools.start("ppo_continuous_isaac.py", flags, log), log)
    # The rename that makes a checkpoint visible sets its ctime.
    return [(path, path.stat().st_ctime - start) for _, path in tools.checkpoints(run_dir)]


def learning_curve(saved: list, episodes: int) -> tuple[list[dict], dict]:
    """One row per checkpoint, and the settings of the training."""
    curve = []
    for path, seconds in saved:
        state = checkpoint.load(path, ppo.SCRIPT)
        args = ppo.Args(**{k: v for k, v in state["args"].items() if k in ppo.Args.__dataclass_fields__})
        envs = ppo.make(args, 20, tools.EVAL_SEED)
        agent = ppo.Agent(envs, args)
        agent.load_state_dict(state["agent"])
        result = evaluate(agent, envs, episodes, tools.EVAL_SEED, agent.zero_state(envs.num_envs))
        envs.close()
        row = {"steps": state["global_step"], "seconds": seconds, "seconds_training": state["elapsed"]}
        row |= {key: result[key] for key in ("episodes", "mean_return", "return_ci95")}
        curve.append(row | {"solved": result["mean_return"] >= SOLVED})
    return curve, state["args"]


def time_to_solve(curve: list[dict]) -> dict:
    """The first checkpoint that solves the task; how many of the later ones do too."""
    for i, row in enumerate(curve):
        if row["solved"]:
            later = [r["solved"] for r in curve[i + 1 :]]
            kept = {"later_checkpoints": len(later), "later_that_solve": sum(later)}
            return {"seconds": row["seconds"], "steps": row["steps"]} | kept
    return {"seconds": None, "steps": None, "later_checkpoints": 0, "later_that_solve": 0}


def measure(task: str, folder: Path, more: list, args) -> dict:
    flags = [word for name, value in TASKS[task].items() for word in (f"--{name.replace('_', '-')}", value)]
    flags += ["--checkpoint-interval", args.checkpoint_interval, *more]
    # All training first: an evaluation between two runs would warm or load the machine.
    run_dirs = {seed: folder / f"{task}_{seed}" for seed in args.seeds}
    saved = {seed: train(run_dir, [*flags, "--seed", seed]) for seed, run_dir in run_dirs.items()}
    runs = {}
    for seed, checkpoints in saved.items():
        curve, settings = learning_curve(checkpoints, args.eval_episodes)
        summary = json.loads((run_dirs[seed] / "summary.json").read_text())
        runs[seed] = {"solve": time_to_solve(curve), "curve": curve, "steps_per_second": summary["SPS"]}
        when = runs[seed]["solve"]["seconds"]
        words = f"solved after {when:.1f} s" if when else "not solved"
        final = f"in the end {curve[-1]['mean_return']:.1f}"
        print(f"{task}, seed {seed}: {words}, {final}, {summary['SPS']:,.0f} steps/s", flush=True)
    result = {"seconds_to_solve": tools.spread(run["solve"]["seconds"] for run in runs.values())}
    result |= {"steps_to_solve": tools.spread(run["solve"]["steps"] for run in runs.values())}
    result |= {"final_return": tools.spread(run["curve"][-1]["mean_return"] for run in runs.values())}
    result |= {"steps_per_second": tools.spread(run["steps_per_second"] for run in runs.values())}
    settings = {k: v for k, v in settings.items() if k not in ("log_dir", "seed")}
    return result | {"settings": settings, "runs": runs}


def plot(results: dict, path: Path):
    figure = Figure(figsize=(3.2 * len(results), 3.2), layout="constrained")
    for ax, (task, result) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        for seed, run in result["runs"].items():
            steps = [row["steps"] / 1000 for row in run["curve"]]
            ax.plot(steps, [row["mean_return"] for row in run["curve"]], label=f"seed {seed}")
        ax.axhline(SOLVED, color="black", linewidth=0.8)
        ax.set(xlabel="thousand steps", ylim=(0, 510))
        ax.set_title(NAMES[task], fontsize=9)
    figure.axes[0].set_ylabel("return, deterministic policy")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--checkpoint-interval", type=int, default=20, help="iterations; how finely time is resolved")
    parser.add_argument("--eval-episodes", type=int, default=100)
    args, flags = parser.parse_known_args()
    began, folder = time.time(), tools.new_folder(args, "isaac_small")
    results = {task: measure(task, folder, flags, args) for task in args.tasks}
    figures = {"criterion": f"mean return of at least {SOLVED} over {args.eval_episodes} deterministic episodes"}
    figures |= {"goals": {"cartpole_seconds": 30, "speed_steps_per_second": 10_000}, "tasks": results}
    num_envs = {task: result["settings"]["num_envs"] for task, result in results.items()}
    tools.write(args, "isaac_small", args.seeds, num_envs, began, figures)
    plot(results, args.out / "isaac_small.png")


if __name__ == "__main__":
    main()
