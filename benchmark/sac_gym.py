"""SAC's update code apart from robots: Gymnasium's tasks, beside published figures.

    python benchmark/sac_gym.py --games Pendulum-v1 --seeds 1 2 3
    python benchmark/sac_gym.py --games HalfCheetah-v4 --seeds 1 2 3       # about 3 hours per seed on one core

The settings are the script's preset for Gymnasium, which are CleanRL's; Pendulum, which is small, has four environments
and an update for each of their steps. Figures: the mean return of the last 20% of the training episodes, actions
sampled, which is near what CleanRL publishes, and that of the final deterministic policy, as Stable-Baselines3 does.
Unknown flags go to the script. Results of games that were not asked for stay in the file.
"""

import json
import time

import tools

SCRIPT = "sac_real2sim_mjx"
PENDULUM = ["--num-envs", 4, "--updates-per-step", 4, "--learning-starts", 1000, "--total-timesteps", 20_000]
GAMES = {"Pendulum-v1": PENDULUM, "HalfCheetah-v4": [], "Hopper-v4": [], "Walker2d-v4": []}
# Mean and standard deviation: CleanRL over 3 seeds of 1M steps, training returns; Stable-Baselines3 over episodes.
CLEANRL = {"HalfCheetah-v4": (9635, 1424), "Walker2d-v4": (3591, 911), "Hopper-v4": (2310, 342)}
SB3 = {"Pendulum-v1": (-157, 89)}
URLS = {
    "cleanrl": "https://docs.cleanrl.dev/rl-algorithms/sac/",
    "sb3": "https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/benchmark.md",
}


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--games", nargs="+", choices=list(GAMES), default=["Pendulum-v1"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args, flags = parser.parse_known_args()
    began, folder = time.time(), tools.new_folder(args, "sac_gym")
    file = args.out / "sac_gym.json"
    games = json.loads(file.read_text())["figures"]["games"] if file.exists() else {}
    for game in args.games:
        runs = games.setdefault(game, {"cleanrl": CLEANRL.get(game), "sb3": SB3.get(game), "runs": {}})["runs"]
        for seed in args.seeds:
            run_dir = folder / f"{game}_{seed}"
            command = ["--env-id", game, "--seed", seed, "--no-save-video", "--log-dir", run_dir, *GAMES[game], *flags]
            log = run_dir.with_suffix(".log")
            tools.finish(tools.start(f"{SCRIPT}.py", command, log), log)
            returns = tools.read_scalars(run_dir)["charts/episodic_return"]
            late = [value for step, value in returns if step > 0.8 * returns[-1][0]]
            summary = json.loads((run_dir / "summary.json").read_text())
            run = {name: summary[name] for name in ("mean_return", "return_ci95", "episodes", "global_step")}
            runs[str(seed)] = run | {"training_return": sum(late) / len(late), "minutes": summary["wall_seconds"] / 60}
            words = f"deterministic {run['mean_return']:.1f}, training {runs[str(seed)]['training_return']:.1f}"
            print(f"{game}, seed {seed}: {words}", flush=True)
            tools.write(args, "sac_gym", args.seeds, None, began, {"games": games, "published": URLS})


if __name__ == "__main__":
    main()
