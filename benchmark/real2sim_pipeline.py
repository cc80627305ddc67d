"""The phases of the pipeline from scans to a policy that concern this repository, by their numbers.

    python -m benchmark.real2sim_pipeline 6                                   # the set-up of the environment
    python -m benchmark.real2sim_pipeline 6 scans/*.stl --engines mujoco      # of one's own scans, on one engine
    python -m benchmark.real2sim_pipeline 7 --objects box mug                 # the training

Phase 6 prepares every scan, says what was done, draws mesh and convex pieces, and steps every engine that is installed
in the environment, with its rate; its exit code is 0 if the default engine runs. Phase 7 is sac_real2sim_mjx.py, and
what follows the number are that script's flags. Phases 1 to 5 happen outside: taking the scans.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from common.distributed import num_cores
from common.envs.real2sim import Real2SimEnv
from common.meshes import EXAMPLES, picture, prepare

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("mujoco", "warp", "mjx")
STEPS = 10  # control steps that an engine is timed for


def set_up(arguments: list[str]) -> int:
    """Phase 6; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.real2sim_pipeline 6", allow_abbrev=False)
    parser.add_argument("scans", nargs="*", default=["box"], help=f"files, or {', '.join(EXAMPLES)}")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/real2sim_setup"), help="folder of the pictures")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for scan in args.scans:
            found = prepare(scan)
            path = args.out / f"{found.name}_hulls.png"
            picture(found, path)
            print(f"{scan}: drawn in {path}")
            print("\n".join(f"  {note}" for note in found.notes), flush=True)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    working = [engine for engine in args.engines if _steps(engine, args)]
    return 0 if args.engines[0] in working else 1


def _steps(engine: str, args) -> bool:
    """Whether `engine` runs the environment of the scans; prints its rate, or why it does not."""
    try:
        env = Real2SimEnv(
            args.num_envs, args.device, backend=engine, objects=tuple(args.scans), physics_threads=num_cores()
        )
        env.reset(seed=1)
        began = time.perf_counter()
        env.step(torch.zeros(args.num_envs, 9, device=env.device))
        first = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(STEPS):
            obs, *_ = env.step(torch.zeros(args.num_envs, 9, device=env.device))
        rate = args.num_envs * STEPS / (time.perf_counter() - began)
        if not obs.isfinite().all():
            raise ValueError("its observations are not finite")
    except (ValueError, ImportError) as error:
        print(f"{engine}: does not run: {error}")
        return False
    print(f"{engine}: {rate:.0f} control steps/s in {args.num_envs} worlds, the first in {first:.1f} s", flush=True)
    return True


def main(arguments: list[str]) -> int:
    phase, *rest = arguments or [""]
    if phase == "6":
        return set_up(rest)
    if phase == "7":
        return subprocess.call([sys.executable, str(ROOT / "sac_real2sim_mjx.py"), *rest])
    print("usage: python -m benchmark.real2sim_pipeline 6 [SCANS] | 7 [FLAGS OF sac_real2sim_mjx.py]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
