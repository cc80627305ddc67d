"""The preset `reference` on a CPU for as long as one can wait: its learning curve and its deterministic policy.

    python benchmark/go2_reference.py --minutes 60

The preset is the settings of Genesis' Go2 example, made for a GPU: 4096 robots, 10,000 iterations. Here it is stopped
after `--minutes` (or `--iterations`), and some of its checkpoints are evaluated with the deterministic policy over the
whole grid of commands, which is a harder test than the training's own figures. Unknown flags go to the training.
"""

import time
from pathlib import Path

import tools
from matplotlib.figure import Figure

TRAINING = {  # names in the training's log
    "episodic_length": "charts/episodic_length",
    "lin_vel_error": "env/lin_vel_error",
    "action_std": "charts/action_std",
}


def train(run_dir: Path, flags: list, minutes: float):
    log = run_dir.with_suffix(".log")
    flags = ["--preset", "reference", "--device", "cpu", "--no-save-video", "--log-dir", run_dir, *flags]
    process = tools.start("ppo_go2_mujoco.py", flags, log)
    deadline = time.time() + 60 * minutes
    while process.poll() is None and time.time() < deadline:
        time.sleep(0.5)
    if process.poll() is None:
        process.terminate()  # it finishes its iteration, saves and leaves
    tools.finish(process, log)


def training_curve(run_dir: Path, points: int = 100) -> list[dict]:
    """At most about `points` rows of what the training logged, with its stochastic policy."""
    scalars = tools.read_scalars(run_dir)
    by_step = {name: dict(scalars.get(tag, [])) for name, tag in TRAINING.items()}
    elapsed = scalars["charts/elapsed"]
    every = max(1, len(elapsed) // points)
    rows = []
    for step, seconds in elapsed[every - 1 :: every]:
        rows.append({"steps": step, "seconds": seconds} | {name: by_step[name].get(step) for name in TRAINING})
    return rows


def evaluate(run_dir: Path, evaluations: int, episodes: int) -> list[dict]:
    saved = tools.checkpoints(run_dir)
    last = len(saved) - 1
    chosen = sorted({round(i * last / max(1, evaluations - 1)) for i in range(evaluations)} | {last})
    rows = []
    for iteration, path in [saved[i] for i in chosen]:
        agent, cfg, state = tools.load_policy(path)
        row = {"iteration": iteration, "steps": state["global_step"], "seconds": state["elapsed"]}
        row |= {"walk": tools.evaluate_walk(agent, cfg, episodes=episodes)}
        rows.append(row | {"grid": tools.evaluate_grid(agent, cfg, episodes=episodes)})
        walk, grid = row["walk"], rows[-1]["grid"]
        print(
            f"iteration {iteration}, {row['steps']:,} steps: walking {walk['falls']} of {walk['episodes']} fell, "
            f"{walk['lin_vel_error']:.3f} m/s; all commands {grid['falls']} of {grid['episodes']} fell, "
            f"{grid['lin_vel_error']:.3f} m/s, {grid['yaw_rate_error']:.3f} rad/s",
            flush=True,
        )
    return rows


def plot(runs: dict, path: Path):
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (seed, run) in enumerate(runs.items()):
        training, steps = run["training"], [row["steps"] / 1e6 for row in run["deterministic"]]
        logged = [row for row in training if row["lin_vel_error"] is not None]
        fell = [row["grid"]["fall_rate"] for row in run["deterministic"]]
        error = [row["grid"]["lin_vel_error"] for row in run["deterministic"]]
        left.plot(steps, fell, "o-", color=f"C{i}", label=f"seed {seed}, deterministic, all commands")
        right.plot(steps, error, "o-", color=f"C{i}", label=f"seed {seed}, deterministic, all commands")
        x, y = [row["steps"] / 1e6 for row in logged], [row["lin_vel_error"] for row in logged]
        right.plot(x, y, color=f"C{i}", linewidth=1, label=f"seed {seed}, in training")
    left.set(xlabel="million steps", ylabel="share of episodes with a fall", ylim=(-0.02, 1.02))
    right.set(xlabel="million steps", ylabel="velocity error (m/s)", ylim=(0, None))
    left.legend(), right.legend()
    figure.suptitle("Go2, preset reference on a CPU")
    figure.savefig(path, dpi=110)


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--minutes", type=float, default=60.0, help="of training per seed")
    parser.add_argument("--iterations", type=int, default=10_000, help="end earlier, after these")
    parser.add_argument("--checkpoint-interval", type=int, default=10, help="iterations; the preset's own is 100")
    parser.add_argument("--evaluations", type=int, default=8, help="checkpoints to evaluate per seed")
    parser.add_argument("--eval-episodes", type=int, default=128)
    args, flags = parser.parse_known_args()
    began, folder, runs = time.time(), tools.new_folder(args, "go2_reference"), {}
    flags = ["--num-iterations", args.iterations, "--checkpoint-interval", args.checkpoint_interval, *flags]
    for seed in args.seeds:
        run_dir = folder / f"seed_{seed}"
        train(run_dir, [*flags, "--seed", seed], args.minutes)
        state = tools.load_policy(tools.checkpoints(run_dir)[-1][1])[2]
        run = {"iterations": state["iteration"], "steps": state["global_step"], "seconds": state["elapsed"]}
        run |= {"steps_per_second": state["global_step"] / state["elapsed"], "training": training_curve(run_dir)}
        runs[seed] = run | {"deterministic": evaluate(run_dir, args.evaluations, args.eval_episodes)}
    settings = {k: v for k, v in state["args"].items() if k not in ("log_dir", "seed")}
    finals = [run["deterministic"][-1] for run in runs.values()]
    figures = {
        f"final_{commands}": {
            key: tools.spread(final[commands][key] for final in finals)
            for key in ("falls", "episodes", "lin_vel_error", "yaw_rate_error")
        }
        for commands in ("walk", "grid")
    }
    figures |= {"iterations_of_the_preset": 10_000, "runs": runs, "settings": settings}
    tools.write(args, "go2_reference", args.seeds, settings["num_envs"], began, figures)
    plot(runs, args.out / "go2_reference.png")


if __name__ == "__main__":
    main()
