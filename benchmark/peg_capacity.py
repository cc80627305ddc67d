"""How many peg insertion environments a GPU holds: computed from bytes measured on a CPU, not measured on GPUs.

    python benchmark/peg_capacity.py

What an environment and a sample cost is the difference between two sizes, in the arrays of MuJoCo Warp (simulator and
cameras run on the CPU as they would on a GPU, with the same arrays) and in what torch allocates. From it follows the
memory per GPU for 256, 512 and 1024 environments on each, if the rollout, the environment and the update were at
their largest at once. Not in it: CUDA's context and cuDNN's workspace (together about 1 GB).
"""

import time

import tools
import torch
import warp as wp
from peg_env_speed import OBSERVATIONS
from torch.utils._pytree import tree_leaves

import ppo_multimodal_peginsert as ppo
from common.envs.peg_insert import PegInsertEnv
from common.storage import FOLD, zeros

ENVIRONMENTS = (32, 64)  # sizes of which the difference is taken
SAMPLES = (256, 512)
GB = 1e9


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def warp_bytes(part, found: dict | None = None) -> int:
    """Of all Warp arrays in an object of MuJoCo Warp or of ours, each once."""
    found = {} if found is None else found
    if isinstance(part, wp.array):
        found[part.ptr] = part.capacity
    elif isinstance(part, list | tuple | dict):
        for value in part.values() if isinstance(part, dict) else part:
            warp_bytes(value, found)
    elif type(part).__module__.startswith(("mujoco_warp", "common")):
        for value in vars(part).values():
            warp_bytes(value, found)
    return sum(found.values())


def warp_allocations(function) -> int:
    """The bytes that Warp allocates while `function` runs, as if nothing were freed."""
    allocator, sizes = type(wp.get_device("cpu").get_allocator()), []
    allocate = allocator.allocate

    def counted(self, size, *more):
        sizes.append(size)
        return allocate(self, size, *more)

    allocator.allocate = counted
    try:
        function()
    finally:
        allocator.allocate = allocate
    return sum(sizes)


def torch_peak(function) -> int:
    """The most bytes that torch holds at once while `function` runs, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def environment_bytes(num_envs: int, settings: dict) -> dict[str, int]:
    torch.manual_seed(0)
    env = PegInsertEnv(num_envs, "cpu", backend="warp", **settings)
    env.reset(seed=1)
    env.step(torch.zeros(num_envs, 6))  # warms up
    found = {"simulator": warp_bytes((env.physics._d, env.physics._m))}
    found["simulator"] += warp_allocations(lambda: env.physics.step(1))
    found["cameras"] = warp_bytes(env.renderer) if env.renderer is not None else 0
    buffers = nbytes([value for value in vars(env).values() if isinstance(value, torch.Tensor)])
    found["environment"] = buffers + torch_peak(lambda: env.step(torch.zeros(num_envs, 6)))
    env.close()
    return found


def update_bytes(num_samples: int, agent, args, space) -> int:
    """A minibatch and the update with it."""
    with torch.no_grad():
        obs = agent.normalise(zeros(space, (num_samples,), "cpu"))
        actions, logprobs, _, values, dists = agent.get_action_and_value(obs)
    minibatch = {"obs": obs, "actions": actions, "logprobs": logprobs, "dists": dists, "values": values}
    minibatch |= {"returns": values, "advantages": values, "old_std": agent.std().detach()}

    def update():
        loss, _ = ppo.ppo_loss(agent, args, minibatch)
        torch.autograd.grad(loss, list(agent.parameters()))

    return nbytes(minibatch) + torch_peak(update)


def chunk_bytes(num_samples: int, agent, space) -> int:
    """The values and log-probabilities after the rollout."""
    obs, actions = agent.normalise(zeros(space, (num_samples,), "cpu")), torch.zeros(num_samples, 6)
    with torch.no_grad():
        return torch_peak(lambda: agent.get_action_and_value(obs, actions))


def line(function, sizes: tuple[int, int], *more) -> tuple[float, float]:
    """(bytes beside, bytes each) of `function(size, *more)`."""
    small, large = (function(size, *more) for size in sizes)
    each = (large - small) / (sizes[1] - sizes[0])
    return small - each * sizes[0], each


def measure(settings: dict, args) -> dict:
    """Bytes: per environment by part, per sample of an update, and of what is there once."""
    small, large = (environment_bytes(size, settings) for size in ENVIRONMENTS)
    each = {name: (large[name] - small[name]) / (ENVIRONMENTS[1] - ENVIRONMENTS[0]) for name in small}
    once = {name: small[name] - each[name] * ENVIRONMENTS[0] for name in small}
    env = PegInsertEnv(1, "cpu", physics_threads=1, **settings)
    space = env.single_observation_space
    env.close()
    agent = ppo.Agent(env, ppo.Args(**settings, hidden=args.hidden))
    obs = nbytes(zeros(space, (1,), "cpu"))
    vector = 0 if space.shape is None else obs
    vector = nbytes(zeros(space["proprio"], (1,), "cpu")) if space.shape is None else vector
    # Of the rollout: observations and those of the newest FOLD steps, once more what is normalised; actions, means, and
    # ten numbers and flags of every sample.
    each["storage"] = args.num_steps * (obs + vector + 4 * (6 + 6 + 10)) + FOLD * obs
    once["update"], sample = line(update_bytes, SAMPLES, agent, args, space)
    _, chunk = line(chunk_bytes, SAMPLES, agent, space)
    once["chunk"] = chunk * args.chunk_size
    once["parameters"] = 4 * nbytes(list(agent.parameters()))  # with gradient and Adam's two moments
    return {"observation_bytes": obs, "environment": each, "sample": sample, "once": once}


def capacity(cost: dict, num_envs: int, args) -> dict:
    """GB on a GPU with that many environments."""
    samples = num_envs * args.num_steps
    rollout = num_envs * cost["environment"]["storage"]
    environment = num_envs * (sum(cost["environment"].values()) - cost["environment"]["storage"])
    update = samples / args.num_minibatches * cost["sample"]
    parts = {"storage": rollout, "environments": environment, "update": update, "once": sum(cost["once"].values())}
    parts = {name: value / GB for name, value in parts.items()}
    return {"num_envs": num_envs, "samples_per_iteration": samples, "gb": sum(parts.values()), "parts_gb": parts}


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--num-envs", type=int, nargs="+", default=[256, 512, 1024], help="environments on each GPU")
    parser.add_argument("--gpus", type=int, default=8)
    flags, began = parser.parse_args(), time.time()
    args = ppo.Args(**ppo.PRESETS["gpu"])
    torch.set_num_threads(1)
    costs = {name: measure(settings, args) for name, settings in OBSERVATIONS.items()}
    tables = {name: [capacity(cost, n, args) for n in flags.num_envs] for name, cost in costs.items()}
    for i, num_envs in enumerate(flags.num_envs):
        cells = ", ".join(f"{name} {rows[i]['gb']:.1f}" for name, rows in tables.items())
        print(f"{num_envs:5d} environments on each of {flags.gpus} GPUs ({flags.gpus * num_envs} in all), GB: {cells}")
    settings = {"num_steps": args.num_steps, "num_minibatches": args.num_minibatches, "chunk_size": args.chunk_size}
    figures = {"computed": "from bytes measured on a CPU; no GPU was used", "gpus": flags.gpus, "settings": settings}
    figures |= {"bytes": costs, "per_gpu": tables}
    tools.write(flags, "peg_capacity", [0], list(ENVIRONMENTS), began, figures)


if __name__ == "__main__":
    main()
