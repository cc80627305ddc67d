"""Bimanual insertion and cube transfer of gym-aloha, batched. See docs/aloha.md for spaces, rewards and sources."""

import copy
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import gymnasium as gym
import mujoco
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch.nn.functional import adaptive_avg_pool2d

from common.distributed import cores_per_rank
from common.physics import STATE, BatchedMujoco
from common.render import BatchedRenderer, decimate
from common.video import find_gl

# Facts of gym-aloha 0.1.5: constants.py, utils.py and the XML files.
CONTROL_DT, SUBSTEPS = 0.02, 10  # s
START_POSE = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.02239, -0.02239) * 2  # rad, and m for the two fingers of each arm
GRIPPER_CLOSED, GRIPPER_OPEN = 0.01844, 0.05800  # m, a finger's position where the normalised gripper is 0 and 1
PICTURE_HEIGHT, PICTURE_WIDTH, PICTURE_SAMPLES = 480, 640, 4  # pixels of the package's picture, and MSAA of one
CAMERA = "top"
PEG_RANGE = ((0.1, 0.4, 0.05), (0.2, 0.6, 0.05))  # m, lowest and highest x, y, z
SOCKET_RANGE = ((-0.2, 0.4, 0.05), (-0.1, 0.6, 0.05))
CUBE_RANGE = ((0.0, 0.4, 0.05), (0.2, 0.6, 0.05))
SUCCESS = 4  # the level, which is the package's reward, that ends an episode
FINGERS = ("vx300s_left/10_left_gripper_finger", "vx300s_right/10_right_gripper_finger")
SOCKET = ("socket-1", "socket-2", "socket-3", "socket-4")
TOOL = (0.135, 0.0, 0.0)  # m from gripper_link: between the fingertips
ARMS = ("left", "right")

TASKS = {"AlohaInsertion-v0": "insertion", "AlohaTransferCube-v0": "transfer_cube"}
FAST_SHADOWS = 512  # pixels a side of the fast backend's shadow map; the package's have 4096
MAX_POSITION, MAX_VELOCITY = 1e3, 1e4  # m or rad, and per s: beyond these the simulation has diverged
NEAR = 0.1  # m, the distance at which the progress reward's terms of distance have lost three quarters


@dataclass
class AlohaConfig:
    """The environment's flags."""

    env_id: Literal[*TASKS] = "AlohaInsertion-v0"
    """insertion: peg into socket; transfer: the right arm hands a cube to the left one"""
    env_backend: Literal["fast", "gym-aloha"] = "fast"
    """fast: the package's scene, batched, drawn small; gym-aloha: the package's own environments and pictures"""
    backend: Literal["auto", "mujoco", "warp"] = "auto"
    """engine of physics and pictures: C and OpenGL (mujoco), MuJoCo Warp, or auto: warp on CUDA, mujoco on a CPU"""
    threads: int = 0
    """threads of the mujoco backend, for physics and for pictures (0: all cores divided by the ranks)"""
    obs_type: Literal["pixels", "pixels_agent_pos", "state"] = "pixels_agent_pos"
    """pixels; pixels and joint positions; or joints and the objects' poses"""
    critic: Literal["pixels", "state"] = "pixels"
    """what the critic of a training sees: the observation, or `state`, which then stands beside it in a dict"""
    image_height: int = 84
    """rows of the observed picture (pixels)"""
    image_width: int = 84
    """columns of the observed picture (pixels)"""
    crop: tuple[float, float, float, float] = (0.28, 0.36, 0.72, 0.8)
    """left, top, right and bottom of what is observed, as shares of the package's picture of 640 x 480 pixels"""
    frame_stack: int = 1
    """stacked pictures, newest last"""
    mesh_detail: float = 0.006
    """what of the robots' meshes is finer than this is not drawn by the fast backend (m; 0: draw everything)"""
    samples: int = 0
    """samples per pixel of the fast backend's pictures, 0 or 4; 4 has the package's soft edges and costs 1.8 times"""
    supersample: int = 1
    """the fast backend draws its pictures so many times larger a side and averages: 2 has soft edges for less time"""
    shadows: bool = False
    """draw shadows in the fast backend's pictures, as the package does, at 4 times the cost"""
    action_mode: Literal["delta", "absolute"] = "delta"
    """delta: actions in [-1, 1] move the joints' targets; absolute: actions are the targets, as in the package"""
    joint_step: float = 0.03
    """how far an action of 1 moves a joint's target (rad); delta mode only"""
    gripper_step: float = 0.15
    """how far an action of 1 moves a gripper's target (0: closed, 1: open); delta mode only"""
    reward: Literal["sparse", "document", "progress"] = "progress"
    """sparse: 1 for success; document: pays for holding levels; progress: pays for getting nearer"""
    reward_gamma: float = 0.99
    """the learner's discount factor, by which the progress reward leaves the best policy unchanged"""
    episode_steps: int = 300
    """time limit of an episode (control steps of 0.02 s)"""

    @property
    def task(self) -> str:
        """The package's name of the task."""
        return TASKS[self.env_id]


def build_model(task: str) -> mujoco.MjModel:
    """The package's scene, with sensors: contacts of CONTACTS[task], and the place of the two tool points.

    Raises ValueError, in one sentence, where the package is not installed.
    """
    package = importlib.util.find_spec("gym_aloha")
    if package is None:
        raise ValueError("the package gym-aloha is missing; install it with: pip install --no-deps gym-aloha==0.1.5")
    folder = Path(package.submodule_search_locations[0]) / "assets"
    spec = mujoco.MjSpec.from_file(str(folder / f"bimanual_viperx_{task}.xml"))
    for first, second in (pair for pairs in CONTACTS[task].values() for pair in pairs):  # 1 = found: how many contacts
        sensor = spec.add_sensor(type=mujoco.mjtSensor.mjSENS_CONTACT)
        sensor.objtype, sensor.objname = mujoco.mjtObj.mjOBJ_GEOM, first
        sensor.reftype, sensor.refname = mujoco.mjtObj.mjOBJ_GEOM, second
        sensor.intprm[:3] = 1, 0, 1
    for arm in ARMS:
        spec.body(f"vx300s_{arm}/gripper_link").add_site(name=f"{arm}_tool", pos=TOOL, group=5)
        sensor = spec.add_sensor(type=mujoco.mjtSensor.mjSENS_FRAMEPOS, objtype=mujoco.mjtObj.mjOBJ_SITE)
        sensor.objname = f"{arm}_tool"
    return spec.compile()


def _all(first: str | tuple[str, ...], second: str | tuple[str, ...]) -> list[tuple[str, str]]:
    firsts = (first,) if isinstance(first, str) else first
    return [(a, b) for a in firsts for b in ((second,) if isinstance(second, str) else second)]


# What the levels ask for: does any of these pairs of geoms touch?
CONTACTS = {
    "insertion": {
        "left_socket": _all(SOCKET, FINGERS[0]),
        "right_peg": _all("red_peg", FINGERS[1]),
        "peg_table": _all("red_peg", "table"),
        "socket_table": _all(SOCKET, "table"),
        "peg_socket": _all("red_peg", SOCKET),
        "peg_pin": _all("red_peg", "pin"),
    },
    "transfer_cube": {
        "left_cube": _all("red_box", FINGERS[0]),
        "right_cube": _all("red_box", FINGERS[1]),
        "cube_table": _all("red_box", "table"),
    },
}


def camera_crop(
    model: mujoco.MjModel, crop: tuple[float, float, float, float], height: int, width: int
) -> mujoco.MjModel:
    """A copy of `model` whose camera sees the part `crop` of the package's picture, drawn in `height` x `width`."""
    model, camera = copy.copy(model), model.camera(CAMERA).id
    left, top, right, bottom = crop
    focal = PICTURE_HEIGHT / 2 / math.tan(math.radians(model.cam_fovy[camera]) / 2)  # in the package's pixels
    across, down = width / (right - left) / PICTURE_WIDTH, height / (bottom - top) / PICTURE_HEIGHT
    middle = ((left + right) / 2 - 0.5) * PICTURE_WIDTH, ((top + bottom) / 2 - 0.5) * PICTURE_HEIGHT
    model.cam_sensorsize[camera] = width, height
    model.cam_intrinsic[camera] = focal * across, focal * down, middle[0] * across, middle[1] * down
    # It looks straight down at the table, which Warp cannot work out from the table's place.
    model.cam_mode[camera] = mujoco.mjtCamLight.mjCAMLIGHT_FIXED
    model.cam_quat[camera] = 1, 0, 0, 0
    return model


def _check(cfg: AlohaConfig, num_envs: int):
    """Raises ValueError, in one sentence, for a setting that no environment can have."""

    def require(valid: bool, name: str, takes: str, got):
        if not valid:
            raise ValueError(f"--{name.replace('_', '-')} takes {takes}, got {got!r}")

    for field in fields(cfg):
        value, choices = getattr(cfg, field.name), get_args(field.type)
        if get_origin(field.type) is Literal:
            require(value in choices, field.name, f"one of {', '.join(choices)}", value)
    require(num_envs >= 1, "num_envs", "1 or more", num_envs)
    for name in ("image_height", "image_width", "frame_stack", "supersample", "episode_steps"):
        require(getattr(cfg, name) >= 1, name, "1 or more", getattr(cfg, name))
    require(cfg.samples in (0, 4), "samples", "0 or 4", cfg.samples)
    require(cfg.threads >= 0, "threads", "0 or more", cfg.threads)
    for name in ("joint_step", "gripper_step"):
        require(getattr(cfg, name) > 0, name, "a number above 0", getattr(cfg, name))
    require(cfg.mesh_detail >= 0, "mesh_detail", "0 or more metres", cfg.mesh_detail)
    require(0 < cfg.reward_gamma <= 1, "reward_gamma", "a number above 0 and at most 1", cfg.reward_gamma)
    left, top, right, bottom = cfg.crop
    inside = 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    require(inside, "crop", "left, top, right and bottom within 0 and 1", cfg.crop)


class AlohaEnv(VectorEnv):
    """A vector environment as docs/environments.md says: torch tensors, same-step autoreset, true last observations.

    Action (num_envs, 14): left arm's six joints and gripper, then the right arm's. Observation: `pixels` uint8
    (num_envs, height, width, 3 * frame_stack); a dict of it and `agent_pos`; or `state`: see docs/aloha.md. Raises
    ValueError for settings that do not fit.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_fps": round(1 / CONTROL_DT)}
    metric_names = ("success", "highest_level", "mean_reward")
    exact_resume = True  # `load_state_dict` restores all there is

    def __init__(self, num_envs: int = 1, device: str | torch.device = "cpu", seed: int = 1, **config):
        unknown = config.keys() - {f.name for f in fields(AlohaConfig)}
        if unknown:
            raise ValueError(f"AlohaEnv has no setting {', '.join(sorted(unknown))}")
        self.cfg = cfg = AlohaConfig(**config)
        _check(cfg, num_envs)
        if cfg.env_backend == "gym-aloha" and (cfg.backend == "warp" or str(device) != "cpu"):
            raise ValueError(f"--env-backend gym-aloha runs on the CPU, got --backend {cfg.backend} --device {device}")
        self.num_envs = num_envs
        self.model = build_model(cfg.task)
        engine = "mujoco" if cfg.env_backend == "gym-aloha" else cfg.backend
        threads = cfg.threads or cores_per_rank()
        self.physics = BatchedMujoco(self.model, num_envs, device, engine, threads, nconmax=64, njmax=512)
        self.device = self.physics.device
        self.package = _Package(num_envs, cfg.task, self.physics) if cfg.env_backend == "gym-aloha" else None
        self.renderer = self._make_renderer() if cfg.obs_type != "state" else None

        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._start = self._tensor(START_POSE)
        ranges = (PEG_RANGE, SOCKET_RANGE) if cfg.task == "insertion" else (CUBE_RANGE,)
        self._object_low, self._object_high = self._tensor(ranges).unbind(1)  # (objects, 3) each
        limits = self._normalised(self._tensor(self.model.actuator_ctrlrange).T)
        self._target_low, self._target_high = limits
        self._step_size = self._tensor(((cfg.joint_step,) * 6 + (cfg.gripper_step,)) * 2)

        N, pixels = num_envs, (cfg.image_height, cfg.image_width, 3 * cfg.frame_stack)
        agent_pos = 14 if cfg.action_mode == "absolute" else 28
        self.pose_dim = 7 * len(ranges)  # of the objects, last in the state
        self._state_dim = agent_pos + 14 + self.pose_dim
        box = gym.spaces.Box
        spaces = {
            "pixels": box(0, 255, pixels, "uint8"),
            "agent_pos": box(-math.inf, math.inf, (agent_pos,)),
            "state": box(-math.inf, math.inf, (self._state_dim,)),
        }
        self._names = ("pixels", "agent_pos") if cfg.obs_type == "pixels_agent_pos" else (cfg.obs_type,)
        if cfg.critic == "state" and cfg.obs_type != "state":
            self._names += ("state",)
        several = gym.spaces.Dict({name: spaces[name] for name in self._names})
        self.single_observation_space = several if len(self._names) > 1 else spaces[cfg.obs_type]
        bound = 1.0 if cfg.action_mode == "delta" else math.inf
        self.single_action_space = box(-bound, bound, (14,))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        zeros = lambda *shape: torch.zeros(*shape, device=self.device)  # noqa: E731
        # States to start from, in place of random ones: a function of the worlds (k,) where an episode begins, which
        # gives `get_state`'s dict for them.
        self.start_states: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None
        self.target = zeros(N, 14).double()  # the joints' targets, in the package's units
        self.level = torch.zeros(N, dtype=torch.long, device=self.device)  # the package's reward, 0 to 4
        self.highest_level = torch.zeros_like(self.level)
        self.potential = zeros(N)
        self.episode_length = torch.zeros_like(self.level)
        self.phase = torch.zeros_like(self.level)  # the episode length at reset
        self.totals = zeros(2, N)  # sums over the episode: the reward that is paid, and the package's
        self.frames = torch.zeros(N, *pixels, dtype=torch.uint8, device=self.device)
        self.nan_resets = torch.zeros((), dtype=torch.long, device=self.device)
        self._everyone = torch.ones(N, dtype=torch.bool, device=self.device)
        self.watched = self._everyone  # until the next reset only these are drawn; others show their last picture

    BUFFERS = ("target", "level", "highest_level", "potential", "episode_length", "phase", "totals", "frames")
    BUFFERS += ("nan_resets",)

    def _tensor(self, values) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float64, device=self.device)

    def _make_renderer(self) -> BatchedRenderer:
        """The package's own pictures to the bit (a test says so), or small ones of what is observed."""
        cfg, model = self.cfg, self.model
        if self.package:
            size, quality = (PICTURE_HEIGHT, PICTURE_WIDTH), {"shadows": True, "samples": PICTURE_SAMPLES}
        else:
            size = cfg.supersample * cfg.image_height, cfg.supersample * cfg.image_width
            quality = {"shadows": cfg.shadows, "samples": cfg.samples}
            model = camera_crop(model, cfg.crop, *size)
            model.vis.quality.shadowsize = FAST_SHADOWS
            if cfg.mesh_detail and self.physics.backend == "mujoco":
                model = decimate(model, cfg.mesh_detail)
        engine = self.physics.backend
        return BatchedRenderer(model, self.num_envs, CAMERA, *size, self.device, engine, cfg.threads, **quality)

    def _uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device=self.device)

    # --- the Gymnasium interface

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Starts all episodes; `options={"random_phase": True}` spreads their ages over the time limit."""
        if seed is not None:
            self.generator.manual_seed(seed)
        self.watched = self._everyone
        self._reset(self._everyone)
        if options and options.get("random_phase"):
            self.phase = (self._uniform(self.num_envs) * self.cfg.episode_steps).long()
            self.episode_length = self.phase
        return self._observe(self._everyone), {}

    def step(self, actions: torch.Tensor):
        """One control step of 0.02 s. See docs/environments.md for what it returns."""
        action = torch.as_tensor(actions, dtype=torch.float64, device=self.device).detach()
        healthy = torch.isfinite(action).all(1)
        target = torch.where(healthy[:, None], action, 0.0)
        if self.cfg.action_mode == "delta":
            target = self.target + self._step_size * target.clamp(-1, 1)
            target = torch.clamp(target, self._target_low, self._target_high)
        self.target = target.clone()
        self.physics.ctrl.copy_(self._controls(self.target))
        if self.package:
            healthy = healthy & self.package.step(self.target)
        else:
            self.physics.step(SUBSTEPS)
        qpos, qvel = self.physics.qpos, self.physics.qvel
        # A state that diverges is absurd before it is infinite; comparisons with NaN are false.
        finite = healthy & (qpos.abs() < MAX_POSITION).all(1) & (qvel.abs() < MAX_VELOCITY).all(1)
        if not self.package and (self.device.type == "cuda" or not bool(finite.all())):
            self._put(~finite, self._new_states())
        self.physics.forward()
        self.episode_length = self.episode_length + 1
        self.level = self.package.level.clone() if self.package else self._read_level()
        self.level = torch.where(finite, self.level, 0)

        reward = torch.where(finite, self._rewards(), 0.0)
        self.highest_level = torch.maximum(self.highest_level, self.level)
        self.totals = self.totals + torch.stack((reward, self.level.float()))
        success = self.level == SUCCESS
        terminated = success | ~finite
        truncated = (self.episode_length >= self.cfg.episode_steps) & ~terminated
        done = terminated | truncated
        self.nan_resets = self.nan_resets + (~finite).sum()

        obs = final_obs = self._observe(~self._everyone)
        length = self.episode_length - self.phase
        info = {"final_obs": final_obs, "_final_obs": done, "_episode": done, "nan_resets": self.nan_resets}
        info["episode"] = {"r": self.totals[0], "l": length, "success": success.float()}
        info["episode"] |= {"highest_level": self.highest_level.float(), "mean_reward": self.totals[1] / length}
        if self.device.type == "cuda" or bool(done.any()):
            self._reset(done)
            obs = self._observe(done, refresh=True)
        return obs, reward, terminated, truncated, info

    def close_extras(self, **kwargs):
        if self.renderer:
            self.renderer.close()

    def state_dict(self) -> dict:
        """Everything exact resume needs: physics, buffers and the random generator."""
        state = {name: getattr(self, name).clone() for name in self.BUFFERS}
        return state | {"physics": self.physics.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict):
        """Restores `state_dict()` of an environment with the same settings."""
        for name in self.BUFFERS:
            setattr(self, name, state[name].clone().to(self.device))
        self.physics.load_state_dict(state["physics"])
        if self.package:
            self.package.write(self._everyone)
        self.physics.forward()
        self.generator.set_state(state["generator"].cpu())

    # --- states to come back to

    def get_state(self, rows: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """A copy of the physics of the worlds `rows` (k,), None: all; what `set_state` and `start_states` take.

        float64 on the `mujoco` engine: `qpos` (k, nq), `qvel` (k, nv), `ctrl` (k, 16), `qacc_warmstart` (k, nv), where
        the solver starts, and `target` (k, 14), what delta actions are added to. The scenes have no actuator states,
        and nothing depends on their time.
        """
        rows = slice(None) if rows is None else rows
        return {name: getattr(self.physics, name)[rows].clone() for name in STATE} | {"target": self.target[rows]}

    def set_state(self, rows: torch.Tensor, state: dict[str, torch.Tensor]):
        """Begins an episode in each of the worlds `rows` (k,) in `state`, of `get_state`; returns all observations."""
        mask = torch.zeros_like(self._everyone)
        mask[rows] = True
        self._begin(mask, self._at(rows, state, self.get_state()))
        return self._observe(mask, refresh=True)

    def _at(self, rows: torch.Tensor, state: dict[str, torch.Tensor], others: dict[str, torch.Tensor]):
        """`others`, the states of all worlds, with `state` in `rows`."""
        whole = {name: value.clone() for name, value in others.items()}
        for name, value in whole.items():
            value[rows] = state[name].to(self.device, value.dtype)
        return whole

    def _new_states(self) -> dict[str, torch.Tensor]:
        """The package's start: arms at rest, objects somewhere on the table."""
        N, objects = self.num_envs, len(self._object_low)
        place = self._object_low + (self._object_high - self._object_low) * self._uniform(N, objects, 3)
        upright = self._tensor((1.0, 0.0, 0.0, 0.0)).expand(N, objects, 4)
        arms = self._start.expand(N, 16)
        zeros = torch.zeros(N, self.model.nv, dtype=torch.float64, device=self.device)
        qpos = torch.cat((arms, torch.cat((place, upright), 2).flatten(1)), 1)
        target = self._normalised(arms)
        return {"qpos": qpos, "qvel": zeros, "ctrl": arms, "qacc_warmstart": zeros, "target": target}

    def _put(self, mask: torch.Tensor, states: dict[str, torch.Tensor]):
        for name in STATE:
            live = getattr(self.physics, name)
            live.copy_(torch.where(mask[:, None], states[name].to(live.dtype), live))

    def _reset(self, mask: torch.Tensor):
        states = self._new_states()
        if self.start_states is not None:
            rows = mask.nonzero().flatten()
            states = self._at(rows, self.start_states(rows), states)
        self._begin(mask, states)

    def _begin(self, mask: torch.Tensor, states: dict[str, torch.Tensor]):
        self._put(mask, states)
        if self.package:
            self.package.write(mask)
        self.physics.forward()
        self.target = torch.where(mask[:, None], states["target"], self.target)
        self.level = torch.where(mask, self._read_level(), self.level)
        self.highest_level = torch.where(mask, self.level, self.highest_level)
        self.potential = torch.where(mask, self._potential(), self.potential)
        for name in ("episode_length", "phase"):
            setattr(self, name, getattr(self, name).masked_fill(mask, 0))
        self.totals = self.totals.masked_fill(mask, 0.0)

    # --- units, observation and reward

    def _controls(self, target: torch.Tensor) -> torch.Tensor:
        """(..., 16) controls, a finger each, of targets (..., 14)."""
        left, right = (arm for arm in target.split(7, -1))
        finger = lambda arm: arm[..., 6:] * (GRIPPER_OPEN - GRIPPER_CLOSED) + GRIPPER_CLOSED  # noqa: E731
        parts = [(arm[..., :6], finger(arm), -finger(arm)) for arm in (left, right)]
        return torch.cat([part for arm in parts for part in arm], -1)

    def _normalised(self, joints: torch.Tensor, offset: float = GRIPPER_CLOSED) -> torch.Tensor:
        """(..., 14) in the package's units of the arms' joints or controls (..., 16); velocities have no `offset`."""
        gripper = lambda finger: (finger - offset) / (GRIPPER_OPEN - GRIPPER_CLOSED)  # noqa: E731
        left, right = joints.split(8, -1)
        parts = [(arm[..., :6], gripper(arm[..., 6:7])) for arm in (left, right)]
        return torch.cat([part for arm in parts for part in arm], -1)

    def _observe(self, new: torch.Tensor, refresh: bool = False):
        """`new` marks episodes that begin, whose stack is filled with their first picture; `refresh` leaves the others
        as they were observed last.
        """
        cfg, qpos = self.cfg, self.physics.qpos
        agent_pos = self._normalised(qpos[:, :16])
        if cfg.action_mode == "delta":  # what the next action is added to
            agent_pos = torch.cat((agent_pos, self.target.to(agent_pos.dtype)), 1)
        obs = {"agent_pos": agent_pos.float()}
        if "state" in self._names:
            joint_vel = self._normalised(self.physics.qvel[:, :16], 0.0)
            obs["state"] = torch.cat((agent_pos, joint_vel, qpos[:, 16:]), 1).float()
        if cfg.obs_type == "state":
            return obs["state"]
        rows = (new & self.watched if refresh else self.watched).nonzero().flatten()
        pictures = self._pictures(rows)
        self.frames = self.frames.clone() if refresh else torch.cat((self.frames[..., 3:], self.frames[..., :3]), -1)
        self.frames[rows, ..., -3:] = pictures
        if cfg.frame_stack > 1:
            first = self.frames[..., -3:].repeat(1, 1, 1, cfg.frame_stack)
            self.frames = torch.where(new[:, None, None, None], first, self.frames)
        obs["pixels"] = self.frames  # never written again: the next frames are a copy
        return {name: obs[name] for name in self._names} if len(self._names) > 1 else obs["pixels"]

    def _pictures(self, rows: torch.Tensor) -> torch.Tensor:
        """uint8 (rows, image_height, image_width, 3)."""
        cfg, pictures = self.cfg, self.renderer.render(self.physics.qpos, rows)
        if self.package:
            left, top, right, bottom = cfg.crop
            across = slice(round(left * PICTURE_WIDTH), round(right * PICTURE_WIDTH))
            down = slice(round(top * PICTURE_HEIGHT), round(bottom * PICTURE_HEIGHT))
            pictures = pictures[:, down, across]
        elif cfg.supersample == 1:
            return pictures
        small = adaptive_avg_pool2d(pictures.permute(0, 3, 1, 2).float(), (cfg.image_height, cfg.image_width))
        return small.round().to(torch.uint8).permute(0, 2, 3, 1)

    def _read_level(self) -> torch.Tensor:
        """The package's reward, tasks/sim.py: (num_envs,) from 0 to 4."""
        pairs = CONTACTS[self.cfg.task]
        count = sum(map(len, pairs.values()))
        groups = (self.physics.sensordata[:, :count] > 0).split([len(p) for p in pairs.values()], 1)
        touch = {name: group.any(1) for name, group in zip(pairs, groups, strict=True)}
        if self.cfg.task == "insertion":
            held, free = touch["left_socket"] & touch["right_peg"], ~touch["peg_table"] & ~touch["socket_table"]
            levels = (held, held & free, touch["peg_socket"] & free, touch["peg_pin"])
        else:
            right, left, free = touch["right_cube"], touch["left_cube"], ~touch["cube_table"]
            levels = (right, right & free, left, left & free)
        level = torch.zeros_like(self.episode_length)
        for i, reached in enumerate(levels):
            level = torch.where(reached, i + 1, level)
        return level

    def _potential(self) -> torch.Tensor:
        """(num_envs,) from 0 to 1, of the progress reward: how near the task is to its end. Half of it is the level;
        the rest says the same without steps: tools near their objects, objects up, and one object before the other.
        """
        near = lambda distance: 1 - torch.tanh(distance.norm(dim=-1) / NEAR)  # noqa: E731
        left, right = self.physics.sensordata[:, -6:].split(3, 1)
        pose = self.physics.qpos[:, 16:]
        lifted = lambda z: ((z - 0.02) / 0.1).clamp(0, 1)  # noqa: E731
        if self.cfg.task == "insertion":
            peg, socket = pose[:, :3], pose[:, 7:10]
            before = self._tensor((0.12, 0.0, 0.0)).to(peg.dtype)  # the peg's place at the mouth of the socket
            up = torch.minimum(lifted(peg[:, 2]), lifted(socket[:, 2]))
            terms = (near(left - socket), near(right - peg), up, near(peg - socket - before) * up)
        else:
            cube = pose[:, :3]
            up = lifted(cube[:, 2])
            terms = (near(right - cube).maximum(near(left - cube)), up, near(left - cube) * up)
        return (0.5 * self.level / SUCCESS + 0.5 * torch.stack(terms).mean(0)).float()

    def _rewards(self) -> torch.Tensor:
        """Reward (num_envs,). `progress`: potential-based shaping (Ng, Harada and Russell 1999), which leaves the best
        policy what it is, on a reward for success.
        """
        success = self.level == SUCCESS
        if self.cfg.reward == "sparse":
            return success.float()
        if self.cfg.reward == "document":
            return 0.01 * self.level + 0.1 * (self.level - self.highest_level).clamp(min=0)
        potential = torch.where(success, 1.0, self._potential())
        reward = success + self.cfg.reward_gamma * potential - self.potential
        self.potential = potential
        return reward.float()


class _Package:
    """The package's own environments, one per world. Their state is copied to `physics` after every step.

    Two things of theirs are mended: they drew three cameras of 480 x 640 at every step, which `AlohaEnv` draws itself
    and once; and a simulation that diverged raised an exception, which here ends that episode alone.
    """

    def __init__(self, num_envs: int, task: str, physics: BatchedMujoco):
        find_gl()  # names a way to render before dm_control is imported, which otherwise complains of no display
        from dm_control.rl.control import PhysicsError
        from gym_aloha.env import AlohaEnv as PackageEnv
        from gym_aloha.tasks import sim

        self.error, self.sim, self.physics = PhysicsError, sim, physics
        self.envs = [PackageEnv(task=task, obs_type="pixels") for _ in range(num_envs)]
        for env in self.envs:
            env._env.task.get_observation = lambda physics: {"images": {"top": physics.data.qpos}}
        self.level = torch.zeros(num_envs, dtype=torch.long)

    def step(self, target: torch.Tensor) -> torch.Tensor:
        """Steps every world to joint targets (num_envs, 14); (num_envs,) bool: whose simulation did not diverge."""
        healthy = torch.ones(len(self.envs), dtype=torch.bool)
        for i, env in enumerate(self.envs):
            try:
                _, reward, _, _, _ = env.step(target[i].numpy())
            except self.error:
                healthy[i] = False
                continue
            self.level[i] = int(reward)
            for name in STATE:
                getattr(self.physics, name)[i] = torch.from_numpy(getattr(env._env.physics.data, name))
        return healthy

    def write(self, mask: torch.Tensor):
        """Begins an episode in the worlds of `mask` in the state of `physics`."""
        for i in mask.nonzero().flatten().tolist():
            env = self.envs[i]
            self.sim.BOX_POSE[0] = self.physics.qpos[i, 16:].numpy()
            env._env.reset()
            for name in STATE:
                getattr(env._env.physics.data, name)[:] = getattr(self.physics, name)[i].numpy()
            env._env.physics.forward()


for _name in TASKS:
    gym.register(_name, vector_entry_point="common.envs.aloha:AlohaEnv", kwargs={"env_id": _name})
