"""CleanRL's sac_continuous_action.py on pick-and-place; started by real2sim.py.

`cleanrl_script` in isaac_peers.py makes a copy of a file of yours with the patches below; that copy imports this file.
What the peer has is the same task, reward and observation (`full`), as one batch of worlds, which is faster than
environments one by one. The rest is its own: settings, networks, buffer, update. Its `--total-timesteps` are steps of
all environments at once.
"""

import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.envs.real2sim import Real2SimEnv

KEEP_EVERY = 51_200  # environment steps between the policies that are kept
OBSERVATION = "full"
# (old, new, why)
PATCHES = (
    (
        "from cleanrl_utils.buffers import ReplayBuffer\n",
        "from cleanrl_utils.buffers import ReplayBuffer\nfrom real2sim_peer import ArrayEnv\n",
        "the environment's import",
    ),
    (
        "gym.vector.SyncVectorEnv(\n"
        "        [make_env(args.env_id, args.seed + i, i, args.capture_video, run_name)"
        " for i in range(args.num_envs)]\n"
        "    )",
        "ArrayEnv(args.num_envs, args.seed)",
        "Real2Sim-v0 is one environment of many worlds",
    ),
    (
        "        # ALGO LOGIC: training.\n",
        "        envs.keep(actor, global_step + 1)\n        # ALGO LOGIC: training.\n",
        "policies are kept, to be evaluated later",
    ),
)


class ArrayEnv:
    """Real2Sim-v0 with NumPy arrays, one thread of physics, and Gymnasium 0.29's words for the end of an episode."""

    def __init__(self, num_envs: int, seed: int):
        self.envs = Real2SimEnv(num_envs, "cpu", seed, physics_threads=1, observation=OBSERVATION)
        self.num_envs = num_envs
        self.single_observation_space = self.envs.single_observation_space
        self.single_action_space = self.envs.single_action_space
        self.single_action_space.seed(seed)
        self.began = time.time()
        self.kept = 0

    def reset(self, seed: int):
        obs, _ = self.envs.reset(seed=seed)
        return obs.numpy(), {}

    def step(self, actions: np.ndarray):
        obs, rewards, terminated, truncated, info = self.envs.step(torch.as_tensor(actions))
        ended = {}
        if bool(info["_episode"].any()):
            episodes = [
                {"episode": {"r": r, "l": length}} if done else None
                for r, length, done in zip(
                    info["episode"]["r"].tolist(), info["episode"]["l"].tolist(), info["_episode"].tolist(), strict=True
                )
            ]
            ended = {"final_observation": info["final_obs"].numpy(), "final_info": episodes}
        return obs.numpy(), rewards.numpy(), terminated.numpy(), truncated.numpy(), ended

    def keep(self, actor: nn.Module, steps: int):
        """Writes the actor into the working folder, every KEEP_EVERY environment steps; `steps` are of each one."""
        steps *= self.num_envs
        if steps // KEEP_EVERY > self.kept:
            self.kept = steps // KEEP_EVERY
            when = {"steps": steps, "minutes": (time.time() - self.began) / 60, "cpu_minutes": time.process_time() / 60}
            torch.save({"when": when, "actor": actor.state_dict()}, Path(f"policy_{steps}.pt"))

    def close(self):
        self.envs.close()


def policies(folder: Path) -> list[tuple[dict, nn.Module]]:
    """[({"steps", "minutes", "cpu_minutes"}, deterministic policy)] of a run in `folder`, oldest first."""
    states = [torch.load(path, weights_only=True) for path in folder.glob("policy_*.pt")]
    states.sort(key=lambda state: state["when"]["steps"])
    return [(state["when"], _policy(state["actor"])) for state in states]


def _policy(weights: dict[str, torch.Tensor]) -> nn.Module:
    """CleanRL's actor without its noise: raw observations to actions from -1 to 1, which are the task's bounds."""
    layers = []
    for name, activation in (("fc1", nn.ReLU()), ("fc2", nn.ReLU()), ("fc_mean", nn.Tanh())):
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer, activation]
    return nn.Sequential(*layers)
