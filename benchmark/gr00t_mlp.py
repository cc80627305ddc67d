"""`ppo_gr00t.py --policy mlp` against rsl_rl's PPO on the very same Pick-v0 from the state: speed of whole training.

    python benchmark/gr00t_mlp.py                                       # 6 minutes on two idle cores
    python benchmark/gr00t_mlp.py --peer --log-dir runs/peer --num-iterations 30 --warm-up 10  # one run of the peer

Rollout, update and logging in control steps per second, the iterations up to --warm-up left out; in turn, each in a
process of its own with all cores in the way it uses them by default: ours in two ranks on two cores, rsl_rl in one
process with torch's threads and physics on all cores, and once more with one thread of torch, of which the better one
counts. Both get the flags of the preset `mlp`; what they do not know goes to both. `ceiling` is the engine alone: the
same worlds stepped with recorded controls (see pick_env_speed.py). What stays different between the two stands at the
top of rsl_rl_go2.py, but for the mirror images and the standard deviation, which is free in both here.
"""

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

import pick_env_speed
import rsl_rl_peer
import tools
import torch

import ppo_gr00t as ppo
from common import cli
from common.distributed import num_cores
from common.envs.vla import make
from common.files import write_json

SIDES = ("ours", "rsl_rl", "rsl_rl_one_thread")


def train_peer(flags: list[str], warm_up: int):
    """One run of rsl_rl, which leaves `summary.json` in --log-dir."""
    args = cli.parse_args(ppo.Args, ppo.PRESETS, "mlp", argv=flags)
    torch.manual_seed(args.seed)
    env = make(args, args.num_envs, "cpu", args.seed)
    obs, _ = env.reset(seed=args.seed, options={"random_phase": True})
    rate = rsl_rl_peer.train(rsl_rl_peer.make_runner(env, obs, args), args.num_iterations, warm_up)
    write_json(Path(args.log_dir) / "summary.json", {"SPS": rate, "torch_threads": torch.get_num_threads()})


def measure(side: str, run_dir: Path, flags: list, warm_up: int) -> float:
    """Steps per second of one run."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": "1"} if side == "rsl_rl_one_thread" else {}
    flags, log = [*flags, "--log-dir", run_dir], run_dir.with_suffix(".log")
    if side == "ours":
        flags += ["--policy", "mlp", "--device", "cpu", "--no-save-video", "--eval-episodes", 1]
        flags += ["--eval-interval", 0, "--log-interval", warm_up, "--checkpoint-interval", 1_000_000]
        tools.finish(tools.start("ppo_gr00t.py", flags, log, env=environment), log)
        events = tools.read_scalars(run_dir)["charts/SPS"]
        return tools.logged_rate(run_dir, events[0][0])
    flags += ["--peer", "--warm-up", warm_up]
    tools.finish(tools.start("benchmark/gr00t_mlp.py", flags, log, env=environment), log)
    return json.loads((run_dir / "summary.json").read_text())["SPS"]


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--iterations", type=int, default=30, help="of each run; a multiple of --warm-up")
    parser.add_argument("--warm-up", type=int, default=10, help="iterations before the clock starts")
    parser.add_argument("--peer", action="store_true", help="train with rsl_rl, here, and no more")
    args, flags = parser.parse_known_args()
    if args.peer:
        train_peer(flags, args.warm_up)
        return
    if args.iterations % args.warm_up or args.iterations == args.warm_up:
        parser.error(f"--iterations got {args.iterations}; it takes a multiple of the {args.warm_up} of --warm-up")
    began, folder = time.time(), tools.new_folder(args, "gr00t_mlp")
    settings = cli.parse_args(ppo.Args, ppo.PRESETS, "mlp", argv=list(flags))
    rates = {side: [] for side in SIDES}
    for pair in range(args.pairs):
        for side in SIDES:
            run_flags = ["--num-iterations", args.iterations, "--seed", 1 + pair, *flags]
            rates[side].append(measure(side, folder / f"{side}_{pair}", run_flags, args.warm_up))
            print(f"{side}: {rates[side][-1]:,.0f} steps/s", flush=True)
    best = max(SIDES[1:], key=lambda side: tools.median(rates[side]))
    ratio = tools.spread(a / b for a, b in zip(rates["ours"], rates[best], strict=True))
    print(f"ours is {ratio['median']:.2f} times {best}", flush=True)
    ceiling = pick_env_speed.measure("state, difficulty 0", settings.num_envs, 3, 20_000, num_cores())
    print(f"the engine alone: {ceiling['physics_steps_per_second']['median']:,.0f} steps/s", flush=True)
    figures = {"goals": {"steps_per_second": 10_000, "ratio": 1.0}, "ratio": ratio, "best_peer": best}
    figures |= {"steps_per_second": {side: tools.spread(values) for side, values in rates.items()}}
    kept = ("num_envs", "num_steps", "num_minibatches", "update_epochs", "hidden", "difficulty", "reward")
    figures |= {"ceiling": ceiling, "settings": {name: getattr(settings, name) for name in kept}}
    versions = {"rsl-rl-lib": importlib.metadata.version("rsl-rl-lib")}
    tools.write(
        args, "gr00t_mlp", [1 + pair for pair in range(args.pairs)], settings.num_envs, began, figures, versions
    )


if __name__ == "__main__":
    sys.exit(main())
