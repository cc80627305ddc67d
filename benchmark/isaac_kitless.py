"""Isaac Lab 3.x without Isaac Sim on a CPU: ours against rsl_rl on the same task, in turn, with rsl_rl's own settings.

    python benchmark/isaac_kitless.py --seeds 1 2 3          # with the Python of Isaac Lab's environment, docs/isaac.md

Both train with the preset of the task, as many environments, steps and iterations; rsl_rl through Isaac Lab's wrapper
for it, without a writer. Speed: steps per second of whole training, imports and compilation of kernels left out (a
short run warms the cache). Then `evaluate` plays the deterministic policy, and actions drawn from a standard normal
distribution as the floor. Robots that were made from newton's examples (isaac_kitless_assets.py) are not the official
ones: compare the two sides with each other, not with published scores.
"""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rsl_rl_peer import runner_config

from common.envs.isaac import make_env
from common.envs.isaac_eval import evaluate
from common.files import write_json
from common.provenance import run_info

ROOT, EVAL_SEED = Path(__file__).resolve().parent.parent, 50_000


def train_ours(args, run_dir: Path) -> dict:
    command = [sys.executable, ROOT / "ppo_continuous_isaac.py", "--env-id", args.env_id, "--device", "cpu"]
    command += ["--num-envs", args.num_envs, "--num-iterations", args.iterations, "--seed", args.seed]
    command += ["--log-dir", run_dir, "--eval-episodes", args.num_envs, "--clip-actions", args.clip_actions]
    command += ["--checkpoint-interval", 10_000, "--no-save-video", "--eval-interval", args.eval_interval]
    with open(run_dir.with_suffix(".log"), "w") as log:
        subprocess.run(list(map(str, command)), check=True, stdout=log, stderr=subprocess.STDOUT)
    summary = json.loads((run_dir / "summary.json").read_text())
    between = {int(f.stem.split("_")[1]): json.loads(f.read_text()) for f in (run_dir / "eval").glob("model_*.json")}
    keys = ("mean_return", "mean_length")
    evaluations = [{"iteration": i} | {key: between[i][key] for key in keys} for i in sorted(between)]
    result = {key: summary[key] for key in ("SPS", "mean_return", "return_ci95", "mean_length", "global_step")}
    return result | {"evaluations": evaluations}


def train_rsl_rl(args) -> dict:
    """Runs in a process of its own, as each holds one simulation."""
    from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper
    from rsl_rl.runners import OnPolicyRunner
    from tensordict import TensorDict

    import ppo_continuous_isaac as ppo

    preset = ppo.Args(**ppo.PRESETS[ppo.default_preset(ppo.Args(env_id=args.env_id))])
    torch.manual_seed(args.seed)
    envs = make_env(args.env_id, args.num_envs, "cpu", args.seed, compute_final_obs=False)
    wrapper = RslRlVecEnvWrapper(envs.env, clip_actions=args.clip_actions or None)
    runner = OnPolicyRunner(wrapper, runner_config(preset, std_type="scalar"), log_dir=None, device="cpu")
    began = time.time()
    runner.learn(args.iterations, init_at_random_ep_len=True)
    steps = args.iterations * preset.num_steps * args.num_envs
    rate, policy = steps / (time.time() - began), runner.get_inference_policy("cpu")
    with torch.inference_mode():  # as `learn` was, whose tensors the simulator now holds
        result = evaluate(lambda obs: policy(TensorDict({"policy": obs}, [len(obs)])), envs, args.num_envs, EVAL_SEED)
    return {"SPS": rate, "global_step": steps} | {k: result[k] for k in ("mean_return", "return_ci95", "mean_length")}


def play_normal(args) -> dict:
    envs = make_env(args.env_id, args.num_envs, "cpu", args.seed, clip_actions=args.clip_actions)
    actions = envs.single_action_space.shape[0]
    result = evaluate(lambda obs: torch.randn(len(obs), actions), envs, args.num_envs, EVAL_SEED)
    return {k: result[k] for k in ("mean_return", "return_ci95", "mean_length")}


def in_a_process(side: str, args, seed: int, folder: Path) -> dict:
    path = folder / f"{side}_{seed}.json"
    command = [sys.executable, __file__, "--side", side, "--result", path, "--seed", seed, "--env-id", args.env_id]
    command += ["--num-envs", args.num_envs, "--iterations", args.iterations, "--clip-actions", args.clip_actions]
    with open(path.with_suffix(".log"), "w") as log:
        subprocess.run(list(map(str, command)), check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads(path.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-id", default="Isaac-Cartpole-Direct")
    parser.add_argument("--num-envs", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=75)
    parser.add_argument("--clip-actions", type=float, default=0.0)
    parser.add_argument("--eval-interval", type=int, default=0, help="ours: evaluate every so many iterations too")
    parser.add_argument("--no-peer", action="store_true", help="ours alone, where rsl_rl would take too long as well")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmark")
    for name in ("side", "result"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        write_json(args.result, {"rsl_rl": train_rsl_rl, "normal": play_normal}[args.side](args))
        return
    folder = args.runs.resolve() / f"isaac_kitless-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    floor = in_a_process("normal", args, args.seeds[0], folder)
    print(f"normal actions: {floor['mean_return']:.1f}", flush=True)
    sides = {"ours": []} if args.no_peer else {"ours": [], "rsl_rl": []}
    for seed in args.seeds:
        args.seed = seed
        sides["ours"].append(train_ours(args, folder / f"ours_{seed}"))
        if not args.no_peer:
            sides["rsl_rl"].append(in_a_process("rsl_rl", args, seed, folder))
        for side, rows in sides.items():
            print(f"seed {seed}, {side}: {rows[-1]['mean_return']:.1f}, {rows[-1]['SPS']:,.0f} steps/s", flush=True)
    info = run_info()
    for package in ("isaaclab", "newton", "warp-lang", "rsl-rl-lib", "mujoco"):
        try:
            info["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            info["versions"][package] = "not a package"
    content = {"benchmark": "isaac_kitless", "seeds": args.seeds, "date": time.strftime("%Y-%m-%d")} | info
    content |= {
        name: getattr(args, name) for name in ("env_id", "num_envs", "iterations", "clip_actions", "eval_interval")
    }
    content |= {"normal_actions": floor, "runs": sides}
    if not args.no_peer:
        ratios = [a["SPS"] / b["SPS"] for a, b in zip(*sides.values(), strict=True)]
        content |= {"speed_ratio": {"median": statistics.median(ratios), "values": ratios}}
    write_json(args.out / f"isaac_kitless_{args.env_id}.json", content)


if __name__ == "__main__":
    main()
