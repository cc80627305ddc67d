"""Steps per second of whole training, ours against CleanRL, Stable-Baselines3 and rsl_rl, at the same settings.

    python benchmark/isaac_speed.py --cleanrl ppo_continuous_action.py --sb3 FOLDER

Rollout, update and logging of PPO on a Gymnasium MuJoCo task: batches of 2048 steps, 32 minibatches, 10 epochs, two
networks of 64-64 tanh, float32, value clipping, observations and (not rsl_rl) rewards normalised; isaac_peers.py
lists what stays different. Each run is a process of its own, all in turn, `--pairs` times. The clock runs from the end
of iteration `--warm-up` to the end of the last one, so imports, compilation and the final evaluation are left out. Ours
and CleanRL's are read from the wall times of their TensorBoard entries; the other two are timed in isaac_peers.py.

Every peer runs as it does by default and with one thread (OMP_NUM_THREADS=1), Stable-Baselines3 also with environments
in subprocesses; the variant with the better median is the one that ours is compared with. Ours runs as by default, with
--compile, and with two ranks. CleanRL's script is a file of yours, as is the folder of
`pip install --no-deps --target FOLDER stable-baselines3==2.9.2 cloudpickle`, where it is not installed. A peer that is
not there is left out.
"""

import importlib.metadata
import json
import os
import time
from pathlib import Path

import isaac_peers
import tools

BATCH_SIZE = 2048
OURS = {"ours": [], "ours_compile": ["--compile"], "ours_two_ranks": ["--ranks", 2]}
PEERS = {
    "cleanrl": ["cleanrl", "cleanrl_one_thread"],
    "sb3": ["sb3", "sb3_one_thread", "sb3_subprocesses"],
    "rsl_rl": ["rsl_rl", "rsl_rl_one_thread"],
}


def measure(side: str, num_envs: int, run_dir: Path, script: Path | None, args) -> float:
    """Steps per second of one run."""
    log, one_thread = run_dir.with_suffix(".log"), side.endswith(("one_thread", "subprocesses"))
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    popen = {"env": environment | ({"OMP_NUM_THREADS": "1"} if one_thread else {})}
    flags = ["--env-id", args.env_id, "--seed", 1, "--num-envs", num_envs, "--num-steps", BATCH_SIZE // num_envs]
    run_dir.mkdir(parents=True)
    if side in OURS:
        flags += ["--total-timesteps", args.iterations * BATCH_SIZE, "--preset", "mujoco", "--clip-vloss"]
        flags += ["--log-interval", args.warm_up, "--checkpoint-interval", args.iterations, "--log-dir", run_dir]
        flags += ["--init-std", 1, "--eval-episodes", 1, "--no-save-video", "--device", "cpu", *OURS[side]]
        tools.finish(tools.start("ppo_continuous_isaac.py", flags, log, **popen), log)
        return tools.logged_rate(run_dir, args.warm_up * BATCH_SIZE)
    if side.startswith("cleanrl"):
        flags += ["--total-timesteps", args.iterations * BATCH_SIZE, "--no-cuda"]
        tools.finish(tools.start(script, flags, log, cwd=run_dir, **popen), log)
        return tools.logged_rate(next(run_dir.glob("runs/*")), args.warm_up * BATCH_SIZE)
    flags += ["--iterations", args.iterations, "--warm-up", args.warm_up, "--log-dir", run_dir]
    flags += ["--subprocesses"] if side == "sb3_subprocesses" else []
    flags += ["--sb3", args.sb3.resolve()] if side.startswith("sb3") and args.sb3 else []
    peer = "sb3" if side.startswith("sb3") else "rsl_rl"
    tools.finish(tools.start("benchmark/isaac_peers.py", [peer, *flags], log, **popen), log)
    return json.loads((run_dir / "summary.json").read_text())["SPS"]


def compare(num_envs: int, folder: Path, script: Path | None, args) -> dict:
    # With one environment there is nothing for two processes to do in parallel.
    alone = ("ours_two_ranks", "sb3_subprocesses") if num_envs == 1 else ()
    sides = [side for side in [*OURS, *sum(PEERS.values(), [])] if side not in alone]
    sides = [side for side in sides if not args.sides or side in args.sides]
    missing = [] if script else ["cleanrl"]
    missing += ["sb3"] if sb3_version(args.sb3) == "none" else []
    sides = [side for side in sides if side.partition("_")[0] not in missing]
    rates = {side: [] for side in sides}
    for pair in range(args.pairs):
        for side in sides:
            rates[side].append(measure(side, num_envs, folder / f"{num_envs}_{side}_{pair}", script, args))
            print(f"{num_envs} environments, {side}: {rates[side][-1]:,.0f} steps/s", flush=True)
    best = {}
    for peer, variants in PEERS.items():
        if measured := [side for side in variants if side in rates]:
            best[peer] = max(measured, key=lambda side: tools.median(rates[side]))
    ratios = {}
    for side in (side for side in OURS if side in rates):
        ratios[side] = {
            peer: tools.spread(a / b for a, b in zip(rates[side], rates[variant], strict=True))
            for peer, variant in best.items()
        }
        words = [f"{ratio['median']:.2f} times {best[peer]}" for peer, ratio in ratios[side].items()]
        print(f"{num_envs} environments: {side} is {', '.join(words)}", flush=True)
    result = {"num_envs": num_envs, "num_steps": BATCH_SIZE // num_envs, "best_variant": best, "ratio": ratios}
    return result | {"steps_per_second": {side: tools.spread(values) for side, values in rates.items()}}


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--cleanrl", type=Path, help="CleanRL's ppo_continuous_action.py")
    parser.add_argument("--sb3", type=Path, help="folder of `pip install --target`, if it is not installed")
    parser.add_argument("--env-id", default="HalfCheetah-v4")
    parser.add_argument("--num-envs", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--iterations", type=int, default=30, help="of 2048 steps per run; a multiple of --warm-up")
    parser.add_argument("--warm-up", type=int, default=10, help="iterations before the clock starts")
    parser.add_argument(
        "--sides", nargs="+", default=[], help="only these, of " + ", ".join([*OURS, *sum(PEERS.values(), [])])
    )
    args = parser.parse_args()
    if args.iterations % args.warm_up or args.iterations == args.warm_up:
        parser.error(f"--iterations got {args.iterations}; it takes a multiple of the {args.warm_up} of --warm-up")
    began, folder = time.time(), tools.new_folder(args, "isaac_speed")
    script, about = isaac_peers.cleanrl_script(args.cleanrl, folder / "cleanrl") if args.cleanrl else (None, None)
    rows = [compare(num_envs, folder, script, args) for num_envs in args.num_envs]
    figures = {"rows": rows, "goals": {"cleanrl": 3.0, "best of the others": 1.2}, "cleanrl": about}
    figures["settings"] = {"env_id": args.env_id, "batch_size": BATCH_SIZE, "minibatches": isaac_peers.MINIBATCHES}
    figures["settings"] |= {"epochs": isaac_peers.EPOCHS, "hidden": isaac_peers.HIDDEN, "precision": "float32"}
    figures["settings"] |= {"iterations": args.iterations, "warm_up_iterations": args.warm_up}
    figures["differences"] = "listed at the top of benchmark/isaac_peers.py"
    versions = {"rsl-rl-lib": importlib.metadata.version("rsl-rl-lib"), "stable-baselines3": sb3_version(args.sb3)}
    tools.write(args, "isaac_speed", [1], args.num_envs, began, figures, versions)


def sb3_version(folder: Path | None) -> str:
    where = {"path": [str(folder)]} if folder else {}
    found = list(importlib.metadata.distributions(name="stable-baselines3", **where))
    return found[0].version if found else "none"


if __name__ == "__main__":
    main()
