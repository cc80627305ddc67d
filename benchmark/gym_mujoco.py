"""Learning curves of ppo_continuous_isaac.py on Gymnasium's MuJoCo games, beside CleanRL's published figures.

    python benchmark/gym_mujoco.py --seeds 1 2 3 --headline-seeds 1 2 3 4 5 --cleanrl ppo_continuous_action.py

Trains every game with every seed, each run on one core, `--workers` at once. With --cleanrl (a file of yours) CleanRL's
own script trains the three headline games with the same seeds, in turn with ours; isaac_peers.py lists the patches it
needs. All have the same number of steps and otherwise their own defaults.

Figures: the mean return of the last 100 training episodes, actions sampled, which is what CleanRL publishes (ours are
logged as means over about ten iterations, weighted by their episodes); over the seeds its interquartile mean, with a
bootstrapped 95% interval; and the return of the final deterministic policy.

May be stopped and started again: every finished run lies in `--runs`/gym_mujoco/*.json and is not repeated, and a run
of ours that was cut goes on from its last checkpoint. --report-only writes the result of what is finished so far.
"""

import ctypes
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import isaac_peers
import numpy as np
import tools
from matplotlib.figure import Figure

from common.files import write_json
from common.provenance import git_commit

# Pusher-v4 refuses MuJoCo 3, so it is v5, whose figures are no match for v4's.
GAMES = ["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4", "InvertedPendulum-v4", "Pusher-v5"]
HEADLINE = GAMES[:3]
# Mean and standard deviation over 3 seeds after 1M steps, and where they stand.
PUBLISHED_AT = "https://docs.cleanrl.dev/rl-algorithms/ppo/#ppo_continuous_actionpy"
PUBLISHED = {
    "HalfCheetah-v4": (1442.64, 46.03),
    "Walker2d-v4": (2287.95, 571.78),
    "Hopper-v4": (2382.86, 271.74),
    "InvertedPendulum-v4": (963.09, 22.20),
    "Humanoid-v4": (716.11, 49.08),
}
PUBLISHED_STEPS, LAST_EPISODES = 1_000_000, 100
BIN = 20_480  # steps per point of a curve; ours logs so often by default


class Job:
    """One training: a game, a seed, and whose."""

    def __init__(self, side: str, game: str, seed: int, script: Path | None, args, flags: list):
        self.side, self.game, self.seed, self.script = side, game, seed, script
        self.run_dir = args.runs.resolve() / "gym_mujoco" / f"{side}__{game}__{seed}"
        self.result, self.log = self.run_dir.with_suffix(".json"), self.run_dir.with_suffix(".log")
        self.steps, self.flags = args.total_timesteps, list(map(str, flags))

    def finished(self) -> dict | None:
        """What an earlier start of this benchmark has stored."""
        if not self.result.exists():
            return None
        stored = json.loads(self.result.read_text())
        if (stored["total_timesteps"], stored["flags"]) != (self.steps, self.flags):
            raise SystemExit(f"{self.result} is a run of other flags; remove it, or choose another folder by --runs")
        return stored

    def start(self) -> subprocess.Popen:
        flags = ["--env-id", self.game, "--seed", self.seed, "--total-timesteps", self.steps]
        # If this process dies, so does the run, which saves itself first.
        popen = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "preexec_fn": end_with_parent}
        if self.side == "cleanrl":
            shutil.rmtree(self.run_dir, ignore_errors=True)
            self.run_dir.mkdir(parents=True)
            return tools.start(self.script, [*flags, "--no-cuda"], self.log, cwd=self.run_dir, **popen)
        flags += ["--log-dir", self.run_dir, "--ranks", 1, "--device", "cpu", "--no-save-video", *self.flags]
        if tools.checkpoints(self.run_dir):
            flags += ["--resume", self.run_dir]
        else:
            shutil.rmtree(self.run_dir, ignore_errors=True)
        return tools.start("ppo_continuous_isaac.py", flags, self.log, **popen)

    def store(self) -> dict:
        """Writes the run's curve and figures; from then on it counts as finished."""
        folder = self.run_dir if self.side == "ours" else next(self.run_dir.glob("runs/*"))
        scalars = {name: sorted(dict(values).items()) for name, values in tools.read_scalars(folder).items()}
        if "charts/episodic_return" not in scalars:
            raise SystemExit(f"{folder}: no episode of {self.game} ended in {self.steps} steps; ask for more of them")
        returns, lengths = scalars["charts/episodic_return"], scalars["charts/episodic_length"]
        rows = [(step, value, length) for (step, value), (_, length) in zip(returns, lengths, strict=True)]
        content = {"side": self.side, "game": self.game, "seed": self.seed, "total_timesteps": self.steps}
        content |= {"flags": self.flags, "commit": git_commit(), "steps_per_second": scalars["charts/SPS"][-1][1]}
        if self.side == "ours":
            summary = json.loads((self.run_dir / "summary.json").read_text())
            steps = [0] + [step for step, *_ in rows]
            episodes = [(b - a) / row[2] for a, b, row in zip(steps, steps[1:], rows, strict=False)]
            content["curve"] = [[step, value] for step, value, _ in rows]
            content |= {"steps_per_second": summary["SPS"], "wall_seconds": summary["wall_seconds"]}
            keys = ("episodes", "mean_return", "return_ci95", "mean_length")
            content["evaluation"] = {key: summary[key] for key in keys}
        else:  # an entry per episode
            episodes = [1.0] * len(rows)
            content["curve"] = binned(rows)
        content["training_return"] = last_episodes([value for _, value, _ in rows], episodes)
        write_json(self.result, content)
        return content


def end_with_parent():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def binned(rows: list) -> list[list[float]]:
    """[[end of the bin, mean return of the episodes that ended in it]]."""
    bins = {}
    for step, value, _ in rows:
        bins.setdefault(math.ceil(step / BIN) * BIN, []).append(value)
    return [[step, float(np.mean(values))] for step, values in sorted(bins.items())]


def last_episodes(returns: list[float], episodes: list[float]) -> float:
    """Mean over the shortest tail of log entries that holds `LAST_EPISODES`."""
    total = count = 0.0
    for value, weight in zip(reversed(returns), reversed(episodes), strict=True):
        total, count = total + value * weight, count + weight
        if count >= LAST_EPISODES:
            break
    return total / count


def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile mean along the last axis: a quarter, rounded down, cut off at either end."""
    cut = values.shape[-1] // 4
    return np.sort(values, -1)[..., cut : values.shape[-1] - cut].mean(-1)


def over_seeds(values: list[float]) -> dict:
    resampled = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.percentile(iqm(resampled), [2.5, 97.5])
    result = {"iqm": float(iqm(np.array(values))), "ci95": [float(low), float(high)], "mean": float(np.mean(values))}
    return result | {"std": float(np.std(values)), "values": values}


def run_all(jobs: list[Job], workers: int) -> list[str]:
    """Runs what is not finished, and names what failed."""
    queue = [job for job in jobs if not job.finished()]
    running, failed, began = {}, [], {}
    print(f"{len(jobs) - len(queue)} of {len(jobs)} runs are finished", flush=True)
    try:
        while queue or running:
            while queue and len(running) < workers:
                job = queue.pop(0)
                running[job], began[job] = job.start(), time.time()
            for job, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                name = f"{job.side}, {job.game}, seed {job.seed}"
                if process.returncode or not is_whole(job):
                    print(f"{name}: ended with code {process.returncode}, see {job.log}", flush=True)
                    failed.append(name)
                    continue
                content = job.store()
                final = content.get("evaluation", {}).get("mean_return", math.nan)
                words = f"training return {content['training_return']:.1f}, deterministic {final:.1f}"
                print(f"{name}: {words}, {time.time() - began[job]:.0f} s, {len(queue)} to go", flush=True)
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return failed


def is_whole(job: Job) -> bool:
    """A run that was told to stop ends well, but leaves no summary."""
    return job.side == "cleanrl" or (job.run_dir / "summary.json").exists()


def report(stored: list[dict], games: list[str]) -> dict:
    table = {}
    for game in games:
        row = {"published": None}
        if game in PUBLISHED:
            mean, std = PUBLISHED[game]
            row["published"] = {"mean": mean, "std": std, "seeds": 3, "steps": PUBLISHED_STEPS, "url": PUBLISHED_AT}
        for side in ("ours", "cleanrl"):
            runs = [run for run in stored if (run["side"], run["game"]) == (side, game)]
            if not runs:
                continue
            row[side] = {"seeds": [run["seed"] for run in runs]}
            row[side]["training_return"] = over_seeds([run["training_return"] for run in runs])
            row[side]["steps_per_second"] = tools.spread(run["steps_per_second"] for run in runs)
            if side == "ours":
                row[side]["deterministic_return"] = over_seeds([run["evaluation"]["mean_return"] for run in runs])
        if "ours" in row:
            ours = row["ours"]["training_return"]["iqm"]
            comparable = row["published"] and stored[0]["total_timesteps"] == PUBLISHED_STEPS
            row["at_or_above_published"] = ours >= row["published"]["mean"] if comparable else None
            here = row.get("cleanrl")
            row["at_or_above_cleanrl_here"] = ours >= here["training_return"]["iqm"] if here else None
            table[game] = row
            against = [f"published {row['published']['mean']:.0f}"] if row["published"] else []
            against += [f"CleanRL here {here['training_return']['iqm']:.0f}"] if here else []
            low, high = row["ours"]["training_return"]["ci95"]
            print(f"{game}: {ours:.0f} [{low:.0f}, {high:.0f}], {', '.join(against) or 'nothing to compare with'}")
    return table


def plot(stored: list[dict], games: list[str], path: Path):
    columns = min(4, len(games))
    rows = math.ceil(len(games) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, game in zip(axes, games, strict=False):
        for side, color in (("ours", "tab:blue"), ("cleanrl", "tab:orange")):
            curves = [np.array(r["curve"]) for r in stored if (r["side"], r["game"]) == (side, game)]
            if not curves:
                continue
            last = max(curve[-1, 0] for curve in curves)
            steps = np.arange(min(BIN, last), last + 1, BIN)
            values = np.stack([np.interp(steps, *curve.T) for curve in curves])
            label = "ours" if side == "ours" else "CleanRL, run here"
            ax.plot(steps / 1e6, iqm(values.T), color=color, label=label)
            ax.fill_between(steps / 1e6, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
        if game in PUBLISHED:
            mean, std = PUBLISHED[game]
            ax.axhline(mean, color="black", linewidth=0.9, linestyle="--", label="CleanRL, published at 1M steps")
            ax.axhspan(mean - std, mean + std, color="black", alpha=0.08, linewidth=0)
        ax.set_title(game, fontsize=10)
        ax.set_xlabel("million steps", fontsize=9)
    for ax in axes[len(games) :]:
        ax.set_axis_off()
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, columns), frameon=False)
    figure.supylabel("return of training episodes", fontsize=10)
    figure.savefig(path, dpi=110)


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--games", nargs="+", default=GAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--headline-seeds", type=int, nargs="+", default=[], help=f"of {', '.join(HEADLINE)}")
    parser.add_argument("--total-timesteps", type=int, default=PUBLISHED_STEPS)
    parser.add_argument("--workers", type=int, default=2, help="runs at once, of one core each")
    parser.add_argument("--cleanrl", type=Path, help="CleanRL's ppo_continuous_action.py")
    parser.add_argument("--cleanrl-games", nargs="+", default=HEADLINE, help="games it trains, of --games")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    args, flags = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began, script, about = time.time(), None, None
    if args.cleanrl:
        script, about = isaac_peers.cleanrl_script(args.cleanrl, args.runs.resolve() / "gym_mujoco" / "cleanrl")

    seeds = {game: (game in HEADLINE and args.headline_seeds) or args.seeds for game in args.games}
    # Seed by seed, so that what is finished early is a little of everything.
    jobs, make = [], functools.partial(Job, script=script, args=args)
    for seed in sorted(set(sum(seeds.values(), []))):
        for game in (game for game in args.games if seed in seeds[game]):
            jobs.append(make("ours", game, seed, flags=flags))
            if script and game in args.cleanrl_games:
                jobs.append(make("cleanrl", game, seed, flags=[]))
    failed = [] if args.report_only else run_all(jobs, args.workers)

    stored = [content for job in jobs if (content := job.finished())]
    if not stored:
        raise SystemExit("no run is finished")
    games = [game for game in args.games if any(run["game"] == game for run in stored)]
    figures = {"games": report(stored, games), "missing": len(jobs) - len(stored), "cleanrl": about}
    figures["settings"] = {"total_timesteps": args.total_timesteps, "flags": flags, "ranks": 1}
    figures["note"] = "steps per second are of runs that share the machine, and minutes of the last start alone"
    figures["runs"] = stored
    num_envs = {"ours": flags[flags.index("--num-envs") + 1] if "--num-envs" in flags else 8, "cleanrl": 1}
    tools.write(args, "gym_mujoco", sorted({run["seed"] for run in stored}), num_envs, began, figures)
    plot(stored, games, args.out / "gym_mujoco.png")
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
