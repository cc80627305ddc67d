"""What the environment of scanned objects costs on top of the simulator, on every engine.

    python benchmark/real2sim_env_speed.py
    python benchmark/real2sim_env_speed.py --engines mujoco --objects box --num-envs 1024

Control steps per second of Real2SimEnv, with observations, rewards, randomised masses and frictions, and resets,
against the engine alone, which steps the same worlds with the same targets. Segments alternate, so both sides meet the
same machine; where the environment begins an episode, the bare side is put there too, off the clock. What is compiled
is compiled before. One process: torch on one thread, the C engine on `--threads`. Objects: a box, one convex piece
(bottle), several (mug).
"""

import time

import tools
import torch

from common.distributed import num_cores
from common.envs.real2sim import SUBSTEPS, Real2SimEnv

ENGINES = ("mujoco", "warp", "mjx")
OBJECTS = {"box": ("box",), "hull": ("bottle",), "pieces": ("mug",)}
RANDOMISED = dict(mass=(0.8, 1.2), friction=(0.8, 1.2))
WARM_UP = 40  # steps before the first segment: hands have come down to the table


def record(env: Real2SimEnv, num_steps: int) -> dict:
    """Plays `num_steps` from the present state; what is needed to play them again on either side."""
    tape = {"start": env.state_dict(), "actions": [], "targets": [], "restarts": []}
    for _ in range(num_steps):
        action = torch.randn(env.num_envs, 9, device=env.device)
        tape["actions"].append(action)
        _, _, terminated, truncated, _ = env.step(action)
        rows = (terminated | truncated).nonzero()[:, 0]
        tape["targets"].append(env.target.clone())
        state = {name: getattr(env.physics, name)[rows].clone() for name in ("qpos", "qvel", "qacc_warmstart")}
        state |= {f"fields.{name}": field[rows].clone() for name, field in env.physics.fields.items()}
        tape["restarts"].append((rows, state))
    return tape


def time_env(env: Real2SimEnv, tape: dict) -> float:
    """Seconds for the tape."""
    env.load_state_dict(tape["start"])
    _synchronise(env)
    began = time.perf_counter()
    for action in tape["actions"]:
        env.step(action)
    _synchronise(env)
    return time.perf_counter() - began


def time_engine(env: Real2SimEnv, tape: dict) -> float:
    """Seconds for the physics of the tape."""
    physics = env.physics
    physics.load_state_dict(tape["start"]["physics"])
    seconds = 0.0
    for target, (rows, state) in zip(tape["targets"], tape["restarts"], strict=True):
        _synchronise(env)
        began = time.perf_counter()
        physics.ctrl.copy_(target)
        physics.step(SUBSTEPS)
        _synchronise(env)
        seconds += time.perf_counter() - began
        for name, value in state.items():
            whole = physics.fields[name[7:]] if name.startswith("fields.") else getattr(physics, name)
            whole[rows] = value
    return seconds


def _synchronise(env: Real2SimEnv):
    if env.device.type == "cuda":
        torch.cuda.synchronize()


def measure(engine: str, kind: str, num_envs: int, env_steps: int, args) -> dict:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are small
    settings = {"objects": OBJECTS[kind], "observation": "full", "backend": engine, **RANDOMISED}
    env = Real2SimEnv(num_envs, args.device, physics_threads=args.threads, **settings)
    env.reset(seed=1, options={"random_phase": True})
    record(env, WARM_UP if engine == "mujoco" or env.device.type == "cuda" else 5)
    steps = max(5, env_steps // num_envs)
    tape = record(env, steps)
    rates = {"env": [], "engine": []}
    for _ in range(args.pairs + 1):
        rates["env"].append(num_envs * steps / time_env(env, tape))
        rates["engine"].append(num_envs * steps / time_engine(env, tape))
    env.close()
    rates = {name: values[1:] for name, values in rates.items()}  # the first warms up
    case = {f"{name}_steps_per_second": tools.spread(values) for name, values in rates.items()}
    case["ratio"] = tools.spread([a / b for a, b in zip(rates["env"], rates["engine"], strict=True)])
    return {"engine": engine, "object": kind, "num_envs": num_envs, "threads": args.threads} | case


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--objects", nargs="+", choices=OBJECTS, default=list(OBJECTS))
    parser.add_argument("--num-envs", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=num_cores(), help="of the C engine")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--env-steps", type=int, default=20_000, help="control steps of a segment, of all worlds")
    args = parser.parse_args()
    began, cases = time.time(), []
    for engine in args.engines:
        for kind in args.objects:
            for num_envs in args.num_envs:
                # On a CPU the two engines made for GPUs take ten to a thousand times as long.
                slow = args.device == "cpu" and engine != "mujoco"
                share = (1000 if engine == "mjx" and kind != "box" else 20) if slow else 1
                case = measure(engine, kind, num_envs, args.env_steps // share, args)
                env, raw = (case[f"{name}_steps_per_second"]["median"] for name in ("env", "engine"))
                ratio = case["ratio"]["median"]
                print(
                    f"{engine:6s} {kind:6s} {num_envs:5d} worlds: {env:9.0f} of {raw:9.0f}/s, {ratio:.2f}", flush=True
                )
                cases.append(case)
    ours = [case["ratio"]["median"] for case in cases if case["engine"] == "mujoco"]
    figures = {
        "substeps": SUBSTEPS,
        "lowest_median_ratio_of_mujoco": min(ours, default=None),
        "goal": 0.7,
        "device": args.device,
    }
    tools.write(args, "real2sim_env_speed", [0, 1], args.num_envs, began, figures | {"cases": cases})


if __name__ == "__main__":
    main()
