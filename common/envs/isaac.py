"""One adapter for Gymnasium, Isaac Lab (2.3 with Kit, 3.x with and without it) and mjlab: `make_env(env_id, ...)`.

All come out as a `gymnasium.vector.VectorEnv` of torch tensors with one observation vector per environment, the
policy's part first and the critic's last; docs/environments.md says what `step` returns. A user's mistake raises
ValueError with one sentence.
"""

import argparse
import contextlib
import copy
import difflib
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from common.envs.gym_loop import GymnasiumEnv, check_action_space, flat_width, set_spaces, suggestion
from common.video import use_gl

# Tasks whose environments must all end at the same step, because their reset moves every robot of the scene.
SYNCHRONOUS = ("Factory", "Forge", "AutoMate")
VIDEO_INTERVAL, VIDEO_LENGTH = 2000, 200  # steps between the starts of the simulator's own videos, and of one video
# Functions of Isaac Lab's managers whose observations are images; image_features are vectors.
IMAGE_TERMS = ("image", "image_rgb", "image_depth", "image_normals", "image_segmentation")
SEVERAL_AGENTS = "--env-id {} is a task of several agents; this script trains one"
MJLAB_INSTALL = "python3 -m venv .venv-mjlab && .venv-mjlab/bin/pip install -r requirements-mjlab.txt"
INSTALL = {
    "isaaclab": "Isaac Lab cannot be imported ({}); install it as https://isaac-sim.github.io/IsaacLab or docs/isaac.md"
    " says",
    "mjlab": f"mjlab cannot be imported ({{}}); give it an environment of its own with: {MJLAB_INSTALL}",
}


def make_env(
    env_id: str,
    num_envs: int,
    device: str | torch.device = "cpu",
    seed: int = 1,
    *,
    physics: str = "newton_mjwarp",
    clip_actions: float = 0.0,
    history: int = 1,
    compute_final_obs: bool = True,
    launcher_args: Iterable[str] = (),
    video_dir: str = "",
    customise: Callable | None = None,
    **make_kwargs,
) -> VectorEnv:
    """The vector environment of `env_id`: `Isaac*` is Isaac Lab, `Mjlab-*` mjlab, anything else Gymnasium.

    physics: preset of Isaac Lab 3.x, or several with commas (newton_mjwarp,newton_renderer); "" takes the task's own.
    clip_actions: bound on the actions of Isaac Lab and mjlab, whose spaces have none (0: no bound).
    history: the policy sees this many stacked observations, newest last.
    compute_final_obs: whether to observe an episode's last state; without, `final_obs` is the observation before it.
    launcher_args: words for Isaac Lab's launcher, such as ("--headless",).
    video_dir: where Isaac Lab writes videos of its own; mjlab and Gymnasium draw through `render_frame()`.
    customise: may change the configuration of a task of Isaac Lab, and returns what `gym.make` is to make in its place.
    make_kwargs: for the environment's constructor, such as render_mode="rgb_array".
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda:0")  # what Warp and Kit expect
    if env_id.startswith("Mjlab-"):
        sim = _make_mjlab(env_id, num_envs, device, seed, compute_final_obs, make_kwargs)
        return IsaacEnv(sim, env_id, seed, clip_actions, history, compute_final_obs)
    if env_id.startswith(("Isaac-", "IsaacContrib-")):
        stack = contextlib.ExitStack()
        sim = _make_isaac(
            stack,
            env_id,
            num_envs,
            device,
            seed,
            physics,
            compute_final_obs,
            launcher_args,
            video_dir,
            customise,
            make_kwargs,
        )
        return IsaacEnv(sim, env_id, seed, clip_actions, history, compute_final_obs, stack.close)
    return GymnasiumEnv(env_id, num_envs, device, seed, history, **make_kwargs)


def check_task(env_id: str, physics: str = "newton_mjwarp") -> None:
    """Refuses a task as `make_env` does, so far as that can be told without starting a simulator.

    For Isaac Lab 3.x: its name, its presets and observations that are images. 2.x says nothing before Kit runs.
    """
    if env_id.startswith("Mjlab-"):
        _mjlab(env_id)
    elif env_id.startswith(("Isaac-", "IsaacContrib-")):
        if _launcher(env_id) is not None:
            _isaac_config(env_id, physics, with_presets=True)
    else:
        GymnasiumEnv(env_id, 1).close()


def check_launcher_args(env_id: str, words: Iterable[str], fields: Iterable[str]) -> None:
    """Refuses flags that the script does not know and that no launcher takes, with the nearest flag there is.

    words: what of the command line the script did not know. fields: names of the script's own settings.
    Only Isaac Lab has a launcher; which flags it takes differs by its version, so it is asked.
    """
    parser, whom = _Parser(add_help=False, allow_abbrev=False), ""
    if env_id.startswith(("Isaac-", "IsaacContrib-")):
        _add_launcher_args(parser, _launcher(env_id))
        whom = " to this script and to Isaac Lab's launcher"
    _, foreign = parser.parse_known_args(list(words))
    flags = [f"--{name.replace('_', '-')}" for name in fields] + [*parser._option_string_actions]
    flag = next((word.partition("=")[0] for word in foreign if re.match("--?[a-zA-Z]", word)), None)
    if flag is not None:
        similar = difflib.get_close_matches(flag, flags, n=1)
        hint = f"the nearest flag is {similar[0]}, and " if similar else ""
        raise ValueError(f"{flag} is unknown{whom}; {hint}--help lists all of this script")


# --- Isaac Lab and mjlab: one simulator steps all environments


def _vector(obs) -> torch.Tensor:
    """(num_envs, dim) float32 of a group of observations, which is a tensor or a dict of terms."""
    if isinstance(obs, Mapping):
        return torch.cat([_vector(term) for term in obs.values()], 1)
    return obs.flatten(1).float()


class IsaacEnv(VectorEnv):
    """A DirectRLEnv or ManagerBasedRLEnv of Isaac Lab, or a ManagerBasedRlEnv of mjlab, already made.

    Their conventions that this undoes, as read in Isaac Lab 2.3 to 3.0 and mjlab 1.6: done and reward buffers are
    changed in place; `extras["log"]` stays from step to step; an environment that ends is reset within `step`, its last
    observation lost; Factory reports its time limit as termination and as truncation.

    on_close: called last, to close what the simulator runs in.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    exact_resume = False  # neither simulator can restore its state

    def __init__(
        self,
        env,
        env_id: str = "",
        seed: int = 1,
        clip_actions: float = 0.0,
        history: int = 1,
        compute_final_obs: bool = True,
        on_close=None,
    ):
        self.env, self.sim = env, env.unwrapped
        sim, self.history, self.clip_actions, self._on_close = self.sim, history, clip_actions, on_close
        if hasattr(sim, "possible_agents"):
            raise ValueError(SEVERAL_AGENTS.format(env_id))
        self.num_envs, self.device = sim.num_envs, torch.device(sim.device)
        self.render_mode = getattr(env, "render_mode", None)
        self.metadata = {"render_fps": getattr(sim, "metadata", {}).get("render_fps")} | IsaacEnv.metadata
        groups = getattr(sim.single_observation_space, "spaces", {})
        self._policy = next((name for name in ("policy", "actor") if name in groups), None)
        if self._policy is None:
            raise ValueError(f"--env-id {env_id} has the observation groups {', '.join(groups)}, but no policy group")
        self._policy_width = flat_width(env_id, groups[self._policy])
        self._critic_width = flat_width(env_id, groups["critic"]) if "critic" in groups else 0
        self.policy_dim = self._policy_width * history
        self.critic_dim = self._critic_width or self.policy_dim
        action_space = sim.single_action_space
        if not isinstance(action_space, gym.Space):  # mjlab's own, with bounds that are numbers or tuples
            low, high = (np.broadcast_to(b, action_space.shape) for b in (action_space.low, action_space.high))
            action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32))
        check_action_space(env_id, action_space)
        set_spaces(self, self.policy_dim + self._critic_width, action_space)

        self._synchronous = any(name.lower() in env_id.lower() for name in SYNCHRONOUS)
        self._manual = getattr(sim.cfg, "auto_reset", True) is False  # mjlab: it is we who reset
        self._in_step, self._final = False, None
        if compute_final_obs and not self._manual and not getattr(sim.cfg, "compute_final_obs", False):
            self._reset_idx, sim._reset_idx = sim._reset_idx, self._observe_and_reset
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._frames = torch.zeros(self.num_envs, history, self._policy_width, device=self.device)
        self._returns = torch.zeros(self.num_envs, device=self.device)
        self._lengths = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        self.nan_resets = torch.zeros((), dtype=torch.long, device=self.device)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Starts all episodes; `options={"random_phase": True}` spreads their ages over the time limit, but not in
        tasks whose environments must end together (SYNCHRONOUS).
        """
        if seed is not None:
            self._generator.manual_seed(seed)
        groups, _ = self.env.reset(seed=seed)
        self._obs = torch.nan_to_num(self._cat(groups))
        if options and options.get("random_phase") and not self._synchronous:
            limit, ages = int(self.sim.max_episode_length), self.sim.episode_length_buf
            ages[:] = torch.randint(limit, ages.shape, generator=self._generator, device=self.device)
        self._returns, self._lengths = torch.zeros_like(self._returns), torch.zeros_like(self._lengths)
        self._frames = self._obs[:, None, : self._policy_width].repeat(1, self.history, 1)
        return self._stack(self._frames, self._obs), {}

    def step(self, actions: torch.Tensor):
        """actions: (num_envs, actions), float for Box and int64 for Discrete and MultiDiscrete."""
        actions, valid = self._to_sim(actions)
        self._in_step, self._final = True, None
        groups, reward, terminated, truncated, extras = self.env.step(actions)
        self._in_step = False
        last, obs = self._obs, self._cat(groups)  # (num_envs, policy + critic), copies
        reward, terminated, truncated = reward.float().clone(), terminated.bool().clone(), truncated.bool()  # buffers
        log = self._take_log(extras)

        # Both flags: a fall at the time limit, which is a fall; but Factory has no falls and reports the limit twice.
        if self._synchronous:
            terminated &= ~truncated
        truncated = truncated & ~terminated
        if getattr(self.sim.cfg, "is_finite_horizon", False):  # nothing is worth anything after the limit
            terminated, truncated = terminated | truncated, torch.zeros_like(truncated)
        done = terminated | truncated

        if self._manual:
            final = obs
            obs, reset_log = self._reset_manually(done, obs)
            log |= reset_log
        elif (groups := extras.pop("final_obs", None)) is not None:  # left in, it would come again at the next step
            final = self._cat(groups)
        else:
            final = last if self._final is None else self._final

        finite = torch.isfinite(torch.where(done[:, None], final, obs)).all(1) & torch.isfinite(reward) & valid
        if not bool((finite & torch.isfinite(obs).all(1)).all()):
            obs = self._reset_diverged(~finite & ~done | ~torch.isfinite(obs).all(1), obs)
            final, reward = torch.where(finite[:, None], final, 0.0), torch.where(finite, reward, 0.0)
            terminated, truncated = terminated | ~finite, truncated & finite
            done = terminated | truncated
            self.nan_resets = self.nan_resets + (~finite).sum()

        self._obs, self._returns, self._lengths = obs, self._returns + reward, self._lengths + 1
        info = {"episode": {"r": self._returns, "l": self._lengths}, "_episode": done, "log": log}
        self._returns, self._lengths = self._returns * ~done, self._lengths * ~done
        newest_final, newest = final[:, None, : self._policy_width], obs[:, None, : self._policy_width]
        frames = torch.cat((self._frames[:, 1:], newest_final), 1)
        info |= {"final_obs": self._stack(frames, final), "_final_obs": done, "nan_resets": self.nan_resets}
        self._frames = torch.where(done[:, None, None], newest, torch.cat((self._frames[:, 1:], newest), 1))
        return self._stack(self._frames, obs), reward, terminated, truncated, info

    # --- observations

    def _cat(self, groups: Mapping) -> torch.Tensor:
        """(num_envs, policy + critic), a copy."""
        names = [self._policy, "critic"] if self._critic_width else [self._policy]
        return torch.cat([_vector(groups[name]).to(self.device) for name in names], 1)

    def _stack(self, frames: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        """frames: (num_envs, history, policy); obs: (num_envs, policy + critic), whose critic part is taken."""
        return torch.cat((frames.flatten(1), obs[:, self._policy_width :]), 1)

    def _observe_and_reset(self, env_ids=None):
        """Stands in for the simulator's `_reset_idx`, which `step` calls before it observes."""
        if self._in_step and self._final is None:
            self._final = self._cat(self._observe())
        return self._reset_idx(env_ids)

    def _observe(self) -> Mapping:
        """The observation groups as they are, with the simulator's own histories and noise."""
        sim = self.sim
        manager = getattr(sim, "observation_manager", None)
        if manager is None:
            groups = dict(sim._get_observations())
            if getattr(sim.cfg, "observation_noise_model", None):
                groups[self._policy] = sim._observation_noise_model(groups[self._policy])
            return groups
        # Terms with a history append the frame when told to; `step` will append again, so that is taken back.
        buffers = getattr(manager, "_group_obs_term_history_buffer", {})
        if not any(buffers.values()):
            return manager.compute()
        kept = copy.deepcopy(buffers)
        groups = manager.compute(update_history=True)
        for group, terms in kept.items():
            buffers[group].update(terms)
        return groups

    # --- actions, logs and resets

    def _to_sim(self, actions) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the actions that the simulator can take, and which rows were finite (num_envs,)."""
        space, actions = self.single_action_space, torch.as_tensor(actions, device=self.device).detach()
        if isinstance(space, spaces.Box):
            valid = torch.isfinite(actions).flatten(1).all(1)
            actions = torch.nan_to_num(actions.float(), 0.0, 0.0, 0.0)
            return actions.clamp(-self.clip_actions, self.clip_actions) if self.clip_actions > 0 else actions, valid
        start = torch.as_tensor(space.start, device=self.device)
        valid = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        return actions.reshape(self.num_envs, -1) + start, valid  # one column per component, Discrete has one

    @staticmethod
    def _take_log(extras: dict) -> dict:
        """The log's scalars, if it was written since the last call; copies."""
        log = extras.get("log")
        if not log:
            return {}
        extras["log"] = {}  # not removed: some tasks only ever add to it
        scalars = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in log.items()}
        return {
            name: value
            for name, value in scalars.items()
            if isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1)
        }

    def _reset_manually(self, mask: torch.Tensor, obs: torch.Tensor) -> tuple[torch.Tensor, dict]:
        env_ids = mask.nonzero().flatten()
        if not len(env_ids):
            return obs, {}
        groups, extras = self.sim.reset(env_ids=env_ids)
        return torch.where(mask[:, None], self._cat(groups), obs), self._take_log(extras)

    def _reset_diverged(self, mask: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        """Resets the environments of `mask`; a state that stays non-finite is at least observed as zeros."""
        env_ids = mask.nonzero().flatten()
        if len(env_ids) and hasattr(self.sim, "observation_manager"):
            obs, _ = self._reset_manually(mask, obs)
        elif len(env_ids):
            self.sim._reset_idx(env_ids)
            self.sim.scene.write_data_to_sim()
            self.sim.sim.forward()
            obs = torch.where(mask[:, None], self._cat(self.sim._get_observations()), obs)
        return torch.where(torch.isfinite(obs), obs, 0.0)

    def render_frame(self) -> np.ndarray | None:
        """uint8 (height, width, 3), or None without render_mode="rgb_array"."""
        return self.env.render() if self.render_mode == "rgb_array" else None

    def close_extras(self, **kwargs):
        self.env.close()
        if self._on_close is not None:
            self._on_close()

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict):
        pass


def _mjlab(env_id):
    """(class of its environments, the task's configuration)."""
    try:
        importlib.import_module("mjlab.tasks")  # registers them
        from mjlab.envs import ManagerBasedRlEnv
        from mjlab.tasks.registry import list_tasks, load_env_cfg
    except ImportError as error:
        raise ValueError(f"--env-id {env_id}: {INSTALL['mjlab'].format(error)}") from None
    if env_id not in list_tasks():
        raise ValueError(f"--env-id: there is no {env_id!r}{suggestion(env_id, list_tasks())}")
    return ManagerBasedRlEnv, load_env_cfg(env_id)


def _make_mjlab(env_id, num_envs, device, seed, compute_final_obs, make_kwargs):
    env_class, cfg = _mjlab(env_id)
    cfg.scene.num_envs, cfg.seed, cfg.auto_reset = num_envs, seed, not compute_final_obs
    if make_kwargs.get("render_mode"):
        use_gl()
    return env_class(cfg=cfg, device=str(device), **make_kwargs)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"Isaac Lab's launcher refuses a flag that this script does not know either: {message}")


def _launcher(env_id):
    """(launch_simulation, add_launcher_args) of Isaac Lab 3.x, or None in 2.x, where tasks must not be imported yet."""
    try:
        return _find_launcher()
    except ImportError as error:
        raise ValueError(f"--env-id {env_id}: {INSTALL['isaaclab'].format(error)}") from None


def _add_launcher_args(parser, launcher):
    if launcher is None:
        app = importlib.import_module("isaaclab.app")
        app.AppLauncher.add_app_launcher_args(parser)
    else:
        _, add_launcher_args = launcher
        add_launcher_args(parser)


def is_version_3() -> bool:
    """Whether the Isaac Lab that is installed is 3.x, whose quaternions are x y z w; those of 2.x are w x y z."""
    return _find_launcher() is not None


def _find_launcher():
    app = importlib.import_module("isaaclab.app")
    if hasattr(app, "launch_simulation"):
        return app.launch_simulation, app.add_launcher_args
    tasks = importlib.util.find_spec("isaaclab_tasks")
    for folder in tasks.submodule_search_locations if tasks else ():
        if (Path(folder) / "utils" / "sim_launcher.py").is_file():
            module = importlib.import_module("isaaclab_tasks.utils.sim_launcher")
            return module.launch_simulation, module.add_launcher_args
    return None


def _isaac_config(env_id, physics, with_presets):
    """The task's configuration; a task that this script cannot train is refused, so far as that shows there."""
    importlib.import_module("isaaclab_tasks")  # registers them
    if env_id not in gym.registry:
        tasks = [name for name in gym.registry if name.startswith("Isaac")]
        raise ValueError(f"--env-id: there is no {env_id!r} in this Isaac Lab{suggestion(env_id, tasks)}")
    parse = importlib.import_module("isaaclab_tasks.utils.parse_cfg")
    cfg = parse.load_cfg_from_registry(env_id, "env_cfg_entry_point")
    if with_presets:
        hydra = importlib.import_module("isaaclab_tasks.utils.hydra")
        names = {name for preset in hydra.collect_presets(cfg).values() for name in preset} - {"default"}
        wanted = tuple(word.strip() for word in physics.split(",") if word.strip())
        for word in wanted if names else ():  # a task without presets has one physics, which nothing here can choose
            if word not in names:
                raise ValueError(f"--physics {word} is no preset of {env_id}, which has {', '.join(sorted(names))}")
        cfg = hydra.resolve_presets(cfg, wanted)
    if hasattr(cfg, "possible_agents"):
        raise ValueError(SEVERAL_AGENTS.format(env_id))
    _refuse_images(env_id, getattr(cfg, "observation_space", None))
    observations = getattr(cfg, "observations", None)
    for name, group in ((name, getattr(observations, name, None)) for name in ("policy", "critic")):
        for term in vars(group).values() if hasattr(group, "__dict__") else ():
            if _function_name(getattr(term, "func", "")) in IMAGE_TERMS:
                raise ValueError(f"--env-id {env_id} observes images in its group {name}; this script has no CNN")
    return cfg


def _refuse_images(env_id, spec):
    """spec: a space of Gymnasium, or Isaac Lab's short form of one, in which [3, 96, 96] is a Box of that shape."""
    if isinstance(spec, gym.Space):
        flat_width(env_id, spec)
    elif isinstance(spec, Mapping | tuple):
        for part in spec.values() if isinstance(spec, Mapping) else spec:
            _refuse_images(env_id, part)
    elif isinstance(spec, list) and all(isinstance(size, int) for size in spec):
        flat_width(env_id, spaces.Box(-math.inf, math.inf, spec))


def _function_name(func) -> str:
    """Its own; Isaac Lab 3.0 may give "module:function", to be imported later."""
    return re.split("[.:]", func)[-1] if isinstance(func, str) else getattr(func, "__name__", "")


def _make_isaac(
    stack, env_id, num_envs, device, seed, physics, compute_final_obs, launcher_args, video_dir, customise, make_kwargs
):
    """The environment; what must stay open while it lives is entered into `stack`."""
    launcher = _launcher(env_id)
    parser = _Parser(add_help=False, allow_abbrev=False)
    words, sys.argv[1:] = sys.argv[1:], []  # Kit reads the command line too, and takes our flags for its own
    try:
        _add_launcher_args(parser, launcher)
        args = parser.parse_args(list(launcher_args))
        args.device = str(device)
        if launcher is None:
            from isaaclab.app import AppLauncher

            args.enable_cameras = args.enable_cameras or bool(video_dir)
            app = AppLauncher(args).app
            cfg = _isaac_config(env_id, physics, with_presets=False)
            stack.callback(app.close)  # not before here: closing Kit ends the process, and nobody would read the error
        else:
            launch_simulation, _ = launcher
            cfg = _isaac_config(env_id, physics, with_presets=True)
        cfg.sim.device, cfg.scene.num_envs, cfg.seed = str(device), num_envs, seed
        if compute_final_obs and hasattr(cfg, "compute_final_obs"):
            cfg.compute_final_obs = True
        own_video = hasattr(cfg, "video_recorders")
        if video_dir and own_video:
            recorder = importlib.import_module("isaaclab.envs.utils.video_recorder_cfg").VideoRecorderCfg()
            recorder.output_dir, recorder.video_interval, recorder.video_length = (
                video_dir,
                VIDEO_INTERVAL,
                VIDEO_LENGTH,
            )
            cfg.video_recorders = [recorder]
        elif video_dir:
            args.enable_cameras = True
            make_kwargs = {"render_mode": "rgb_array"} | make_kwargs
        if launcher is not None:
            stack.enter_context(launch_simulation(cfg, args))
        env = gym.make(customise(cfg) if customise else env_id, cfg=cfg, **make_kwargs)
    except ImportError as error:  # such as moviepy, for a video
        raise ValueError(f"--env-id {env_id} lacks a package: {' '.join(str(error).split())}") from None
    except (FileNotFoundError, RuntimeError) as error:  # such as a robot, on a server that cannot be reached
        if not isinstance(error, FileNotFoundError) and "Unable to copy file" not in str(error):
            raise
        what = " ".join(str(error).split())
        raise ValueError(
            f"--env-id {env_id} needs a file that is not to be had ({what}); docs/isaac.md says under 'Robots without a"
            " network' what to do"
        ) from None
    finally:
        sys.argv[1:] = words
    if video_dir and not own_video:
        start = {"step_trigger": lambda step: step % VIDEO_INTERVAL == 0, "video_length": VIDEO_LENGTH}
        env = gym.wrappers.RecordVideo(env, video_dir, disable_logger=True, **start)
    return env
