"""Pick-and-place of scanned objects with a Franka Panda, batched in MuJoCo.

See docs/real2sim.md for spaces, rewards and what they were modelled on. A control step of 20 ms, physics steps of 5 ms,
delta-joint actions of 0.04 rad and a box to a target in the air are those of PandaPickCube (MuJoCo Playground); the
staged reward and the threshold of success are near ManiSkill's PickCube.
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import gymnasium as gym
import mujoco
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from common.panda import LOWER, UPPER, Frames, quaternion_down
from common.physics import BatchedMujoco, resolve_backend

ASSET = Path(__file__).parent.parent / "assets" / "real2sim.xml"
SUBSTEPS = 4  # physics steps of 5 ms per control step: 50 Hz
JOINT_STEP = 0.04  # rad, a joint's target per control step at action 1
FINGER_STEP = 0.004  # m, a finger's
LEAD = 0.2  # rad, how far a target may run ahead of its joint
FINGER_MAX = 0.04  # m
HOME = (0.0, 0.1963, 0.0, -2.2, 0.0, 2.3963, 0.7854)  # rad: the hand over the table's middle, pointing down
HOME_NOISE = 0.02  # rad, half width
TCP = 0.1034  # m along the hand's z axis, between the pads
CENTRE = (0.5, 0.0)  # m, the middle of the areas of object and goal
TABLE_MIN, TABLE_MAX = (-0.2, -0.6), (0.9, 0.6)  # m; an object whose centre is beyond has fallen off
HELD_FORCE = 1.0  # N of each finger
HELD_SPEED = 0.05  # m/s, fingers that still move are on their way
SUCCESS_DISTANCE = 0.025  # m from the goal
NEAR = 0.02  # m from what is to be grasped: the fingers are round it
TERMS = {"reach": 0.15, "grasp": 0.15, "lift": 0.15, "place": 0.25, "success": 0.3}  # weights of the dense reward
MAX_POSITION, MAX_VELOCITY = 10.0, 1e3  # m or rad, and per s: beyond these the simulation has diverged


@dataclass
class Real2SimConfig:
    """The environment's flags."""

    backend: Literal["auto", "mujoco", "warp"] = "auto"
    """physics engine: C thread pool (mujoco), MuJoCo Warp, or auto: warp on CUDA, mujoco on a CPU"""
    observation: Literal["compact", "full"] = "compact"
    """compact: 25 numbers, without the joints' state; full: 58, with it"""
    reward: Literal["dense", "sparse"] = "dense"
    """dense: reach, grasp, lift, place and success, each from 0 to 1, by their weights; sparse: 1 at the goal, else -1"""
    object_area: tuple[float, float] = (0.1, 0.15)
    """half widths along x and y of the area where the object lies at first (m)"""
    object_yaw: float = 0.785
    """the object is turned by up to this about the vertical (rad)"""
    goal_area: tuple[float, float] = (0.1, 0.15)
    """half widths along x and y of the volume of goals (m)"""
    goal_height: tuple[float, float] = (0.1, 0.25)
    """lowest and highest goal of the object's centre above the table (m)"""
    max_episode_steps: int = 200
    """time limit of an episode (control steps of 20 ms)"""


ENV_SETTINGS = tuple(field.name for field in fields(Real2SimConfig))


def build_model(cfg: Real2SimConfig, visual: bool = False) -> mujoco.MjModel:
    """Robot, table and object. What may touch is listed pair by pair, so a solver step looks at nothing else."""
    spec = mujoco.MjSpec.from_file(str(ASSET))
    spec.compiler.discardvisual = not visual
    for flag in ("ISLAND", "MIDPHASE", "EQUALITY", "EULERDAMP"):
        spec.option.disableflags |= getattr(mujoco.mjtDisableBit, f"mjDSBL_{flag}")
    for name in ("finger_joint1", "finger_joint2"):
        spec.joint(name).armature = 0.5  # kg: with the 0.1 of the Panda's model the grip chatters at 5 ms
    palm = spec.body("hand").add_geom(name="palm", type=mujoco.mjtGeom.mjGEOM_CAPSULE, group=4)
    palm.fromto[:] = (0, -0.06, 0.03, 0, 0.06, 0.03)
    palm.size[0] = 0.036
    palm.contype = palm.conaffinity = 0

    body = spec.worldbody.add_body(name="object", pos=(*CENTRE, 0.03))
    body.add_freejoint(name="object")
    geom = body.add_geom(name="object0", type=mujoco.mjtGeom.mjGEOM_BOX, size=(0.02, 0.02, 0.03), material="object")
    geom.contype = geom.conaffinity = 0
    body.explicitinertial = True
    body.mass = 0.1
    body.ipos[:] = 0.0
    body.inertia[:] = 0.1 / 3 * (0.02**2 + 0.03**2), 0.1 / 3 * (0.02**2 + 0.03**2), 0.1 / 3 * (2 * 0.02**2)
    for hand in ("left_pad", "right_pad", "palm"):
        _add_pair(spec, hand, "table", 0.5)
    for name, friction in (("left_pad", 1.0), ("right_pad", 1.0), ("palm", 0.5), ("table", 0.7)):
        _add_pair(spec, name, "object0", friction)
    return spec.compile()


def _add_pair(spec: mujoco.MjSpec, first: str, second: str, friction: float):
    pair = spec.add_pair(geomname1=first, geomname2=second)
    pair.condim = 3
    pair.friction[:] = friction, friction, 0.005, 0.0001, 0.0001
    pair.solref[:] = 0.01, 1.0  # s: two physics steps, the stiffest that is stable
    pair.solimp[:3] = 0.8, 0.99, 0.001


def _check(cfg: Real2SimConfig, num_envs: int):
    """Raises ValueError, in one sentence, for a setting that no environment can have."""

    def require(valid: bool, name: str, takes: str, got):
        if not valid:
            raise ValueError(f"--{name.replace('_', '-')} takes {takes}, got {got!r}")

    for field in fields(cfg):
        value, choices = getattr(cfg, field.name), get_args(field.type)
        if get_origin(field.type) is Literal:
            require(value in choices, field.name, f"one of {', '.join(choices)}", value)
    require(num_envs >= 1, "num_envs", "1 or more", num_envs)
    require(cfg.max_episode_steps >= 1, "max_episode_steps", "1 or more", cfg.max_episode_steps)
    for name, most in (("object_area", 0.25), ("goal_area", 0.25)):
        value = getattr(cfg, name)
        require(all(0 <= x <= most for x in value), name, f"two numbers from 0 to {most} (m)", value)
    low, high = cfg.goal_height
    require(0 <= low <= high <= 0.5, "goal_height", "two rising numbers from 0 to 0.5 (m)", cfg.goal_height)
    require(0 <= cfg.object_yaw <= math.pi, "object_yaw", "a number from 0 to pi (rad)", cfg.object_yaw)


class Real2SimEnv(VectorEnv):
    """A vector environment as docs/environments.md says: torch tensors, same-step autoreset, true last observations.

    Action (num_envs, 9), clipped to -1 to 1: by how much the targets of the seven joints move, in units of JOINT_STEP,
    and those of the two fingers, in units of FINGER_STEP (positive: open). Observation: see `_observe`. An episode is
    terminated where the object falls off the table (not with the sparse reward, where that would end a punishment).
    Raises ValueError for settings that do not fit.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_fps": 50}
    exact_resume = True  # `load_state_dict` restores all there is

    def __init__(
        self,
        num_envs: int = 1,
        device: str | torch.device = "cpu",
        seed: int = 1,
        cfg: Real2SimConfig | None = None,
        physics_threads: int = 0,
        **config,
    ):
        unknown = config.keys() - set(ENV_SETTINGS)
        if unknown:
            raise ValueError(f"Real2SimEnv has no setting {', '.join(sorted(unknown))}")
        cfg = cfg or Real2SimConfig()
        self.cfg = cfg = replace(Real2SimConfig(**{name: getattr(cfg, name) for name in ENV_SETTINGS}), **config)
        _check(cfg, num_envs)
        self.device, backend = resolve_backend(cfg.backend, device)
        self.num_envs = num_envs
        self.model = build_model(cfg)
        self.physics = BatchedMujoco(self.model, num_envs, device, backend, physics_threads, nconmax=24, njmax=96)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._gain = float(self.model.actuator("left_finger").gainprm[0])  # N/m
        self._damping = -float(self.model.actuator("left_finger").biasprm[2])  # N s/m
        self._rest_height = 0.03

        self._lower, self._upper = self._tensor((*LOWER, 0, 0)), self._tensor((*UPPER, FINGER_MAX, FINGER_MAX))
        self._action_scale = self._tensor((JOINT_STEP,) * 7 + (FINGER_STEP,) * 2)
        self._home = self._tensor((*HOME, FINGER_MAX, FINGER_MAX))
        self._home_noise = self._tensor((HOME_NOISE,) * 7 + (0, 0))
        self._centre = self._tensor(CENTRE)
        self._table_min, self._table_max = self._tensor(TABLE_MIN), self._tensor(TABLE_MAX)
        self._object_area, self._goal_area = self._tensor(cfg.object_area), self._tensor(cfg.goal_area)
        self._weights = self._tensor(tuple(TERMS.values()))[:, None]

        width = 25 if cfg.observation == "compact" else 58
        self.single_observation_space = gym.spaces.Box(-math.inf, math.inf, (width,))
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (9,))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        N, zeros = num_envs, lambda *shape: torch.zeros(*shape, device=self.device)
        self.target = zeros(N, 9)  # rad and m, of joints and fingers
        self.goal = zeros(N, 3)  # m, of the object's centre
        self.episode_length = torch.zeros(N, dtype=torch.long, device=self.device)
        self.phase = torch.zeros_like(self.episode_length)  # the episode length at reset
        self.succeeded = torch.zeros(N, dtype=torch.bool, device=self.device)
        self.totals = zeros(1 + len(TERMS), N)  # sums over the episode: return and its terms
        self.nan_resets = torch.zeros((), dtype=torch.long, device=self.device)
        self._everyone = torch.ones(N, dtype=torch.bool, device=self.device)

    BUFFERS = ("target", "goal", "episode_length", "phase", "succeeded", "totals", "nan_resets")

    def _tensor(self, values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def _uniform(self, *shape: int, low: float = -1.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    # --- the Gymnasium interface

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Starts all episodes; `options={"random_phase": True}` spreads their ages over the time limit."""
        if seed is not None:
            self.generator.manual_seed(seed)
        self._reset(self._everyone)
        if options and options.get("random_phase"):
            limit = self.cfg.max_episode_steps
            self.phase = torch.randint(limit, (self.num_envs,), generator=self.generator, device=self.device)
            self.episode_length = self.phase.clone()
        self._read_state()
        return self._observe(), {}

    def step(self, actions: torch.Tensor):
        """Advances all environments by 20 ms; see docs/environments.md for what it returns."""
        actions = torch.as_tensor(actions, dtype=torch.float32, device=self.device).clamp(-1.0, 1.0)
        target = self.target + self._action_scale * actions
        target = torch.maximum(torch.minimum(target, self.q + LEAD), self.q - LEAD)
        self.target = torch.maximum(torch.minimum(target, self._upper), self._lower)
        self.physics.ctrl.copy_(self.target)
        self.physics.step(SUBSTEPS)
        self.episode_length = self.episode_length + 1
        self._read_state()

        terms = self._terms()
        reward = self._reward(terms)
        # A state that diverges is absurd before it is infinite; comparisons with NaN are false.
        finite = (self.physics.qpos.abs() < MAX_POSITION).all(1) & (self.physics.qvel.abs() < MAX_VELOCITY).all(1)
        finite = finite & torch.isfinite(self.target).all(1) & torch.isfinite(reward)
        reward = torch.where(finite, reward, 0.0)
        self.totals = self.totals + torch.where(finite, torch.cat((reward[None], terms)), 0.0)
        self.succeeded = self.succeeded | (self.at_goal & finite)
        terminated = ~finite
        if self.cfg.reward != "sparse":
            terminated = terminated | self.fallen
        truncated = (self.episode_length >= self.cfg.max_episode_steps) & ~terminated
        done = terminated | truncated
        self.nan_resets = self.nan_resets + (~finite).sum()

        obs = final_obs = torch.where(finite[:, None], self._observe(), 0.0)
        info = {"final_obs": final_obs, "_final_obs": done, "_episode": done, "nan_resets": self.nan_resets}
        info["episode"] = self._episode(finite)
        # Asking whether any episode ended saves the CPU this work; on a GPU the question would stall the queue.
        if self.device.type == "cuda" or bool(done.any()):
            self._reset(done)
            self._read_state()
            obs = torch.where(done[:, None], self._observe(), final_obs)
        return obs, reward, terminated, truncated, info

    def _episode(self, finite: torch.Tensor) -> dict[str, torch.Tensor]:
        length = self.episode_length - self.phase
        episode = {"r": self.totals[0], "l": length, "success": (self.at_goal & finite).float()}
        episode |= {"success_once": self.succeeded.float(), "fallen": (self.fallen & finite).float()}
        episode |= {"goal_distance": torch.where(finite, self.goal_distance, 0.0)}
        return episode | {f"reward_{name}": self.totals[1 + i] / length for i, name in enumerate(TERMS)}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The environment's own entries of `info["episode"]`."""
        return ("success", "success_once", "fallen", "goal_distance", *(f"reward_{name}" for name in TERMS))

    def state_dict(self) -> dict:
        """Everything exact resume needs: physics, buffers and the random generator."""
        state = {name: getattr(self, name).clone() for name in self.BUFFERS}
        return state | {"physics": self.physics.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict):
        """Restores `state_dict()` of an environment with the same settings."""
        for name in self.BUFFERS:
            setattr(self, name, state[name].clone().to(self.device))
        self.physics.load_state_dict(state["physics"])
        self.generator.set_state(state["generator"].cpu())
        self._read_state()

    # --- state and observation

    def _read_state(self):
        qpos, qvel = self.physics.qpos.float(), self.physics.qvel.float()
        self.q, self.qd = qpos[:, :9], qvel[:, :9]
        self.object, self.object_quat = qpos[:, 9:12], qpos[:, 12:16]
        self.object_velocity = qvel[:, 9:15]
        frames = Frames(self.q[:, :7])
        self.tcp, self.hand_rotation = frames.point(TCP), frames.rotation
        self.to_object = self.object - self.tcp
        self.to_goal = self.goal - self.object
        self.goal_distance = self.to_goal.norm(dim=1)
        self.at_goal = self.goal_distance < SUCCESS_DISTANCE
        fingers, speed = self.q[:, 7:], self.qd[:, 7:]
        force = self._gain * (fingers - self.target[:, 7:]) + self._damping * speed  # N, of the servos, closing
        self.held = ((force > HELD_FORCE) & (speed.abs() < HELD_SPEED)).all(1)  # nothing but an object stops a finger
        xy = self.object[:, :2]
        self.fallen = ((xy < self._table_min) | (xy > self._table_max)).any(1)

    def _observe(self) -> torch.Tensor:
        """(num_envs, 25), positions (m) in the robot's base, quaternions w, x, y, z:

        0-2 hand (the point between the pads), 3-6 its quaternion (x > 0), 7-9 object, 10-13 its quaternion (w >= 0),
        14-16 from hand to object, 17-19 from object to goal, 20-22 goal, 23 opening of the gripper, 24 the opening that
        it was told. `full` goes on to 58: 25-33 positions of joints (rad) and fingers (m), 34-42 their velocities,
        43-51 their targets less their positions, 52-57 the object's velocity (m/s and, in its own axes, rad/s).
        """
        quat = torch.where(self.object_quat[:, :1] < 0, -self.object_quat, self.object_quat)
        parts = [self.tcp, quaternion_down(self.hand_rotation), self.object, quat, self.to_object, self.to_goal]
        parts += [self.goal, self.q[:, 7:].sum(1, keepdim=True), self.target[:, 7:].sum(1, keepdim=True)]
        if self.cfg.observation == "full":
            parts += [self.q, self.qd, self.target - self.q, self.object_velocity]
        return torch.cat(parts, 1)

    # --- rewards

    def _terms(self) -> torch.Tensor:
        """(terms, num_envs), each from 0 to 1, in the order of TERMS."""
        held = self.held.float()
        down = (-self.hand_rotation[:, 2, 2]).clamp(0, 1)  # 1 where the hand points down
        distance = self.to_object.norm(dim=1)
        reach = (1 - torch.tanh(5 * distance)) * down
        # Fingers that are open on the way and close round the object: a closed hand on top of it is a trap otherwise.
        opening = self.q[:, 7:].sum(1) / (2 * FINGER_MAX)
        grasp = torch.where(distance < NEAR, 0.5 - 0.25 * opening, 0.25 * opening).clamp(0, 1)
        grasp = torch.where(self.held, 1.0, grasp)
        lift = ((self.object[:, 2] - self._rest_height) / 0.05).clamp(0, 1) * held
        place = (1 - torch.tanh(5 * self.goal_distance)) * held
        return torch.stack((reach, grasp, lift, place, self.at_goal.float()))

    def _reward(self, terms: torch.Tensor) -> torch.Tensor:
        """(num_envs,)"""
        if self.cfg.reward == "sparse":
            return 2 * self.at_goal.float() - 1
        return (self._weights * terms).sum(0)

    # --- resets

    def _reset(self, mask: torch.Tensor):
        """Begins an episode where `mask`: the hand open over the table, the object on it, a goal in the air."""
        N = self.num_envs
        q = self._home + self._home_noise * self._uniform(N, 9)
        xy = self._centre + self._object_area * self._uniform(N, 2)
        yaw = self.cfg.object_yaw * self._uniform(N)
        low, high = self.cfg.goal_height
        goal = torch.cat((self._centre + self._goal_area * self._uniform(N, 2), self._uniform(N, 1, low=low, high=high)), 1)
        zero = torch.zeros_like(yaw)
        height = zero + self._rest_height
        quat = torch.stack((torch.cos(yaw / 2), zero, zero, torch.sin(yaw / 2)), 1)
        qpos = torch.cat((q, xy, height[:, None], quat), 1)
        self.physics.reset(mask, qpos, torch.zeros(N, self.model.nv, device=self.device))
        self.goal = torch.where(mask[:, None], goal, self.goal)
        self.target = torch.where(mask[:, None], q, self.target)
        for name in ("episode_length", "phase", "succeeded"):
            setattr(self, name, getattr(self, name).masked_fill(mask, 0))
        self.totals = self.totals.masked_fill(mask, 0.0)


gym.register("Real2Sim-v0", vector_entry_point="common.envs.real2sim:Real2SimEnv")
