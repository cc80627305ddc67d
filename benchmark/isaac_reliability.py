"""ppo_continuous_isaac.py killed again and again by kill -9 and resumed, as go2_reliability.py does it with the Go2.

    python benchmark/isaac_reliability.py --kills 20

Flags this script does not know go to the training.
"""

import shutil
import time

import go2_reliability
import tools

SCRIPT, NUM_ENVS, NUM_STEPS = "ppo_continuous_isaac.py", 64, 32
SMALL = ["--env-id", "CartPole-v1", "--num-envs", NUM_ENVS, "--num-steps", NUM_STEPS, "--no-save-video"]
SMALL += ["--device", "cpu", "--eval-episodes", 16]


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest-wait", type=float, default=5.0, help="s between the first iteration and the kill")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    args, flags = parser.parse_known_args()
    began, folder = time.time(), tools.new_folder(args, "isaac_reliability")
    killed = folder, args.kills, args.longest_wait, args.seed, [*SMALL, *flags], SCRIPT, NUM_ENVS * NUM_STEPS
    figures, failures = go2_reliability.kill_and_resume(*killed)
    figures = {"failures": failures, "killed_and_resumed": figures}
    tools.write(args, "isaac_reliability", [1], NUM_ENVS, began, figures)
    if failures:
        raise SystemExit("\n".join(failures))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
