"""Doubles of the simulators behind common/envs/isaac.py, with the habits found in their sources: Isaac Lab's
DirectRLEnv and ManagerBasedRLEnv (2.3.2, 3.0.0-beta2 and its main branch) and mjlab 1.6.0's ManagerBasedRlEnv.

Each environment counts its steps in `clock`; an observation is (clock, environment, last action), so every test can
tell by hand what it must be.
"""

from types import SimpleNamespace

import gymnasium as gym
import torch


class DirectDouble(gym.Env):
    """As DirectRLEnv: done buffers changed in place, `extras["log"]` kept, `_reset_idx` within `step`, observations
    only afterwards. `falls` and `limit`: clock at which environment i terminates, and at which all time out.
    """

    metadata = {"render_modes": [None, "rgb_array"], "render_fps": 60}
    policy_group = "policy"

    def __init__(self, num_envs=3, limit=5, falls=None, critic=False, final_obs=None, log=True, action_space=None):
        self.num_envs, self.device, self.limit, self.falls = num_envs, "cpu", limit, falls or {}
        self.critic, self.log, self.render_mode = critic, log, None
        self.max_episode_length = limit
        self.cfg = SimpleNamespace(is_finite_horizon=False)
        if final_obs is not None:  # the field exists in newer versions only
            self.cfg.compute_final_obs = final_obs
        Box = gym.spaces.Box
        groups = {self.policy_group: Box(-float("inf"), float("inf"), (3,))}
        if critic:
            groups["critic"] = Box(-float("inf"), float("inf"), (2,))
        self.single_observation_space = gym.spaces.Dict(groups)
        self.single_action_space = action_space or Box(-float("inf"), float("inf"), (1,))
        self.clock = torch.zeros(num_envs)
        self.action = torch.zeros(num_envs, 1)
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long)
        self.reward_buf = torch.zeros(num_envs)
        self.reset_terminated = torch.zeros(num_envs, dtype=torch.bool)
        self.reset_time_outs = torch.zeros(num_envs, dtype=torch.bool)
        self.obs_buf, self.extras = {}, {}
        self.poison, self.resets, self.seeds, self.received, self.closed = {}, [], [], None, False
        self.scene = SimpleNamespace(write_data_to_sim=lambda: None)
        self.sim = SimpleNamespace(forward=lambda: None)

    def reset(self, seed=None, options=None):
        self.seeds.append(seed)
        self._reset_idx(torch.arange(self.num_envs))
        return self._get_observations(), self.extras

    def _reset_idx(self, env_ids):
        self.resets.append(env_ids.tolist())
        if self.log:
            self.extras["log"] = {"Episode_Reward/track": self.clock[env_ids].mean(), "names": ["a", "b"]}
        self.clock[env_ids] = 0.0
        self.action[env_ids] = 0.0
        self.episode_length_buf[env_ids] = 0

    def _get_observations(self):
        index = torch.arange(self.num_envs).float()
        policy = torch.stack((self.clock, index, self.action[:, 0]), 1)
        for i, value in self.poison.items():
            if self.clock[i] > 0:
                policy[i, 0] = value
        groups = {self.policy_group: policy}
        if self.critic:
            groups["critic"] = torch.stack((self.clock * 10, index), 1)
        return groups

    def _dones(self):
        fallen = torch.zeros(self.num_envs, dtype=torch.bool)
        for i, clock in self.falls.items():
            fallen[i] = self.clock[i] == clock
        return fallen, self.episode_length_buf >= self.limit

    def _simulate(self, action):
        self.received = action
        self.action[:] = action.reshape(self.num_envs, -1)[:, :1]
        self.clock += 1
        self.episode_length_buf += 1
        self.reset_terminated[:], self.reset_time_outs[:] = self._dones()
        self.reward_buf[:] = self.clock
        return (self.reset_terminated | self.reset_time_outs).nonzero().squeeze(-1)

    def step(self, action):
        env_ids = self._simulate(action)
        if len(env_ids):
            if getattr(self.cfg, "compute_final_obs", False):
                self.extras["final_obs"] = self._get_observations()
            self._reset_idx(env_ids)
        self.obs_buf = self._get_observations()
        return self.obs_buf, self.reward_buf, self.reset_terminated, self.reset_time_outs, self.extras

    def close(self):
        self.closed = True


class FactoryDouble(DirectDouble):
    """As FactoryEnv: the time limit is returned as termination and as truncation."""

    def _dones(self):
        limit = self.episode_length_buf >= self.limit
        return limit, limit


class HistoryBuffer:
    """As CircularBuffer: a reset empties the rows, and the first frame fills them."""

    def __init__(self, num_envs, length):
        self.frames, self.empty = torch.zeros(num_envs, length, 3), torch.ones(num_envs, dtype=torch.bool)

    def append(self, frame):
        shifted = torch.cat((self.frames[:, 1:], frame[:, None]), 1)
        self.frames = torch.where(self.empty[:, None, None], frame[:, None], shifted)
        self.empty[:] = False

    def reset(self, env_ids):
        self.frames[env_ids], self.empty[env_ids] = 0.0, True


class ObservationManagerDouble:
    """As ObservationManager: `update_history` appends to the buffers of the terms that have a history."""

    def __init__(self, env, length):
        self.env, self.length = env, length
        buffers = {"term": HistoryBuffer(env.num_envs, length)} if length else {}
        self._group_obs_term_history_buffer = {"policy": buffers}

    def reset(self, env_ids):
        for buffer in self._group_obs_term_history_buffer["policy"].values():
            buffer.reset(env_ids)

    def compute(self, update_history=False):
        groups = self.env._get_observations()
        if self.length:
            buffer = self._group_obs_term_history_buffer["policy"]["term"]
            if update_history:
                buffer.append(groups["policy"])
            groups["policy"] = buffer.frames.flatten(1)
        return groups


class ManagerDouble(DirectDouble):
    """As ManagerBasedRLEnv: observations come from a manager, with a history of its own; `reset` takes env_ids."""

    def __init__(self, *args, length=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.observation_manager = ObservationManagerDouble(self, length)
        if length:
            self.single_observation_space["policy"] = gym.spaces.Box(-float("inf"), float("inf"), (3 * length,))

    def reset(self, seed=None, env_ids=None, options=None):
        self.seeds.append(seed)
        self._reset_idx(torch.arange(self.num_envs) if env_ids is None else env_ids)
        return self.observation_manager.compute(update_history=True), self.extras

    def _reset_idx(self, env_ids):
        super()._reset_idx(env_ids)
        self.observation_manager.reset(env_ids)

    def step(self, action):
        env_ids = self._simulate(action)
        if len(env_ids):
            self._reset_idx(env_ids)
        self.obs_buf = self.observation_manager.compute(update_history=True)
        return self.obs_buf, self.reward_buf, self.reset_terminated, self.reset_time_outs, self.extras


class Box:
    """mjlab's space: a shape, and bounds that are numbers."""

    def __init__(self, shape, low=-float("inf"), high=float("inf")):
        self.shape, self.low, self.high = shape, low, high


class MjlabDouble(DirectDouble):
    """As mjlab's ManagerBasedRlEnv with `auto_reset=False`: `step` returns the terminal observation and refuses to go
    on before `reset(env_ids=)`; the log starts empty at each step; own spaces; groups actor and critic.
    """

    policy_group = "actor"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cfg.auto_reset = False
        self.single_observation_space = SimpleNamespace(
            spaces={name: Box(space.shape) for name, space in self.single_observation_space.spaces.items()}
        )
        self.single_action_space = Box((1,))
        self.observation_manager = SimpleNamespace()
        self.pending = torch.zeros(self.num_envs, dtype=torch.bool)

    def reset(self, *, seed=None, env_ids=None, options=None):
        self.seeds.append(seed)
        self.extras["log"] = {}
        self._reset_idx(torch.arange(self.num_envs) if env_ids is None else env_ids)
        return self._get_observations(), self.extras

    def _reset_idx(self, env_ids):
        super()._reset_idx(env_ids)
        if hasattr(self, "pending"):
            self.pending[env_ids] = False

    def step(self, action):
        if self.pending.any():
            raise RuntimeError("reset first")
        self.extras["log"] = {}
        self.pending[self._simulate(action)] = True
        self.obs_buf = self._get_observations()
        return self.obs_buf, self.reward_buf, self.reset_terminated, self.reset_time_outs, self.extras
