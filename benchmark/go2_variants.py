"""What the other modes learn with the laptop preset: five commands with jumps, and what a real robot can sense.

    python benchmark/go2_variants.py --seeds 1

Each variant is trained with its flags and evaluated with the deterministic policy on fresh seeds, over the command grid
and, where it has them, over jumps. Flags this script does not know go to ppo_go2_mujoco.py.
"""

import json
import time

import tools

VARIANTS = {
    # Jumps need large actions, so the noise that finds them has to last longer; and they go on growing for long.
    "full commands": ["--commands", "full", "--std-anneal-steps", 3_000_000, "--num-iterations", 1000],
    "real robot": ["--observation", "proprioceptive", "--history", 5, "--randomise", "--num-iterations", 640],
}


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args, flags = parser.parse_known_args()
    began, folder = time.time(), tools.new_folder(args, "go2_variants")
    runs = {}
    for variant in args.variants:
        for seed in args.seeds:
            run_dir = folder / f"{variant.replace(' ', '_')}_{seed}"
            command = ["--preset", "laptop", "--seed", seed, "--log-dir", run_dir, *VARIANTS[variant], *flags]
            log = run_dir.with_suffix(".log")
            tools.finish(tools.start("ppo_go2_mujoco.py", command, log), log)
            result = json.loads((run_dir / "summary.json").read_text())
            runs.setdefault(variant, {})[seed] = {"flags": VARIANTS[variant], "summary": result}
            jumps = f", jumps {result['jump_success_rate']:.2f}" if "jump_success_rate" in result else ""
            print(f"{variant}, seed {seed}: {result['falls']} of {result['episodes']} fell, ", end="")
            print(f"error {result['lin_vel_error']:.3f} m/s{jumps}", flush=True)
    tools.write(args, "go2_variants", args.seeds, 512, began, {"runs": runs})


if __name__ == "__main__":
    main()
