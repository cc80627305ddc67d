"""How long the Go2 takes to learn to walk, from the start of the process, and what its final policy is worth.

    python benchmark/go2_time_to_walk.py --seeds 1 2 3

Trains one seed after the other. Afterwards every checkpoint is evaluated with the deterministic policy: 128 episodes
of 20 s at 8 forward velocities from 0.3 to 1.0 m/s. The time to walk is that of the first checkpoint without a fall
and with a mean velocity error below 0.15 m/s: the wall time from the start of the process, imports included, until
that checkpoint was on the disk. The final policy also starts --starts times, because its rare falls are right after the
spawn and too rare for a few hundred episodes. Flags this script does not know go to ppo_go2_mujoco.py.
"""

import time
from dataclasses import replace
from pathlib import Path

import tools
from matplotlib.figure import Figure

# The policy has seen none of these: finer physics with a solver that converges, and a disturbed, randomised robot.
CHECKS = {
    "nominal": {},
    "0.005 s x 4, newton": {"substeps": 4, "solver": "newton", "solver_iterations": 50},
    "0.002 s x 10, newton": {"substeps": 10, "solver": "newton", "solver_iterations": 50},
    "randomised": {"randomise": True},
}
START_SECONDS = 2.0  # once in its stride a trained robot does not fall; the rare falls are right after the spawn


def train(run_dir: Path, flags: list) -> list[tuple[int, Path, float]]:
    """[(iteration, checkpoint, seconds from the start of the process until it was on the disk)]."""
    log = run_dir.with_suffix(".log")
    start = time.time()
    tools.finish(tools.start("ppo_go2_mujoco.py", ["--log-dir", run_dir, "--no-save-video", *flags], log), log)
    # The rename that makes a checkpoint visible sets its ctime.
    return [(i, path, path.stat().st_ctime - start) for i, path in tools.checkpoints(run_dir)]


def learning_curve(saved: list, episodes: int, device: str = "cpu") -> list[dict]:
    curve = []
    for iteration, path, seconds in saved:
        agent, cfg, state = tools.load_policy(path)
        result = tools.evaluate_walk(agent.to(device), cfg, device, episodes)
        row = {"iteration": iteration, "steps": state["global_step"], "seconds": seconds}
        row |= {"seconds_training": state["elapsed"]}
        row |= {k: result[k] for k in ("walks", "falls", "episodes", "lin_vel_error", "yaw_rate_error", "mean_return")}
        curve.append(row)
        error = f"error {row['lin_vel_error']:.3f} m/s"
        print(f"  {row['steps']:>10,} steps {seconds:6.1f} s: {row['falls']:3d} of {row['episodes']} fell, {error}")
    return curve


def time_to_walk(curve: list[dict]) -> dict:
    """The first checkpoint that walks; `kept`: all later ones do too."""
    for i, row in enumerate(curve):
        if row["walks"]:
            later = [r["walks"] for r in curve[i:]]
            kept = {"kept": all(later), "later_checkpoints": len(later) - 1, "later_that_walk": sum(later) - 1}
            return {"seconds": row["seconds"], "steps": row["steps"]} | kept
    return {"seconds": None, "steps": None, "kept": False, "later_checkpoints": 0, "later_that_walk": 0}


def meets_goal(result: dict) -> bool:
    """The goal for the end of training: no fall, errors below 0.15 m/s and 0.2 rad/s, all four feet lift."""
    feet = min(result["foot_lift"]) >= 0.03 and all(0.4 <= duty <= 0.75 for duty in result["duty_factor"])
    return bool(result["falls"] == 0 and result["lin_vel_error"] < 0.15 and result["yaw_rate_error"] < 0.2 and feet)


def plot(runs: dict, path: Path):
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for seed, run in runs.items():
        seconds = [row["seconds"] for row in run["curve"]]
        (line,) = axes[0].plot(seconds, [row["falls"] / row["episodes"] for row in run["curve"]], label=f"seed {seed}")
        axes[1].plot(seconds, [row["lin_vel_error"] for row in run["curve"]], color=line.get_color())
        if run["walk"]["seconds"] is not None:
            for ax in axes:
                ax.axvline(run["walk"]["seconds"], color=line.get_color(), linestyle=":", linewidth=1)
    axes[1].axhline(tools.WALK_ERROR, color="black", linewidth=0.8)
    axes[0].set(xlabel="wall time from process start (s)", ylabel="share of episodes with a fall", ylim=(-0.02, 1.02))
    axes[1].set(xlabel="wall time from process start (s)", ylabel="velocity error (m/s)", ylim=(0, 0.6))
    axes[0].legend()
    figure.suptitle("Go2, deterministic policy, vx 0.3 to 1.0 m/s; dotted: walks")
    figure.savefig(path, dpi=110)


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--checkpoint-interval", type=int, default=10, help="iterations; how finely time is resolved")
    parser.add_argument("--eval-episodes", type=int, default=128)
    parser.add_argument("--starts", type=int, default=10_000, help="episodes of 2 s over all commands, after training")
    args, flags = parser.parse_known_args()
    began, folder = time.time(), tools.new_folder(args, "go2_time_to_walk")
    flags = ["--preset", args.preset, "--checkpoint-interval", args.checkpoint_interval, *flags]

    # All training first: an evaluation between two runs would warm or load the machine.
    saved = {}
    for seed in args.seeds:
        saved[seed] = train(folder / f"seed_{seed}", [*flags, "--seed", seed])
        print(f"seed {seed}: trained in {saved[seed][-1][2]:.1f} s")
    runs = {}
    for seed in args.seeds:
        print(f"seed {seed}")
        curve = learning_curve(saved[seed], args.eval_episodes)
        agent, cfg, state = tools.load_policy(saved[seed][-1][1])
        final = {}
        for name, changes in CHECKS.items():
            final[name] = tools.evaluate_grid(agent, replace(cfg, **changes), episodes=args.eval_episodes)
            final[name]["meets_goal"] = meets_goal(final[name])
            print(f"  {name}: {final[name]['falls']} falls, error {final[name]['lin_vel_error']:.3f} m/s")
        starts = tools.evaluate_grid(agent, replace(cfg, episode_seconds=START_SECONDS), episodes=args.starts)
        starts = {k: starts[k] for k in ("episodes", "falls", "fall_rate", "fall_ci95", "fallen_commands")}
        print(f"  {starts['falls']} falls in {starts['episodes']} starts")
        walk = time_to_walk(curve)
        print(f"  walks after {walk['seconds']} s, kept: {walk['kept']}")
        start_up = curve[0]["seconds"] - curve[0]["seconds_training"]
        runs[seed] = {"walk": walk, "start_up_seconds": start_up}
        runs[seed] |= {"final": final, "starts": starts, "curve": curve}

    walks = [run["walk"] for run in runs.values()]
    finals = {name: [run["final"][name] for run in runs.values()] for name in CHECKS}
    figures = {
        "criterion": f"0 falls in {args.eval_episodes} episodes of 20 s, velocity error < {tools.WALK_ERROR} m/s",
        "seconds_to_walk": tools.spread([walk["seconds"] for walk in walks]),
        "steps_to_walk": tools.spread([walk["steps"] for walk in walks]),
        "kept_by_all_later_checkpoints": [walk["kept"] for walk in walks],
        "seconds_of_training": tools.spread([run["curve"][-1]["seconds"] for run in runs.values()]),
        "falls_in_starts": tools.spread([run["starts"]["falls"] for run in runs.values()]),
        "starts": starts["episodes"],
        "final": {
            name: {key: tools.spread([r[key] for r in results]) for key in ("falls", "lin_vel_error", "yaw_rate_error")}
            | {"meets_goal": [r["meets_goal"] for r in results]}
            for name, results in finals.items()
        },
        "runs": runs,
    }
    settings = {k: v for k, v in state["args"].items() if k not in ("log_dir", "seed")}
    tools.write(args, "go2_time_to_walk", args.seeds, settings["num_envs"], began, figures | {"settings": settings})
    plot(runs, args.out / "go2_time_to_walk.png")


if __name__ == "__main__":
    main()
