"""What the pick-and-place environment costs on top of the simulator and the renderer, and how well its expert does.

    python benchmark/pick_env_speed.py

Environment steps (control steps x worlds) per second of PickEnv.step, segment by segment in turn with the two things it
cannot do without: BatchedMujoco alone, which steps the same worlds from the same states with the same controls, and
BatchedRenderer alone, which draws as many pictures. Actions are random with a downward push, so that the hands meet the
table and the cubes; episodes are of mixed ages. `processor_us` is processor time per control step of a world, which
other work on the machine changes less. Expert: successes from fresh starts, calm and disturbed: pushes of the cube (a
horizontal velocity of .3 m/s standard deviation in 2% of the control steps), noise on every action (.3 of its range).
"""

import time
from dataclasses import replace

import tools
import torch

from common.distributed import num_cores
from common.envs.pick import PickConfig, PickEnv
from common.envs.pick_expert import Expert
from common.physics import STATE
from common.stats import wilson_ci95

CASES = {
    "state, difficulty 0": {"observation": "state", "chunk": 1, "difficulty": 0.0},
    "state, difficulty 1": {"observation": "state", "chunk": 1},
    "state, difficulty 1, dense": {"observation": "state", "chunk": 1, "reward": "dense"},
    "images, difficulty 0": {"difficulty": 0.0},
    "images, difficulty 1": {},
}
WARM_UP = 32  # control steps before the first segment


def actions(env: PickEnv) -> torch.Tensor:
    action = torch.randn(env.num_envs, env.cfg.chunk, 7)
    action[..., 2] -= 0.3
    return action


def clock(function) -> tuple[float, float]:
    """Seconds on the clock, and of processor time."""
    began, used = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - began, time.process_time() - used


def measure(name: str, num_envs: int, pairs: int, env_steps: int, threads: int) -> dict:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    env = PickEnv(num_envs, physics_threads=threads, **CASES[name])
    env.reset(seed=1, options={"random_phase": True})
    chunk = env.cfg.chunk
    for _ in range(WARM_UP // chunk):
        env.step(actions(env))
    steps = max(3, env_steps // (num_envs * chunk))
    start, drawn, controls = env.state_dict(), [actions(env) for _ in range(steps)], []
    step = env.physics.step

    def recorded(substeps: int):
        controls.append({name: getattr(env.physics, name).clone() for name in STATE})
        step(substeps)

    def play():
        for action in drawn:
            env.step(action)

    def physics():
        for state in controls:
            for name, value in state.items():
                getattr(env.physics, name).copy_(value)
            step(env.cfg.substeps)

    def render():
        for _ in range(steps):
            env.renderer.render(env.physics.qpos)

    env.physics.step = recorded
    play()
    env.physics.step = step
    sides = {"env": play, "physics": physics} | ({"rendering": render} if env.renderer else {})
    seconds = {side: [] for side in sides}
    for _ in range(pairs + 1):
        for side, function in sides.items():
            env.load_state_dict(start)
            seconds[side].append(clock(function))
    env.close()
    total = num_envs * steps * chunk
    case = {"case": name, "num_envs": num_envs, "threads": threads, "chunk": chunk}
    for side, values in seconds.items():
        wall, used = zip(*values[1:], strict=True)  # the first warms up
        case[f"{side}_steps_per_second"] = tools.spread([total / s for s in wall])
        case[f"{side}_processor_us"] = tools.spread([1e6 * s / total for s in used])
    return case


def successes(cfg: PickConfig, starts: int, push: float = 0.0, noise: float = 0.0) -> dict:
    """Of the expert, one episode per world."""
    env = PickEnv(starts, seed=tools.EVAL_SEED, cfg=replace(cfg, observation="state"))
    env.reset()
    expert, random = Expert(), torch.Generator().manual_seed(0)
    won, length, put = torch.zeros(starts), torch.zeros(starts), env.put.clone()
    waiting = torch.ones(starts, dtype=torch.bool)
    while waiting.any():
        hit = torch.rand(starts, 1, generator=random) < 0.02 * env.cfg.chunk
        env.physics.qvel[:, 9:11] += hit * push * torch.randn(starts, 2, generator=random).double()
        action = expert(env)
        *_, info = env.step(action + noise * torch.randn(action.shape, generator=random))
        ended = waiting & info["_episode"]
        won = torch.where(ended, info["episode"]["success"], won)
        length = torch.where(ended, info["episode"]["l"].float(), length)
        waiting = waiting & ~ended
    hits = int(won.sum())
    result = {"successes": hits, "starts": starts, "ci95": list(wilson_ci95(hits, starts))}
    result |= {"mean_control_steps": length[won > 0].mean().item(), "put": int(won[put].sum()), "puts": int(put.sum())}
    return result


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--num-envs", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--cases", nargs="*", default=list(CASES), help="of the speed; none: the expert alone")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--env-steps", type=int, default=20_000, help="control steps of a segment")
    parser.add_argument("--starts", type=int, default=400, help="of the expert, per row; 0: the former rows")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"--cases takes {', '.join(map(repr, CASES))}, got {', '.join(map(repr, unknown))}")
    began, cases, experts = time.time(), [], []
    for name in args.cases:
        for num_envs in args.num_envs:
            case = measure(name, num_envs, args.pairs, args.env_steps, num_cores())
            rates = {k.split("_")[0]: round(v["median"]) for k, v in case.items() if k.endswith("second")}
            cost = case["env_processor_us"]["median"]
            print(f"{name:28s} {num_envs:4d} worlds: {rates}, {cost:.1f} us", flush=True)
            cases.append(case)
    for difficulty in (0.0, 0.5, 1.0) if args.starts else ():
        for chunk in (8, 1):
            for kind, disturbed in (("calm", {}), ("pushes", {"push": 0.3}), ("noise", {"noise": 0.3})):
                row = {"difficulty": difficulty, "chunk": chunk, "disturbance": kind}
                row |= successes(PickConfig(difficulty=difficulty, chunk=chunk), args.starts, **disturbed)
                print(f"expert: {row}", flush=True)
                experts.append(row)
    experts = experts or tools.former(args, "pick_env_speed", "expert")
    figures = {"goal": "25000 steps/s, state, 256 worlds, 2 cores", "cases": cases, "expert": experts}
    tools.write(args, "pick_env_speed", [0, 1], args.num_envs, began, figures)


if __name__ == "__main__":
    main()
