"""Our PPO against rsl_rl's on the very same Go2Env: training speed, and what the policies are worth at equal samples.

    python benchmark/go2_vs_rsl_rl.py --seeds 1 2 3

Both get the same flags: robots, steps, epochs, minibatches, network, precision, gamma, lambda, clipping, desired KL,
entropy, initial standard deviation, rewards; benchmark/rsl_rl_go2.py lists what stays different. Speed: whole training
(rollout, update, logging) in environment steps per second, the iterations up to --warm-up left out; in turn, each in a
process of its own, each with all cores in the way it uses them by default, which is two ranks on two cores for ours.
Both run with and without --compile, which is rsl_rl's torch_compile_mode. Quality: every policy is evaluated by our
`evaluate`. Flags this script does not know go to both sides.
"""

import importlib.metadata
import json
import time
from pathlib import Path

import tools
import torch

OURS, PEER = "ppo_go2_mujoco.py", "benchmark/rsl_rl_go2.py"


def train(script: str, run_dir: Path, flags: list) -> dict:
    """The run's summary."""
    flags = ["--preset", "laptop", "--log-dir", run_dir, *flags]
    if script == OURS:
        flags += ["--no-save-video"]
    log = run_dir.with_suffix(".log")
    tools.finish(tools.start(script, flags, log), log)
    return json.loads((run_dir / "summary.json").read_text())


def compare_speed(folder: Path, flags: list, precision: str, hidden: str, args) -> dict:
    flags = [*flags, "--precision", precision, "--hidden", *hidden.split(","), "--seed", 1]
    flags += ["--num-iterations", args.speed_iterations, "--checkpoint-interval", args.warm_up]
    flags += ["--log-interval", args.warm_up]
    sides = {"ours": (OURS, []), "rsl_rl": (PEER, [])}
    sides |= {"ours_compile": (OURS, ["--compile"]), "rsl_rl_compile": (PEER, ["--compile"])}
    rates = {side: [] for side in sides}
    for pair in range(args.pairs):
        for side, (script, extra) in sides.items():
            run_dir = folder / f"speed_{precision}_{hidden.replace(',', '_')}_{pair}_{side}"
            summary = train(script, run_dir, [*flags, *extra])
            warm_up_steps = args.warm_up * summary["global_step"] // args.speed_iterations
            ours = script == OURS
            rates[side].append(tools.logged_rate(run_dir, warm_up_steps) if ours else summary["SPS_after_warm_up"])
            print(f"{precision}, {hidden}, {side}: {rates[side][-1]:,.0f} steps/s", flush=True)
    ratios = {}
    for a, b in (("ours", "rsl_rl"), ("ours_compile", "rsl_rl"), ("ours_compile", "rsl_rl_compile")):
        ratios[f"{a} / {b}"] = tools.spread(x / y for x, y in zip(rates[a], rates[b], strict=True))
        print(f"{precision}, {hidden}: {a} {ratios[f'{a} / {b}']['median']:.2f} times {b}", flush=True)
    result = {"precision": precision, "hidden": hidden, "ratio": ratios}
    return result | {"steps_per_second": {side: tools.spread(values) for side, values in rates.items()}}


def compare_learning(folder: Path, flags: list, args) -> list[dict]:
    """One row per seed, side and checkpoint."""
    flags = [*flags, "--precision", args.quality_precision, "--hidden", *args.networks[0].split(",")]
    flags += ["--total-timesteps", args.samples, "--checkpoint-interval", args.eval_interval]
    rows = []
    for seed in args.seeds:
        for side, script in {"ours": OURS, "rsl_rl": PEER}.items():
            run_dir = folder / f"learning_{seed}_{side}"
            summary = train(script, run_dir, [*flags, "--seed", seed])
            saved = tools.checkpoints(run_dir)
            if side == "ours":
                cfg = tools.load_policy(saved[-1][1])[1]  # both train and are evaluated in this one
            for iteration, path in saved:
                policy = torch.jit.load(path) if script == PEER else tools.load_policy(path)[0]
                walk = tools.evaluate_walk(policy, cfg, episodes=args.eval_episodes)
                grid = tools.evaluate_grid(policy, cfg, episodes=args.eval_episodes)
                share = iteration / summary["iterations"]
                row = {"seed": seed, "side": side, "steps": round(share * summary["global_step"])}
                rows.append(row | {"seconds": share * summary["wall_seconds"], "walk": walk, "grid": grid})
                print(
                    f"seed {seed}, {side}, {row['steps']:,} steps: walking {walk['falls']} falls, "
                    f"{walk['lin_vel_error']:.3f} m/s; all commands {grid['falls']} falls, "
                    f"{grid['lin_vel_error']:.3f} m/s, {grid['yaw_rate_error']:.3f} rad/s",
                    flush=True,
                )
    return rows


def at_equal_samples(rows: list[dict]) -> list[dict]:
    """Medians over the seeds, per number of steps and side."""
    table = []
    for steps in sorted({row["steps"] for row in rows}):
        for side in dict.fromkeys(row["side"] for row in rows):
            chosen = [row for row in rows if (row["steps"], row["side"]) == (steps, side)]
            line = {"steps": steps, "side": side}
            for commands in ("walk", "grid"):
                for key in ("falls", "lin_vel_error", "yaw_rate_error"):
                    line[f"{commands}_{key}"] = tools.spread(row[commands][key] for row in chosen)
            table.append(line)
    return table


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the comparison of policies")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each side per speed comparison")
    parser.add_argument("--speed-iterations", type=int, default=40, help="iterations of such a run")
    parser.add_argument("--warm-up", type=int, default=10, help="of which so many are not timed")
    parser.add_argument("--networks", nargs="+", default=["256,128,64"], help="hidden layers; the first one learns")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], help="of the speed comparison")
    parser.add_argument("--quality-precision", default="float32")
    parser.add_argument("--samples", type=int, default=1_500_000, help="steps of the comparison of policies")
    parser.add_argument("--eval-interval", type=int, default=41, help="iterations between its evaluations")
    parser.add_argument("--eval-episodes", type=int, default=128)
    args, flags = parser.parse_known_args()
    began, folder = time.time(), tools.new_folder(args, "go2_vs_rsl_rl")
    speed = [compare_speed(folder, flags, p, net, args) for net in args.networks for p in args.precisions]
    rows = compare_learning(folder, flags, args)
    state = tools.load_policy(folder / f"learning_{args.seeds[0]}_ours" / "checkpoints" / "final_model.pt")[2]
    figures = {"speed": speed, "speed_goal": 1.2, "learning": at_equal_samples(rows), "learning_runs": rows}
    figures["settings"] = {k: v for k, v in state["args"].items() if k not in ("log_dir", "seed")}
    figures["differences"] = "listed at the top of benchmark/rsl_rl_go2.py"
    versions = {"rsl-rl-lib": importlib.metadata.version("rsl-rl-lib")}
    tools.write(args, "go2_vs_rsl_rl", args.seeds, state["args"]["num_envs"], began, figures, versions)


if __name__ == "__main__":
    main()
