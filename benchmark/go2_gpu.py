"""The Go2 on a CUDA device with MuJoCo Warp: steps per second, minutes until it walks, memory.

    python benchmark/go2_gpu.py --seeds 1 2 3

For each number of robots: the environment alone, the rollout with the policy's inference, and whole training by
ppo_go2_mujoco.py, warm (the first log intervals, in which kernels are compiled and graphs captured, are left out).
Memory is what the device has in use during training less what was in use before. The time to walk is measured as in
go2_time_to_walk.py, from the start of the process, compilation included. Unknown flags go to the training. Without a
CUDA device it says so and exits with code 2.
"""

import subprocess
import time
from pathlib import Path

import go2_time_to_walk
import tools
import torch

from common import cli
from common.cuda_graph import CudaGraph
from common.envs.go2 import Go2Env

ppo = tools.ppo


def rate(step, num_envs: int, num_steps: int, repeats: int, wait) -> dict:
    """Robot steps per second of `step(i)`, called `num_steps` times in each of `repeats` measurements."""
    rates = []
    for _ in range(repeats + 1):
        wait()
        began = time.perf_counter()
        for i in range(num_steps):
            step(i)
        wait()
        rates.append(num_envs * num_steps / (time.perf_counter() - began))
    return tools.spread(rates[1:])  # the first one compiles and captures


@torch.no_grad()
def measure_rollout(args: ppo.Args, device: str, num_steps: int, repeats: int, wait) -> dict:
    """The environment alone, and with the policy of `args`."""
    env = Go2Env(args.num_envs, device, 1, args)
    next_obs, _ = env.reset(seed=1, options={"random_phase": True})
    actions = 0.3 * torch.randn(16, args.num_envs, 12, device=device)
    alone = rate(lambda i: env.step(actions[i % 16]), args.num_envs, num_steps, repeats, wait)
    agent = ppo.Agent(env, args).to(device)

    def policy(obs):
        return agent.sample(agent.get_dist(agent.normalise(obs)))

    policy = CudaGraph(policy) if args.cuda_graphs else policy

    def step(i):
        nonlocal next_obs
        next_obs = env.step(policy(next_obs))[0]

    return {"env": alone, "env_and_policy": rate(step, args.num_envs, num_steps, repeats, wait)}


def used_mb() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def measure_training(run_dir: Path, flags: list, iterations: int) -> dict:
    log, before, peak = run_dir.with_suffix(".log"), used_mb(), 0.0
    flags = [*flags, "--log-dir", run_dir, "--no-save-video", "--num-iterations", iterations, "--log-interval", 5]
    process = tools.start("ppo_go2_mujoco.py", flags, log)
    while process.poll() is None:
        peak = max(peak, used_mb())
        time.sleep(0.1)
    tools.finish(process, log)
    rates = [value for _, value in tools.read_scalars(run_dir)["charts/SPS"]]
    return {"training": tools.spread(rates[2:]), "peak_memory_mb": peak - before}


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--num-envs", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--num-steps", type=int, default=200, help="control steps per measurement")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--train-iterations", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="of the time to walk")
    parser.add_argument("--walk-preset", default="reference")
    parser.add_argument("--walk-num-envs", type=int, default=4096)
    parser.add_argument("--walk-iterations", type=int, default=400)
    parser.add_argument("--device", default="cuda")
    args, flags = parser.parse_known_args()
    cli.check(torch.cuda.is_available(), f"--device got {args.device!r}, but there is no CUDA device to measure on")
    began, folder = time.time(), tools.new_folder(args, "go2_gpu")
    torch.set_float32_matmul_precision("high")  # as in training
    flags = ["--device", args.device, *flags]

    cases = []
    for num_envs in args.num_envs:
        wanted = ["--preset", "reference", "--num-envs", num_envs, *flags]
        settings = cli.parse_args(ppo.Args, ppo.PRESETS, argv=[str(word) for word in wanted])
        settings.precision = "bfloat16" if settings.precision == "auto" else settings.precision
        torch.cuda.empty_cache()
        case = {"num_envs": num_envs}
        case |= measure_rollout(settings, args.device, args.num_steps, args.repeats, torch.cuda.synchronize)
        torch.cuda.empty_cache()
        case |= measure_training(folder / f"speed_{num_envs}", wanted, args.train_iterations)
        cases.append(case)
        medians = {k: f"{case[k]['median']:,.0f}" for k in ("env", "env_and_policy", "training")}
        print(f"{num_envs} robots, steps per second: {medians}; {case['peak_memory_mb']:,.0f} MiB", flush=True)

    runs = {}
    for seed in args.seeds:
        walk_flags = ["--preset", args.walk_preset, "--num-envs", args.walk_num_envs, "--seed", seed]
        walk_flags += ["--num-iterations", args.walk_iterations, "--checkpoint-interval", 10, *flags]
        saved = go2_time_to_walk.train(folder / f"seed_{seed}", walk_flags)
        curve = go2_time_to_walk.learning_curve(saved, 128, args.device)
        runs[seed] = {"walk": go2_time_to_walk.time_to_walk(curve), "curve": curve}
        print(f"seed {seed} walks after {runs[seed]['walk']['seconds']} s", flush=True)

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    figures = {
        "backend": "warp",
        "training_flags": " ".join(map(str, flags)),
        "steps_per_second": cases,
        "highest_training_rate": max((case["training"]["median"] for case in cases), default=None),
        "goal": "500,000 steps per second at 4096 robots or more, walking in under 60 s",
        "seconds_to_walk": tools.spread(run["walk"]["seconds"] for run in runs.values()) if runs else None,
        "time_to_walk": runs,
    }
    versions = {"cuda": torch.version.cuda, "driver": driver.stdout.strip().splitlines()[0] if driver.stdout else ""}
    tools.write(args, "go2_gpu", args.seeds, args.num_envs, began, figures, versions)


if __name__ == "__main__":
    main()
