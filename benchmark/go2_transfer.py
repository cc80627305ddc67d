"""How the policy for the real robot fares on joints and physics that it was not trained with.

    python benchmark/go2_transfer.py --seeds 7                       # trains it first, with TRAINING's flags
    python benchmark/go2_transfer.py --model-path runs/.../checkpoints/final_model.pt
    python benchmark/go2_transfer.py --model-path runs/.../policy.onnx --xml-path another_go2.xml

Every combination of joint damping, dry friction, friction cone and physics: 0.002 s and Newton iterated until it
converges, as other simulators of the robot have it, and the coarse physics of training. The deterministic policy walks
for 20 s at each of 54 commands, vx -1 to 1.5 m/s with the trained vy and yaw rates. A fall is a roll or pitch beyond 30
degrees; the 10 degrees that end an episode in training are counted apart. Elliptic cones at 0.002 s have --impratio, by
default the 100 that mujoco_menagerie's models set. Flags this script does not know go to ppo_go2_mujoco.py.
"""

import itertools
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import tools
import torch

from common.envs.go2_eval import evaluate
from common.stats import wilson_ci95

TRAINING = "--observation proprioceptive --history 5 --randomise --command-vx -1 1.5 --observation-noise 0.5"
TRAINING += " --reward-weights lin_vel=4 --num-envs 1024 --num-iterations 600 --final-kl 0.01"
PHYSICS = {
    "0.002 s, newton": {"substeps": 10, "solver": "newton", "solver_iterations": 50},
    "training": {},
}
COMMAND_VX, COUNTS, FALL_DEGREES, RULE_DEGREES = (-1.0, 1.5), (6, 3, 3), 30.0, 10.0
GOAL_FALLS, GOAL_ERROR = 0.02, 0.15  # of the episodes, and m/s, on every combination
ONE, ZERO = (1.0, 1.0), (0.0, 0.0)
# A randomised robot with nothing at random, so that its joints can be set.
STILL = {"randomise": True, "mass_range": ONE, "payload_range": ZERO, "strength_range": ONE, "gain_range": ONE}
STILL |= {"latency_range": (0, 0), "push_interval": math.inf, "observation_noise": 0.0}
STILL |= {"friction_range": (0.8, 0.8), "armature_range": (0.02, 0.02)}  # common/assets/go2.xml's own


def load(path: Path):
    """(policy, its settings, what its training reported) of a checkpoint, or of a policy.onnx, in a run's folder."""
    run_dir = path.parent if path.suffix == ".onnx" else path.parents[1]
    summary = run_dir / "summary.json"
    summary = json.loads(summary.read_text()) if summary.is_file() else {}
    if path.suffix != ".onnx":
        return *tools.load_policy(path)[:2], summary
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    cfg = tools.load_policy(run_dir / "checkpoints" / "final_model.pt")[1]
    return lambda obs: torch.from_numpy(session.run(None, {"obs": obs.numpy()})[0]), cfg, summary


def measure(policy, cfg, physics: str, cone: str, damping: float, dry: float, args) -> dict:
    changes = STILL | PHYSICS[physics] | {"cone": cone, "command_vx": COMMAND_VX, "termination_degrees": FALL_DEGREES}
    changes |= {"damping_range": (damping, damping), "frictionloss_range": (dry, dry)}
    if cone == "elliptic" and physics != "training":
        changes["impratio"] = args.impratio
    if args.xml_path:
        changes["xml_path"] = str(args.xml_path)
    result = evaluate(policy, replace(cfg, **changes), "cpu", args.eval_episodes, tools.EVAL_SEED, COUNTS)
    grid = result["grid"]
    beyond = int(np.sum(np.array(grid["max_tilt"]) > RULE_DEGREES))
    row = {"physics": physics, "cone": cone, "damping": damping, "frictionloss": dry}
    row |= {key: result[key] for key in ("episodes", "falls", "fall_rate", "fall_ci95")}
    row |= {"beyond_10_degrees": beyond, "beyond_10_degrees_ci95": list(wilson_ci95(beyond, result["episodes"]))}
    for key in ("lin_vel_error", "yaw_rate_error"):
        row |= {key: result[key], f"{key}_ci95": result[f"{key}_ci95"]}
    row["fallen_commands"] = [c for c, fell in zip(grid["command"], grid["fallen"], strict=True) if fell]
    row["meets_goal"] = row["fall_rate"] <= GOAL_FALLS and row["lin_vel_error"] <= GOAL_ERROR
    print(
        f"{physics}, {cone}, damping {damping:g}, dry friction {dry:g}: {row['falls']} of {row['episodes']} fell, "
        f"{beyond} beyond 10 degrees, {row['lin_vel_error']:.3f} m/s, {row['yaw_rate_error']:.3f} rad/s",
        flush=True,
    )
    return row


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7])
    parser.add_argument("--model-path", type=Path, help="evaluate this checkpoint or policy.onnx, and train none")
    parser.add_argument("--xml-path", type=Path, help="another MJCF of the robot to evaluate on")
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.1, 0.5, 2.0], help="Nm s/rad")
    parser.add_argument("--frictions", type=float, nargs="+", default=[0.0, 0.2, 1.0], help="dry friction, Nm")
    parser.add_argument("--cones", nargs="+", choices=["pyramidal", "elliptic"], default=["pyramidal", "elliptic"])
    parser.add_argument("--impratio", type=float, default=100.0, help="of elliptic cones at 0.002 s")
    parser.add_argument("--physics", nargs="+", choices=list(PHYSICS), default=list(PHYSICS))
    parser.add_argument("--eval-episodes", type=int, default=108)
    args, flags = parser.parse_known_args()
    began, policies = time.time(), {}
    if args.model_path:
        policies[str(args.model_path.name)] = args.model_path
    else:
        folder = tools.new_folder(args, "go2_transfer")
        for seed in args.seeds:
            run_dir = folder / f"seed_{seed}"
            command = ["--preset", "laptop", "--seed", seed, "--log-dir", run_dir, "--no-save-video"]
            command += [*TRAINING.split(), *flags]
            log = run_dir.with_suffix(".log")
            tools.finish(tools.start("ppo_go2_mujoco.py", command, log), log)
            policies[f"seed {seed}"] = run_dir / "checkpoints" / "final_model.pt"
    runs = {}
    for name, path in policies.items():
        print(name)
        policy, cfg, summary = load(path)
        combinations = itertools.product(args.physics, args.cones, args.dampings, args.frictions)
        rows = [measure(policy, cfg, *combination, args) for combination in combinations]
        worst = {key: max(row[key] for row in rows) for key in ("fall_rate", "lin_vel_error", "yaw_rate_error")}
        met = sum(row["meets_goal"] for row in rows)
        runs[name] = {"met": met, "combinations": len(rows), "worst": worst, "training": summary, "rows": rows}
        print(f"{name}: {met} of {len(rows)} meet the goal; worst {worst}")
    figures = {"goal": f"falls at most {GOAL_FALLS:.0%}, velocity error at most {GOAL_ERROR} m/s", "runs": runs}
    figures["settings"] = {k: v for k, v in asdict(cfg).items() if k not in ("log_dir", "seed", "resume")}
    tools.write(args, "go2_transfer", args.seeds, cfg.num_envs, began, figures)


if __name__ == "__main__":
    main()
