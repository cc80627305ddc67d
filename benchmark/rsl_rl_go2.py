"""The peer: rsl_rl's PPO on the very same Go2Env, with the flags of ppo_go2_mujoco.py mapped to rsl_rl's own.

    python benchmark/rsl_rl_go2.py --seed 1 --num-iterations 120 --checkpoint-interval 40 --log-dir runs/peer

Leaves `checkpoints/model_{iteration}.pt` (TorchScript, raw observations to mean actions) and `summary.json`, whose
SPS_after_warm_up leaves out the iterations up to the first checkpoint, and with them compilation. One process, with
torch's default threads and physics on all cores. Its writer is off, which also spares it the episode statistics that
ours keeps. What stays different:

- half of our robots learn from the mirror image of their experience (--mirror); rsl_rl's own such option is off, as by
  default,
- its standard deviation is learned freely (ours too with --final-std 0 --min-std 0.01, else it falls to --final-std),
- a time limit is bootstrapped with V(s_t), ours with V(s_t+1) of the true last observation,
- torch's default initialisation, ours orthogonal of the same size, with small heads; Adam's epsilon 1e-8, ours 1e-5,
- gradients are clipped for actor and critic apart, ours together,
- normalised observations are not clipped, ours at 10,
- its mixed precision is bfloat16 autocast of the update alone; ours covers the rollout too.
"""

import time
from pathlib import Path

import rsl_rl_peer
import torch

import ppo_go2_mujoco as ppo
from common import cli, distributed
from common.envs.go2 import Go2Env
from common.files import write_json
from common.provenance import peak_memory_mb


def main():
    args = cli.parse_args(ppo.Args, ppo.PRESETS, default_preset="laptop")
    cli.check(args.desired_kl > 0, "--desired-kl got 0; the peer is run with its adaptive learning rate")
    cli.check(bool(args.log_dir), "--log-dir got ''; it takes a folder")
    if args.precision == "auto":
        args.precision = "bfloat16" if distributed.has_bfloat16("cpu") else "float32"
    run_dir = Path(args.log_dir)
    torch.manual_seed(args.seed)
    env = Go2Env(args.num_envs, "cpu", args.seed, args)
    obs, _ = env.reset(seed=args.seed, options={"random_phase": True})
    runner = rsl_rl_peer.make_runner(env, obs, args)
    iterations = -(-args.total_timesteps // (args.num_envs * args.num_steps)) or args.num_iterations
    done, seconds, warm_up = 0, 0.0, None
    while done < iterations:
        chunk = min(args.checkpoint_interval, iterations - done)
        began = time.time()
        runner.learn(chunk)
        seconds += time.time() - began
        done += chunk
        warm_up = warm_up or (done, seconds)
        runner.export_policy_to_jit(str(run_dir / "checkpoints"), f"model_{done}.pt")
        steps = done * args.num_envs * args.num_steps
        std = runner.alg.get_policy().output_std.mean().item()
        print(f"iteration {done}: {steps:,} steps, {steps / seconds:,.0f} per second, action std {std:.3f}", flush=True)
    finite = all(p.isfinite().all() for p in runner.alg.get_policy().parameters())
    summary = {"iterations": done, "global_step": steps, "wall_seconds": seconds, "SPS": steps / seconds}
    if done > warm_up[0]:
        summary["SPS_after_warm_up"] = (done - warm_up[0]) * args.num_envs * args.num_steps / (seconds - warm_up[1])
    summary |= {"torch_threads": torch.get_num_threads(), "finite": finite, "peak_memory_mb": peak_memory_mb()}
    write_json(run_dir / "summary.json", summary)


if __name__ == "__main__":
    main()
