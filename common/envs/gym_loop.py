"""Gymnasium environments in one loop, with exact resume, and two small tasks: CartPole without velocities and a pair
of CartPoles under one MultiDiscrete action. `common/envs/isaac.py` has the `make_env` for all simulators.
"""

import contextlib
import copy
import math
from collections.abc import Iterable, Mapping

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from common.cli import nearest

FLAT_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


# --- what every environment here shares


def suggestion(env_id: str, ids: Iterable[str]) -> str:
    return f"; the nearest is {nearest(env_id, ids)}" if ids else ""


def check_action_space(env_id: str, space) -> None:
    kind = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete)
    fits = isinstance(space, kind) and (isinstance(space, spaces.Discrete) or len(space.shape) == 1)
    if not fits or (isinstance(space, spaces.Box) and not np.issubdtype(space.dtype, np.floating)):
        raise ValueError(f"--env-id {env_id} has actions {space}; this takes Box of floats, Discrete and MultiDiscrete")


def flat_width(env_id: str, space) -> int:
    """Length of the vector that observations of `space` become; mjlab's spaces look like Gymnasium's."""
    if hasattr(space, "spaces"):
        parts = space.spaces.values() if isinstance(space.spaces, Mapping) else space.spaces
        return sum(flat_width(env_id, part) for part in parts)
    shape = getattr(space, "shape", None)
    if shape is not None and len(shape) >= 3:
        raise ValueError(f"--env-id {env_id} observes images of shape {tuple(shape)}; this script has no CNN")
    if isinstance(space, gym.Space) and not isinstance(space, FLAT_SPACES):
        raise ValueError(f"--env-id {env_id} observes {space}, which is no vector of numbers")
    return spaces.flatdim(space) if isinstance(space, gym.Space) else math.prod(shape)


def set_spaces(env: VectorEnv, obs_dim: int, action_space) -> None:
    env.single_observation_space = spaces.Box(-math.inf, math.inf, (obs_dim,))
    env.single_action_space = action_space
    env.observation_space = batch_space(env.single_observation_space, env.num_envs)
    env.action_space = batch_space(action_space, env.num_envs)


# --- Gymnasium


@contextlib.contextmanager
def _quiet_mujoco():
    """MuJoCo warns of its own deprecations once for every model, also on disk. Isaac Lab's environment may lack it."""
    try:
        import mujoco
    except ImportError:
        yield
        return
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(None)


class GymnasiumEnv(VectorEnv):
    """`num_envs` environments of one Gymnasium id, stepped one after the other in this process.

    A plain loop: for the light environments here, worker processes and Gymnasium's own SyncVectorEnv cost more than
    they save. Several ranks, each with a loop, use several cores.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, env_id: str, num_envs: int, device="cpu", seed: int = 1, history: int = 1, **make_kwargs):
        self.num_envs, self.device, self.history = num_envs, torch.device(device), history
        try:
            spec = copy.deepcopy(gym.spec(env_id))
            spec.order_enforce, spec.disable_env_checker = False, True  # layers of Python round every step
            with _quiet_mujoco():
                self.envs = [gym.make(spec, **make_kwargs) for _ in range(num_envs)]
        except (gym.error.DependencyNotInstalled, ImportError) as error:
            raise ValueError(f"--env-id {env_id}: {' '.join(str(error).split())}") from None
        except gym.error.UnregisteredEnv:
            raise ValueError(f"--env-id: there is no {env_id!r}{suggestion(env_id, gym.registry)}") from None
        except (gym.error.Error, TypeError) as error:
            raise ValueError(f"--env-id {env_id} cannot be made: {' '.join(str(error).split())}") from None
        env = self.envs[0]
        self.spec, self.render_mode = env.spec, env.render_mode
        self.metadata = {"render_fps": env.metadata.get("render_fps")} | GymnasiumEnv.metadata
        check_action_space(env_id, env.action_space)
        self._space, self._width = env.observation_space, flat_width(env_id, env.observation_space)
        self._on_cpu = self.device.type == "cpu"
        self._steps = [env.step for env in self.envs]
        self._plain = isinstance(self._space, spaces.Box) and len(self._space.shape) == 1
        self.policy_dim = self.critic_dim = self._width * history
        set_spaces(self, self.policy_dim, env.action_space)
        self._seed = seed  # of the first reset, unless it is given one
        self.exact_resume = all(_can_resume(env) for env in self.envs)
        self._returns, self._lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        self._frames = np.zeros((num_envs, history, self._width), np.float32)
        self.nan_resets = torch.zeros((), dtype=torch.long, device=self.device)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Starts all episodes; environment i gets the seed `seed + i`. Without a seed the generators go on."""
        seed, self._seed = self._seed if seed is None else seed, None
        frame = np.empty((self.num_envs, self._width), np.float32)
        for i, env in enumerate(self.envs):
            frame[i] = self._flat(env.reset(seed=None if seed is None else seed + i)[0])
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        self._frames = np.repeat(np.nan_to_num(frame)[:, None], self.history, 1)
        return self._tensor(self._frames.reshape(self.num_envs, -1)), {}

    def step(self, actions: torch.Tensor):
        """actions: (num_envs, *shape of one), float for Box and int64 for Discrete and MultiDiscrete."""
        # Each NumPy or torch call costs about a microsecond, where CartPole takes five for a step: few calls, lists.
        N, rewards, falls, limits = self.num_envs, [], [], []
        frame = np.empty((N, self._width), np.float32)
        for i, (step, action) in enumerate(zip(self._steps, self._to_env(actions), strict=True)):
            obs, reward, fallen, limit, _ = step(action)
            frame[i] = obs if self._plain else self._flat(obs)
            rewards.append(reward)
            falls.append(fallen)
            limits.append(limit and not fallen)  # who falls at the time limit has fallen
        reward, terminated, truncated = np.array(rewards, np.float64), np.array(falls, bool), np.array(limits, bool)
        flat = frame.ravel()
        if not math.isfinite(flat.dot(flat) + sum(rewards)):  # or a square has overflowed, so look again
            bad = ~(np.isfinite(frame).all(1) & np.isfinite(reward))
            frame[bad], reward[bad], terminated[bad], truncated[bad] = 0.0, 0.0, True, False
            self.nan_resets = self.nan_resets + int(bad.sum())
        done = terminated | truncated
        self._returns, self._lengths = self._returns + reward, self._lengths + 1
        episode = {"r": self._tensor(self._returns.astype(np.float32)), "l": self._tensor(self._lengths)}

        self._frames = frame[:, None] if self.history == 1 else np.concatenate((self._frames[:, 1:], frame[:, None]), 1)
        final_obs = obs = self._tensor(self._frames.reshape(N, -1))
        ended = self._tensor(done)
        if done.any():
            self._frames = self._frames.copy()
            for i in done.nonzero()[0]:
                self._frames[i] = np.nan_to_num(self._flat(self.envs[i].reset()[0]))
            self._returns, self._lengths = self._returns * ~done, self._lengths * ~done
            obs = self._tensor(self._frames.reshape(N, -1))
        info = {"final_obs": final_obs, "_final_obs": ended, "episode": episode, "_episode": ended}
        info["nan_resets"] = self.nan_resets
        reward = self._tensor(reward.astype(np.float32))
        return obs, reward, self._tensor(terminated), self._tensor(truncated), info

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array) if self._on_cpu else torch.from_numpy(array).to(self.device)

    def _flat(self, obs) -> np.ndarray:
        return obs if self._plain else spaces.flatten(self._space, obs)

    def _to_env(self, actions) -> list | np.ndarray:
        """What each environment is given."""
        space = self.single_action_space
        if isinstance(actions, torch.Tensor):
            actions = actions.detach().cpu().numpy()
        if isinstance(space, spaces.Discrete):
            return (actions.reshape(self.num_envs) + space.start).tolist()
        if isinstance(space, spaces.MultiDiscrete):
            return actions + space.start
        # detail 27: action clipping, of a copy
        return actions.clip(self.action_space.low, self.action_space.high).astype(space.dtype, copy=False)

    def render_frame(self) -> np.ndarray | None:
        """The first environment as uint8 (height, width, 3); None unless made with render_mode="rgb_array"."""
        return self.envs[0].render() if self.render_mode == "rgb_array" else None

    def close_extras(self, **kwargs):
        for env in self.envs:
            env.close()

    def state_dict(self) -> dict:
        """All that exact resume needs, in types that torch.load(weights_only=True) reads."""
        arrays = {"returns": self._returns, "lengths": self._lengths, "frames": self._frames}
        state = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        return state | {"nan_resets": self.nan_resets.clone(), "envs": [_env_state(env) for env in self.envs]}

    def load_state_dict(self, state: dict):
        """Restores `state_dict()` of an environment with the same id and number."""
        self._returns, self._lengths, self._frames = (_unpack(state[k]) for k in ("returns", "lengths", "frames"))
        self.nan_resets, self._seed = state["nan_resets"].clone().to(self.device), None
        for env, saved in zip(self.envs, state["envs"], strict=True):
            _load_env_state(env, saved)


def _pack(value):
    """`value` in tensors, numbers, strings, lists and dicts; TypeError where that cannot be done."""
    if isinstance(value, np.generic | np.ndarray):
        return torch.from_numpy(np.array(value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {key: _pack(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_pack(item) for item in value)
    raise TypeError(type(value).__name__)


def _unpack(value):
    if isinstance(value, torch.Tensor):
        return value.cpu().numpy().copy()[()]  # [()] turns an array without dimensions back into a number
    if isinstance(value, dict):
        return {key: _unpack(item) for key, item in value.items()}
    return type(value)(_unpack(item) for item in value) if isinstance(value, list | tuple) else value


def _layers(env: gym.Env) -> list[gym.Wrapper]:
    layers = []
    while isinstance(env, gym.Wrapper):
        layers.append(env)
        env = env.env
    return layers


def _is_fixed(value) -> bool:
    """Whether an attribute never changes, or is restored on its own."""
    fixed = (gym.Space, gym.envs.registration.EnvSpec, np.random.Generator)
    of_mujoco = type(value).__module__.startswith(("mujoco.", "gymnasium.envs.mujoco"))
    return isinstance(value, fixed) or of_mujoco or callable(value)


def _can_resume(env: gym.Env) -> bool:
    """Whether `_env_state` holds all of `env`: not where it keeps state in objects such as a Box2D world."""
    try:
        _pack({name: value for name, value in vars(env.unwrapped).items() if not _is_fixed(value)})
    except TypeError:
        return False
    return all(isinstance(layer, gym.wrappers.TimeLimit) for layer in _layers(env))


def _env_state(env: gym.Env) -> dict:
    base, attributes = env.unwrapped, {}
    for name, value in vars(base).items():
        if not _is_fixed(value):
            with contextlib.suppress(TypeError):
                attributes[name] = _pack(value)
    generator = copy.deepcopy(base.np_random.bit_generator.state)
    generator["state"] = {key: str(value) for key, value in generator["state"].items()}  # 128 bits each
    steps = [getattr(layer, "_elapsed_steps", None) for layer in _layers(env)]
    state = {"attributes": attributes, "generator": generator, "steps": steps}
    if type(getattr(base, "data", None)).__name__ == "MjData":
        import mujoco  # here, as Isaac Lab's environment need not have it

        physics = np.empty(mujoco.mj_stateSize(base.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(base.model, base.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        # Rewards compare positions before and after a step, and those before it are the last step's results.
        state |= {"physics": torch.from_numpy(physics), "derived": _pack(_arrays(base.data))}
    return state


def _load_env_state(env: gym.Env, state: dict):
    base = env.unwrapped
    for name, value in state["attributes"].items():
        setattr(base, name, _unpack(value))
    numbers = {key: int(value) for key, value in state["generator"]["state"].items()}
    base.np_random.bit_generator.state = state["generator"] | {"state": numbers}
    for layer, steps in zip(_layers(env), state["steps"], strict=True):
        if steps is not None:
            layer._elapsed_steps = steps
    if "physics" in state:
        import mujoco

        mujoco.mj_setState(base.model, base.data, state["physics"].numpy(), mujoco.mjtState.mjSTATE_INTEGRATION)
        for name, array in _arrays(base.data).items():
            if array.shape == state["derived"][name].shape:  # else its size is the number of contacts: recomputed first
                array[...] = state["derived"][name].numpy()


def _arrays(data) -> dict[str, np.ndarray]:
    """Those of an MjData."""
    names = (name for name in dir(data) if not name.startswith("_"))
    return {name: value for name in names if isinstance(value := getattr(data, name), np.ndarray)}


# --- two small tasks


class CartPoleMasked(CartPoleEnv):
    """CartPole that observes only (x, theta): balancing it takes a memory that tells the velocities."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        high = self.observation_space.high[::2]
        self.observation_space = spaces.Box(-high, high)

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return obs[::2], info

    def step(self, action):
        obs, *rest = super().step(action)
        return obs[::2], *rest


class CartPoleMultiDiscrete(gym.Env):
    """Two carts steered at once by one MultiDiscrete([2, 2]) action; reward 1 for each step in which both stand."""

    metadata = {"render_modes": []}
    cart = CartPoleEnv()  # lends its equations of motion; the states are kept here

    def __init__(self):
        high = np.tile(self.cart.observation_space.high, 2)
        self.observation_space, self.action_space = spaces.Box(-high, high), spaces.MultiDiscrete([2, 2])
        self.states = np.zeros((2, 4))  # x, its velocity, theta, its velocity

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.states = self.np_random.uniform(-0.05, 0.05, (2, 4))
        return self.states.astype(np.float32).ravel(), {}

    def step(self, action):
        fallen = False
        for i in range(2):
            self.cart.state, self.cart.steps_beyond_terminated = self.states[i], None
            fallen |= self.cart.step(int(action[i]))[2]
            self.states[i] = self.cart.state
        return self.states.astype(np.float32).ravel(), 1.0, fallen, False, {}


for _name in ("CartPoleMasked", "CartPoleMultiDiscrete"):
    gym.register(f"{_name}-v0", f"{__name__}:{_name}", max_episode_steps=500, reward_threshold=475.0)
