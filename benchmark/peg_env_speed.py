"""What the peg insertion environment costs on top of the simulator and the renderer.

    python benchmark/peg_env_speed.py

Each observation of PegInsertEnv against the two things it cannot do without: mujoco.batch alone, which steps the same
worlds with the same targets and torques, and BatchedRenderer alone, which draws the same states. Segments alternate, so
both sides meet the same machine. Actions are random with a downward push, so that most pegs touch the block; episodes
are of mixed ages, and where the environment begins one, the raw side is put there too, off the clock.
"""

import time

import mujoco.batch
import tools
import torch

from common.distributed import num_cores
from common.envs.peg_insert import DECIMATION, PegInsertEnv

OBSERVATIONS = {
    "state": {},
    "tactile": {"observation": "multimodal", "modalities": ("tactile", "proprio")},
    "rgb": {"observation": "multimodal", "modalities": ("rgb", "proprio")},
    "all": {"observation": "multimodal"},
}
WARM_UP = 30  # steps before the first segment: the pegs have come down
STATE = ("qpos", "qvel", "qacc_warmstart", "mocap_pos", "mocap_quat")


def record(env: PegInsertEnv, num_steps: int) -> dict:
    """Plays `num_steps` from the present state; what is needed to play them again on either side."""
    tape = {"start": env.state_dict(), "actions": [], "inputs": [], "restarts": []}
    step = env.physics.step

    def recorded(nsubsteps):
        tape["inputs"].append((env.physics.ctrl.clone(), env.physics.mocap_pos.clone(), env.physics.mocap_quat.clone()))
        step(nsubsteps)

    env.physics.step = recorded
    for _ in range(num_steps):
        action = torch.randn(env.num_envs, 6)
        action[:, 2] -= 0.3
        tape["actions"].append(action)
        _, _, terminated, truncated, _ = env.step(action)
        rows = (terminated | truncated).nonzero().flatten()
        state = {name: getattr(env.physics, name)[rows].clone() for name in STATE}
        tape["restarts"].append((rows, state, env.physics.fields["geom_size"][rows].clone()))
    env.physics.step = step
    return tape | {"end": env.physics.qpos.clone()}


def time_env(env: PegInsertEnv, tape: dict) -> float:
    """Seconds for the tape."""
    env.load_state_dict(tape["start"])
    began = time.perf_counter()
    for action in tape["actions"]:
        env.step(action)
    seconds = time.perf_counter() - began
    assert torch.equal(env.physics.qpos, tape["end"])
    return seconds


class Raw:
    """The same worlds without an environment."""

    def __init__(self, env: PegInsertEnv, threads: int):
        self.batch = mujoco.batch.Batch(env.physics.model, env.num_envs, threads)
        self.state = {name: torch.from_numpy(self.batch.bind(name)) for name in (*STATE, "ctrl")}
        self.size = torch.from_numpy(self.batch.expand("geom_size"))
        self.substeps = DECIMATION * env.cfg.substeps

    def time(self, tape: dict) -> float:
        """Seconds for the tape."""
        for name in STATE:
            self.state[name].copy_(tape["start"]["physics"][name])
        self.size.copy_(tape["start"]["physics"]["fields.geom_size"])
        seconds = 0.0
        for inputs, (rows, state, size) in zip(tape["inputs"], tape["restarts"], strict=True):
            began = time.perf_counter()
            for name, value in zip(("ctrl", "mocap_pos", "mocap_quat"), inputs, strict=True):
                self.state[name].copy_(value)
            self.batch.step(None, self.substeps)
            seconds += time.perf_counter() - began
            for name in STATE:
                self.state[name][rows] = state[name]
            self.size[rows] = size
        # Both sides went through the same states, or the comparison is none.
        assert torch.equal(self.state["qpos"], tape["end"])
        return seconds


def time_renderer(env: PegInsertEnv, steps: int) -> float:
    """Seconds for `steps` pictures of every world."""
    began = time.perf_counter()
    for _ in range(steps):
        env.renderer.render(env.physics.qpos)
    return time.perf_counter() - began


def measure(num_envs: int, observation: str, pairs: int, env_steps: int, threads: int) -> dict:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    env = PegInsertEnv(num_envs, physics_threads=threads, **OBSERVATIONS[observation])
    env.reset(seed=1, options={"random_phase": True})
    record(env, WARM_UP)
    steps = max(5, env_steps // num_envs)
    tape, raw = record(env, steps), Raw(env, threads)
    seconds = {"env": [], "physics": [], "rendering": []}
    for _ in range(pairs + 1):
        seconds["env"].append(time_env(env, tape))
        seconds["physics"].append(raw.time(tape))
        if env.renderer is not None:
            seconds["rendering"].append(time_renderer(env, steps))
    env.close()
    total = num_envs * steps
    rates = {name: [total / s for s in values[1:]] for name, values in seconds.items() if values}  # the first warms up
    slowest = [min(parts) for parts in zip(*[rates[name] for name in rates if name != "env"], strict=True)]
    case = {f"{name}_steps_per_second": tools.spread(values) for name, values in rates.items()}
    case["ratio"] = tools.spread([env / raw for env, raw in zip(rates["env"], slowest, strict=True)])
    return {"num_envs": num_envs, "observation": observation, "threads": threads} | case


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--num-envs", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--observations", nargs="+", choices=OBSERVATIONS, default=list(OBSERVATIONS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--env-steps", type=int, default=10_000, help="environment steps of a segment")
    args = parser.parse_args()
    began, cases = time.time(), []
    for observation in args.observations:
        for num_envs in args.num_envs:
            case = measure(num_envs, observation, args.pairs, args.env_steps, num_cores())
            rates = {k.split("_")[0]: round(v["median"]) for k, v in case.items() if k.endswith("second")}
            print(f"{observation:8s} {num_envs:4d} environments: {rates}, {case['ratio']['median']:.2f}", flush=True)
            cases.append(case)
    lowest = min(case["ratio"]["median"] for case in cases)
    figures = {"lowest_median_ratio": lowest, "goal": 0.7, "cases": cases}
    tools.write(args, "peg_env_speed", [0, 1], args.num_envs, began, figures)


if __name__ == "__main__":
    main()
