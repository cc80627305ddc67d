"""The ALOHA environment beside gym-aloha's own: speed, equality of physics and rewards, pictures, and the expert.

    python benchmark/aloha_env_speed.py
    python benchmark/aloha_env_speed.py --pictures-only      # the other figures stay as they were

Speed: environment steps per second, segment by segment in turn with the package in a process of its own, which draws
three pictures of 480 x 640 whatever it is asked for. Ours with random delta actions and episodes of all ages, on all
cores. Beside it the milliseconds of processor time per step, which other work on the machine changes less. Equality:
the largest difference of positions, velocities and the solver's start, and steps whose reward or end differs, over 8
worlds and 300 steps of the expert and of random actions. Expert: successes in the package, calm and disturbed: pushes
of objects (a horizontal velocity of .3 m/s standard deviation in 2% of the steps), noise on every action (.3 of its
range), and wild actions for 15 steps (begun in 1% of the steps).
"""

import json
import os
import time

import tools
import torch
import torch.multiprocessing as multiprocessing

from common.envs.aloha import STATE, TASKS, AlohaConfig, AlohaEnv
from common.envs.aloha_expert import Expert
from common.files import write_json
from common.provenance import run_info
from common.video import find_gl

SPEED = {
    "84 x 84": {},
    "84 x 84, samples 4": {"samples": 4},
    "84 x 84, samples 4, shadows": {"samples": 4, "shadows": True},
    "84 x 84, supersample 2": {"supersample": 2},
    "84 x 84, supersample 2, shadows": {"supersample": 2, "shadows": True},
    "84 x 84, whole meshes": {"mesh_detail": 0.0},
    "240 x 320": {"image_height": 240, "image_width": 320},
    "480 x 640, all of the picture": {"image_height": 480, "image_width": 640, "crop": (0.0, 0.0, 1.0, 1.0)},
    "no pictures": {"obs_type": "state"},
}
DISTURBED = {"calm": {}, "pushes": {"push": 0.3}, "noise": {"noise": 0.3}, "wild actions": {"wild": 0.01}}


def package(pipe):
    """Answers a number of steps with the package's steps per second, and milliseconds of processor time per step."""
    import gym_aloha  # noqa: F401
    import gymnasium as gym

    env = gym.make("gym_aloha/AlohaInsertion-v0", obs_type="pixels_agent_pos")
    obs, _ = env.reset(seed=0)
    while steps := pipe.recv():
        began, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            obs, *_ = env.step(obs["agent_pos"])
        pipe.send((steps / (time.perf_counter() - began), 1e3 * (time.process_time() - used) / steps))


def time_env(env: AlohaEnv, seconds: float) -> tuple[float, float]:
    steps, began, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        env.step(torch.randn(env.num_envs, 14))
        steps += env.num_envs
    return steps / (time.perf_counter() - began), 1e3 * (time.process_time() - used) / steps


def speed(num_envs: int, rounds: int) -> dict:
    torch.manual_seed(0)
    find_gl()
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    peer = context.Process(target=package, args=(other,), daemon=True)
    peer.start()
    rates = {name: [] for name in ("gym-aloha", *SPEED)}
    envs = {name: AlohaEnv(num_envs, **config) for name, config in SPEED.items()}
    for env in envs.values():
        env.reset(seed=1, options={"random_phase": True})
    for round in range(rounds + 1):  # the first one warms up
        pipe.send(15)
        rates["gym-aloha"].append(pipe.recv())
        for name, env in envs.items():
            rates[name].append(time_env(env, 4.0 if round else 1.0))
    pipe.send(0)
    peer.join(10)
    for env in envs.values():
        env.close()
    result = {}
    for name, values in rates.items():
        wall, processor = zip(*values[1:], strict=True)
        result[name] = {"steps_per_second": tools.spread(wall), "processor_ms_per_step": tools.spread(processor)}
        rate, cost = (figure["median"] for figure in result[name].values())
        print(f"{name:32s} {rate:9,.1f} steps/s {cost:8.2f} ms", flush=True)
    return result


def equality(env_id: str) -> dict:
    fast, own = (AlohaEnv(8, obs_type="state", env_id=env_id, env_backend=b) for b in ("fast", "gym-aloha"))
    fast.reset(seed=1), own.reset(seed=1)
    expert, random = Expert(fast.cfg), torch.Generator().manual_seed(0)
    largest, mismatches, levels = 0.0, 0, torch.zeros(5, dtype=torch.long)
    for _ in range(300):
        action = expert(fast)
        action[4:] = torch.randn(4, 14, generator=random)
        ours, theirs = fast.step(action), own.step(action)
        differences = [(getattr(fast.physics, n) - getattr(own.physics, n)).abs().max().item() for n in STATE]
        largest = max(largest, *differences)
        differ = (fast.level != own.level) | (ours[1] != theirs[1]) | (ours[2] != theirs[2]) | (ours[3] != theirs[3])
        mismatches += int(differ.sum())
        levels += torch.bincount(ours[4]["episode"]["highest_level"].long()[ours[4]["_episode"]], minlength=5)
    result = {"largest_difference": largest, "mismatches": mismatches, "highest_levels": levels.tolist()}
    print(env_id, result, flush=True)
    return result


def pictures() -> dict:
    """Of 16 states on the expert's way, against the package's."""
    own = AlohaEnv(16, env_backend="gym-aloha", obs_type="pixels")
    own.reset(seed=1)
    expert = Expert(own.cfg)
    own.renderer, whole = None, own.renderer  # its pictures are slow: of the last step only
    own._pictures, draw = lambda rows: torch.zeros(len(rows), 84, 84, 3, dtype=torch.uint8), own._pictures
    for step in range(70):
        action = expert(own)
        action[: 16 - step // 4] *= 0.5  # so that they are at different places
        own.step(action)
    own.renderer = whole
    theirs, result = draw(torch.arange(16)).float(), {}
    for name, detail, options in (
        ("default", AlohaConfig.mesh_detail, {}),
        ("whole meshes", 0.0, {}),
        ("samples 4", AlohaConfig.mesh_detail, {"samples": 4}),
        ("samples 4, shadows", AlohaConfig.mesh_detail, {"samples": 4, "shadows": True}),
        ("supersample 2", AlohaConfig.mesh_detail, {"supersample": 2}),
        ("supersample 2, shadows", AlohaConfig.mesh_detail, {"supersample": 2, "shadows": True}),
    ):
        fast = AlohaEnv(16, obs_type="pixels", mesh_detail=detail, **options)
        difference = (fast.set_state(torch.arange(16), own.get_state()).float() - theirs).abs()
        off = (difference.amax(-1) > 25).float().mean().item()
        result[name] = {"mean_difference": difference.mean().item(), "share_off_by_25": off}
        fast.close()
        print(f"pictures, {name}: {result[name]}", flush=True)
    own.close()
    return result


def successes(env_id: str, starts: int, push: float = 0.0, noise: float = 0.0, wild: float = 0.0) -> dict:
    env = AlohaEnv(starts, obs_type="state", env_id=env_id, env_backend="gym-aloha")
    env.reset(seed=tools.EVAL_SEED)
    expert, random = Expert(env.cfg), torch.Generator().manual_seed(0)
    level, length = torch.zeros(starts), torch.zeros(starts)
    left, strange = torch.zeros(starts), torch.zeros(starts, 14)
    for _ in range(env.cfg.episode_steps):
        action = expert(env) + noise * torch.randn(starts, 14, generator=random)
        begins = (torch.rand(starts, generator=random) < wild) & (left <= 0)
        left = torch.where(begins, 15.0, left - 1)
        strange = torch.where(begins[:, None], torch.randn(starts, 14, generator=random), strange)
        action = torch.where((left > 0)[:, None], strange, action)
        if push:
            hit = torch.rand(starts, 1, generator=random) < 0.02
            for first in range(16, env.model.nv, 6):
                env.physics.qvel[:, first : first + 2] += hit * push * torch.randn(starts, 2, generator=random)
            env.package.write(hit[:, 0])
        *_, info = env.step(action)
        new = info["_episode"] & (length == 0)
        level = torch.where(new, info["episode"]["highest_level"], level)
        length = torch.where(new, info["episode"]["l"].float(), length)
    won = level == 4
    result = {"successes": int(won.sum()), "starts": starts, "mean_steps": length[won].mean().item()}
    result["highest_levels"] = torch.bincount(level.long(), minlength=5).tolist()
    print(env_id, push, noise, wild, result, flush=True)
    return result


def label_cost(num_envs: int) -> float:
    """Microseconds per label, on one thread."""
    torch.set_num_threads(1)
    env = AlohaEnv(num_envs, obs_type="state")
    env.reset(seed=1)
    expert = Expert(env.cfg)
    expert(env)
    began = time.perf_counter()
    for _ in range(50):
        expert(env)
    return (time.perf_counter() - began) / 50 / num_envs * 1e6


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--starts", type=int, default=200, help="episodes of the expert per task and disturbance, 0: the former"
    )
    parser.add_argument("--pictures-only", action="store_true")
    args = parser.parse_args()
    if args.pictures_only:
        document = json.loads((args.out / "aloha_env_speed.json").read_text())
        document["figures"]["pictures"] = pictures()
        document["figures"]["pictures_from"] = run_info() | {"command": "--pictures-only", "date": time.strftime("%F")}
        write_json(args.out / "aloha_env_speed.json", document)
        return
    began, load = time.time(), os.getloadavg()[0]  # of the minute before
    rates = speed(args.num_envs, args.rounds)
    figures = {"speed": rates, "goal": 1500, "load_average": load}
    ours, theirs = (rates[name]["steps_per_second"]["median"] for name in ("84 x 84", "gym-aloha"))
    figures["ratio"] = ours / theirs
    figures["equality"] = {task: equality(env_id) for env_id, task in TASKS.items()}
    figures["pictures"] = pictures()
    if args.starts:
        figures["expert"] = {
            task: {name: successes(env_id, args.starts, **how) for name, how in DISTURBED.items()}
            for env_id, task in TASKS.items()
        }
    else:
        figures["expert"] = tools.former(args, "aloha_env_speed", "expert")
    figures["microseconds_per_label"] = {n: label_cost(n) for n in (16, 64, 256)}
    tools.write(args, "aloha_env_speed", [1, tools.EVAL_SEED], args.num_envs, began, figures)


if __name__ == "__main__":
    main()
