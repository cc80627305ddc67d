"""Peg insertion with a Franka Panda, batched in MuJoCo: the twin of Isaac Lab's Factory PegInsert.

See docs/peginsert.md for spaces, rewards and what differs. Source of every constant that no comment gives: Isaac Lab,
isaaclab_tasks/direct/factory (Narang et al. 2022, arXiv 2205.03532; Tang et al. 2024, arXiv 2408.04587).
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from common import tactile
from common.panda import LOWER, UPPER, Frames, MassMatrix, inverse_kinematics, quaternion_down
from common.physics import BatchedMujoco, resolve_backend
from common.render import BatchedRenderer

ASSET = Path(__file__).parent.parent / "assets" / "peg_insert.xml"
PHYSICS_DT = 1 / 120  # s, Factory's
DECIMATION = 8  # of those per control step: 15 Hz
EMA = 0.2  # share of the newest action in the one that is executed
POSITION_STEP = 0.02  # m, the target's distance from the fingertip at action 1
YAW_STEP = 0.097  # rad
POSITION_BOUND = 0.05  # m, half side of the box around the hole that the target never leaves
NULL_POSE = (-1.3003, -0.4015, 1.1791, -2.1493, 0.4001, 1.9425, 0.4754)  # rad
NULL_KP, NULL_KD = 10.0, 6.3246  # 1/s2, 1/s
# rad, where inverse kinematics starts: over the middle of the workspace, where the null space's torques are zero.
RESET_POSE = (-0.533, 0.4967, 0.5496, -2.0195, -0.3841, 2.4151, 1.0398)
FINGERTIP = 0.112071  # m from the hand's frame along its z
PEG_LENGTH, PEG_RADIUS, GRIP_DEPTH = 0.05, 0.003993, 0.017608  # m; the pads hold the upper GRIP_DEPTH of the peg
HOLE_DEPTH, HOLE_RADIUS = 0.025, 0.00405  # m
HOLE_POSITION = (0.6, 0.0, 0.05)  # m, the middle of the hole's floor
HAND_HEIGHT = 0.047  # m of the fingertip above the hole's rim when an episode begins
# Half widths of uniform noise at difficulty 1.
HOLE_NOISE, HOLE_YAW = (0.05, 0.05, 0.05), math.pi  # m, rad
HAND_NOISE, HAND_YAW = (0.02, 0.02, 0.01), 0.785  # m, rad
GRASP_NOISE = (0.003, 0.0, 0.003)  # m, in the hand's axes
OBSERVATION_NOISE = 0.001  # m, standard deviation of the hole's position, one draw per episode
CLEARANCE = (0.002, 2 * (HOLE_RADIUS - PEG_RADIUS))  # m, hole's diameter less the peg's, at difficulty 0 and 1
GRASPED = 0.0035  # m, a finger's position when it holds the peg: the pads give by half a millimetre
GRIP_FORCE = 7500 * GRASPED  # N, a finger's
KEYPOINTS = (-0.075, -0.025, 0.025, 0.075)  # m along the peg's axis, from its lower end
KEYPOINT_TERMS = {"baseline": (5.0, 4.0), "coarse": (50.0, 2.0), "fine": (100.0, 0.0)}  # (a, b) of `squash`
TERMS = (*KEYPOINT_TERMS, "engaged", "success")
CENTRED = 0.0025  # m, the largest horizontal error of a peg that is engaged or seated
ENGAGED, SEATED = 0.9 * HOLE_DEPTH, 0.04 * HOLE_DEPTH  # m above the floor
PADS, GRIPS = ("left_pad", "right_pad"), ("grip_low", "grip_high")  # each pad touches each grip in one point
GRIP_HEIGHTS = (0.0365, 0.046)  # m above the peg's lower end
TAXELS = 32  # per side of a pad
TACTILE_SPREAD = 0.0015  # m, standard deviation of the print of a point force
MODALITIES = ("rgb", "tactile", "proprio")
MAX_POSITION, MAX_VELOCITY = 10.0, 1e3  # m or rad, and per s: beyond these the simulation has diverged


@dataclass
class PegInsertConfig:
    """The environment's flags."""

    backend: Literal["auto", "mujoco", "warp"] = "auto"
    """physics engine: C thread pool (mujoco), MuJoCo Warp, or auto: warp on CUDA, mujoco on a CPU"""
    substeps: int = 2
    """physics steps per 1/120 s"""
    solver_iterations: int = 20
    """most iterations of the constraint solver (Newton)"""
    observation: Literal["state", "multimodal"] = "state"
    """state: Factory's 19 numbers, the hole's noisy position among them; multimodal: a dict of the modalities"""
    modalities: tuple[Literal["rgb", "tactile", "proprio"], ...] = MODALITIES
    """what a multimodal observation consists of"""
    camera: Literal["wrist", "side"] = "wrist"
    """the camera of rgb"""
    image_size: int = 64
    """height and width of rgb (pixels)"""
    normalize_joint_angles: bool = True
    """proprioception has joint angles as -1 to 1 between their limits, not in rad"""
    difficulty: float = 1.0
    """0: 2 mm clearance, no randomisation; 1: Factory's 0.114 mm and randomisation"""
    clearance: float = 0.0
    """hole's diameter less the peg's (m) at every difficulty, which then scales the randomisation alone (0: both)"""
    curriculum: bool = False
    """every environment's difficulty starts at 0, rises with its successes and falls with its failures"""
    curriculum_step: float = 0.03
    """by which a success raises an environment's difficulty; a failure lowers it by twice as much"""
    max_episode_steps: int = 150
    """time limit of an episode (control steps of 1/15 s)"""


ENV_SETTINGS = tuple(field.name for field in fields(PegInsertConfig))


def build_model(cfg: PegInsertConfig, visual: bool = False) -> mujoco.MjModel:
    """Robot, peg and hole with the physics options of `cfg`."""
    spec = mujoco.MjSpec.from_file(str(ASSET))
    spec.compiler.discardvisual = not visual
    option = spec.option
    option.timestep = PHYSICS_DT / cfg.substeps
    option.solver = mujoco.mjtSolver.mjSOL_NEWTON
    option.iterations, option.ls_iterations = cfg.solver_iterations, 50
    option.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    option.ccd_tolerance = 1e-8  # m: contacts here are micrometres deep
    for pair in spec.pairs:
        pair.solref[0] = 2 * option.timestep  # s, the stiffest that is stable
    # Several points per pair of geoms cost a third of the time; eight walls hold the peg upright with one each.
    for flag in ("ISLAND", "MIDPHASE", "EQUALITY", "MULTICCD"):
        option.disableflags |= getattr(mujoco.mjtDisableBit, f"mjDSBL_{flag}")
    if _observes(cfg, "tactile"):
        tactile.add_sensors(spec, "fingertip", PADS, GRIPS)
    return spec.compile()


def _picture_model(cfg: PegInsertConfig) -> mujoco.MjModel:
    """What small pictures need: round shapes with a third of the usual faces, and no arm where it is out of sight. A
    CPU draws it five times as fast.
    """
    model = build_model(cfg, visual=True)
    quality = model.vis.quality
    quality.numslices, quality.numstacks, quality.numquads = 12, 6, 1
    if cfg.camera == "wrist":
        links = [model.body(f"link{i}").id for i in range(8)]
        model.geom_group[np.isin(model.geom_bodyid, links)] = 5  # a group that is not drawn
    return model


def _observes(cfg: PegInsertConfig, modality: str) -> bool:
    return cfg.observation == "multimodal" and modality in cfg.modalities


def squash(distance: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """1 / (e^(a d) + b + e^(-a d)), the keypoint reward of arXiv 2408.04587, appendix B."""
    return 1 / (torch.exp(a * distance) + b + torch.exp(-a * distance))


def _check(cfg: PegInsertConfig, num_envs: int):
    """Raises ValueError, in one sentence, for a setting that no environment can have."""

    def require(valid: bool, name: str, takes: str, got):
        if not valid:
            raise ValueError(f"--{name.replace('_', '-')} takes {takes}, got {got!r}")

    for field in fields(cfg):
        value, choices = getattr(cfg, field.name), get_args(field.type)
        if get_origin(field.type) is Literal:
            require(value in choices, field.name, f"one of {', '.join(choices)}", value)
    require(num_envs >= 1, "num_envs", "1 or more", num_envs)
    known = bool(cfg.modalities) and set(cfg.modalities) <= set(MODALITIES)
    require(known, "modalities", f"one or more of {', '.join(MODALITIES)}", cfg.modalities)
    for name in ("substeps", "solver_iterations", "max_episode_steps", "image_size"):
        require(getattr(cfg, name) >= 1, name, "1 or more", getattr(cfg, name))
    require(0 <= cfg.difficulty <= 1, "difficulty", "a number from 0 to 1", cfg.difficulty)
    widest = 2 * CENTRED  # beyond it a peg in the hole might not count as seated
    require(0 <= cfg.clearance <= widest, "clearance", f"metres, from 0 to {widest:g}", cfg.clearance)
    require(0 < cfg.curriculum_step <= 1, "curriculum_step", "a number above 0, at most 1", cfg.curriculum_step)


def _where(mask: torch.Tensor, new, old):
    """torch.where over rows, of two tensors or of two dicts; `old` may be a number."""
    if isinstance(new, dict):
        return {k: _where(mask, value, old[k] if isinstance(old, dict) else old) for k, value in new.items()}
    return torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, old)


class PegInsertEnv(VectorEnv):
    """A vector environment as docs/environments.md says: torch tensors, same-step autoreset, true last observations.

    Action (num_envs, 6), clipped to -1 to 1: the fingertip's displacement in units of POSITION_STEP along x, y, z of
    the robot's base, then a rotation in units of YAW_STEP, of which the hand, kept upright, obeys the last.
    Observation: see docs/peginsert.md. Raises ValueError for settings that do not fit.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_fps": round(1 / (PHYSICS_DT * DECIMATION))}
    exact_resume = True  # `load_state_dict` restores all there is

    def __init__(
        self,
        num_envs: int = 1,
        device: str | torch.device = "cpu",
        seed: int = 1,
        cfg: PegInsertConfig | None = None,
        physics_threads: int = 0,
        **config,
    ):
        unknown = config.keys() - set(ENV_SETTINGS)
        if unknown:
            raise ValueError(f"PegInsertEnv has no setting {', '.join(sorted(unknown))}")
        cfg = cfg or PegInsertConfig()
        self.cfg = cfg = replace(PegInsertConfig(**{name: getattr(cfg, name) for name in ENV_SETTINGS}), **config)
        _check(cfg, num_envs)
        self.device, backend = resolve_backend(cfg.backend, device)
        self.num_envs = num_envs
        self.model = build_model(cfg)
        self.physics = BatchedMujoco(
            self.model, num_envs, device, backend, physics_threads, ("geom_size",), nconmax=24, njmax=96
        )
        self._target = int(self.model.body("target").mocapid[0])
        self._hole = int(self.model.body("hole").mocapid[0])
        self._peg = self.model.geom("peg").id
        self._motors = slice(self.model.nu - 7, self.model.nu)
        self.mass_matrix = MassMatrix(self.model, self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._lower, self._upper = self._tensor(LOWER), self._tensor(UPPER)
        self._null_pose, self._reset_pose = self._tensor(NULL_POSE), self._tensor(RESET_POSE)
        self._up, self._keypoints = self._tensor((0.0, 0.0, 1.0)), self._tensor(KEYPOINTS)[:, None]
        centres = (torch.arange(TAXELS, device=self.device) + 0.5) / TAXELS * GRIP_DEPTH
        self._taxels = torch.stack((centres - GRIP_DEPTH / 2, centres - GRIP_DEPTH))  # m, along the hand's x and z

        self.renderer = None
        if _observes(cfg, "rgb"):
            size = cfg.image_size
            moving = ("mocap_pos", "mocap_quat")
            self.renderer = BatchedRenderer(
                _picture_model(cfg),
                num_envs,
                cfg.camera,
                size,
                size,
                device,
                backend,
                physics_threads,
                per_world=moving,
            )

        spaces = {
            "rgb": gym.spaces.Box(0, 255, (cfg.image_size, cfg.image_size, 3), np.uint8),
            "tactile": gym.spaces.Box(-math.inf, math.inf, (6, TAXELS, TAXELS)),
            "proprio": gym.spaces.Box(-math.inf, math.inf, (21,)),
        }
        self.single_observation_space = gym.spaces.Box(-math.inf, math.inf, (19,))
        if cfg.observation == "multimodal":
            self.single_observation_space = gym.spaces.Dict({name: spaces[name] for name in cfg.modalities})
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (6,))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        N, zeros = num_envs, lambda *shape: torch.zeros(*shape, device=self.device)
        self.action = zeros(N, 6)  # executed: smoothed
        self.hole = zeros(N, 3)  # m, the middle of its floor
        self.hole_noise = zeros(N, 3)  # m, what observation and action box are off by
        self.level = zeros(N) + (0.0 if cfg.curriculum else cfg.difficulty)  # difficulty of the episode
        self.episode_length = torch.zeros(N, dtype=torch.long, device=self.device)
        self.phase = torch.zeros_like(self.episode_length)  # the episode length at reset
        self.succeeded = torch.zeros(N, dtype=torch.bool, device=self.device)
        self.totals = zeros(1 + len(TERMS), N)  # sums over the episode: return and its terms
        self.nan_resets = torch.zeros((), dtype=torch.long, device=self.device)
        self.contact_force, self.contact_position = zeros(N, 2, 2, 3), zeros(N, 2, 2, 2)
        self._everyone = torch.ones(N, dtype=torch.bool, device=self.device)

    BUFFERS = ("action", "hole", "hole_noise", "level", "episode_length", "phase", "succeeded", "totals", "nan_resets")
    BUFFERS += ("contact_force", "contact_position")

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
        if options and options.get("random_phase"):  # detail 14, in the form used with a time limit
            limit = self.cfg.max_episode_steps
            self.phase = torch.randint(limit, (self.num_envs,), generator=self.generator, device=self.device)
            self.episode_length = self.phase.clone()
        self._read_state()
        return self._observe(), {}

    def step(self, actions: torch.Tensor):
        """Advances all environments by 1/15 s; see docs/environments.md for what it returns."""
        actions = torch.as_tensor(actions, dtype=torch.float32, device=self.device).clamp(-1.0, 1.0)
        self.action = EMA * actions + (1 - EMA) * self.action
        self._set_targets()
        self.physics.step(DECIMATION * self.cfg.substeps)
        self.episode_length = self.episode_length + 1
        self._read_state()
        if _observes(self.cfg, "tactile"):
            self.contact_force, self.contact_position = tactile.read(self.physics.sensordata, len(PADS), len(GRIPS))

        reward, terms = self._rewards()
        # A state that diverges is absurd before it is infinite; comparisons with NaN are false.
        finite = (self.physics.qpos.abs() < MAX_POSITION).all(1) & (self.physics.qvel.abs() < MAX_VELOCITY).all(1)
        finite = finite & torch.isfinite(self.action).all(1) & torch.isfinite(reward)
        reward = torch.where(finite, reward, 0.0)
        self.totals = self.totals + torch.where(finite, terms, 0.0)
        self.succeeded = self.succeeded | (self.seated & finite)
        terminated = ~finite
        truncated = (self.episode_length >= self.cfg.max_episode_steps) & finite
        done = terminated | truncated
        self.nan_resets = self.nan_resets + terminated.sum()

        obs = final_obs = _where(finite, self._observe(), 0)
        length = self.episode_length - self.phase
        success = (self.seated & finite).float()
        info = {"final_obs": final_obs, "_final_obs": done, "_episode": done, "nan_resets": self.nan_resets}
        info["episode"] = {"r": self.totals[0], "l": length, "success": success}
        info["episode"] |= {"success_once": self.succeeded.float(), "engaged": (self.engaged & finite).float()}
        info["episode"] |= {"keypoint_distance": torch.where(finite, self.keypoint_distance, 0.0)}
        info["episode"] |= {"difficulty": self.level}
        info["episode"] |= {f"reward_{name}": self.totals[1 + i] / length for i, name in enumerate(TERMS)}
        # Asking whether any episode ended saves the CPU this work; on a GPU the question would stall the queue.
        if self.device.type == "cuda" or bool(done.any()):
            if self.cfg.curriculum:
                # At rest where two of three episodes succeed.
                change = self.cfg.curriculum_step * (3 * success - 2)
                level = (self.level + change).clamp(0.0, self.cfg.difficulty)
                # An episode that began late in its time says nothing about the level.
                self.level = torch.where(done & (self.phase == 0), level, self.level)
            self._reset(done)
            self._read_state()
            obs = _where(done, self._observe(done, final_obs), final_obs)
        return obs, reward, terminated, truncated, info

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The environment's own entries of `info["episode"]`."""
        names = ("success", "success_once", "engaged", "keypoint_distance", "difficulty")
        return (*names, *(f"reward_{name}" for name in TERMS))

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
        self.q, self.qd = qpos[:, :7], qvel[:, :7]
        self.frames = Frames(self.q)
        self.jacobian = self.frames.jacobian(FINGERTIP)
        self.fingertip = self.frames.point(FINGERTIP)
        self.velocity = (self.jacobian @ self.qd[..., None])[..., 0]  # m/s and rad/s, base axes
        self.peg = qpos[:, 9:12]  # the middle of its lower end
        w, x, y, z = qpos[:, 12:16].unbind(1)
        self.peg_axis = torch.stack((2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)), 1)
        offset = self.peg - self.hole
        tilt = self.peg_axis - self._up
        keypoints = offset[:, None] + self._keypoints * tilt[:, None]
        self.keypoint_distance = keypoints.norm(dim=2).mean(1)
        centred = offset[:, :2].norm(dim=1) < CENTRED
        self.engaged = centred & (offset[:, 2] < ENGAGED)
        self.seated = centred & (offset[:, 2] < SEATED)

    @property
    def observed_rim(self) -> torch.Tensor:
        """(num_envs, 3) m: the middle of the hole's rim as the robot believes it to be."""
        return self.hole + HOLE_DEPTH * self._up + self.hole_noise

    def proprioception(self) -> torch.Tensor:
        """(num_envs, 21): joint angles 7 and velocities 7 (rad/s), fingertip's position 3 (m) and quaternion 4."""
        q = 2 * (self.q - self._lower) / (self._upper - self._lower) - 1 if self.cfg.normalize_joint_angles else self.q
        return torch.cat((q, self.qd, self.fingertip, quaternion_down(self.frames.rotation)), 1)

    def _observe(self, mask: torch.Tensor | None = None, old: dict | None = None):
        """(num_envs, 19), or a dict, whose pictures are drawn where `mask`; elsewhere they are those of `old`."""
        if self.cfg.observation == "state":
            quaternion = quaternion_down(self.frames.rotation)
            return torch.cat((self.fingertip - self.observed_rim, quaternion, self.velocity, self.action), 1)
        obs = {}
        for name in self.cfg.modalities:
            if name == "rgb":
                obs[name] = self._pictures(mask, old and old[name])
            elif name == "tactile":
                obs[name] = tactile.image(self.contact_force, self.contact_position, self._taxels, TACTILE_SPREAD)
            else:
                obs[name] = self.proprioception()
        return obs

    def _pictures(self, mask: torch.Tensor | None, old: torch.Tensor | None) -> torch.Tensor:
        """uint8 (num_envs, image_size, image_size, 3)."""
        for name, field in self.renderer.fields.items():
            field.copy_(getattr(self.physics, name))
        qpos = self.physics.qpos.nan_to_num(0.0, 0.0, 0.0).clamp(-MAX_POSITION, MAX_POSITION)
        if mask is None or self.device.type == "cuda":
            return self.renderer.render(qpos)
        pictures = old.clone()
        pictures[mask] = self.renderer.render(qpos, mask)
        return pictures

    def close_extras(self, **kwargs):
        """Frees the cameras."""
        if self.renderer is not None:
            self.renderer.close()

    # --- control

    def _set_targets(self):
        """Where the impedance control pulls in this control step, and the null space's torques.

        The null space: tau = (I - J^T (J M^-1 J^T)^-1 J M^-1) M u with u = kp (q0 - q) - kd qd (Khatib 1987).
        """
        rim = self.observed_rim
        target = self.fingertip + POSITION_STEP * self.action[:, :3] - rim
        self.physics.mocap_pos[:, self._target] = self._cast(rim + target.clamp(-POSITION_BOUND, POSITION_BOUND))
        x_axis = self.frames.rotation[:, :, 0]
        half_yaw = 0.5 * (torch.atan2(x_axis[:, 1], x_axis[:, 0]) + YAW_STEP * self.action[:, 5])
        self.physics.mocap_quat[:, self._target, 1] = self._cast(torch.cos(half_yaw))
        self.physics.mocap_quat[:, self._target, 2] = self._cast(torch.sin(half_yaw))

        J, M = self.jacobian, self.mass_matrix(self.frames)
        u = (NULL_KP * (self._null_pose - self.q) - NULL_KD * self.qd)[..., None]
        factor, _ = torch.linalg.cholesky_ex(M)
        inverse = J @ torch.cholesky_solve(J.transpose(1, 2), factor)
        wrench, _ = torch.linalg.solve_ex(inverse, J @ u)
        torque = M @ u - J.transpose(1, 2) @ wrench
        self.physics.ctrl[:, self._motors] = self._cast(torque[..., 0])

    def _cast(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.physics.qpos.dtype)

    # --- rewards

    def _rewards(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Reward (num_envs,), and (1 + terms, num_envs): reward and its terms in the order of TERMS."""
        terms = [squash(self.keypoint_distance, a, b) for a, b in KEYPOINT_TERMS.values()]
        terms = torch.stack((*terms, self.engaged.float(), self.seated.float()))
        reward = terms.sum(0)
        return reward, torch.cat((reward[None], terms))

    # --- resets

    def _reset(self, mask: torch.Tensor):
        """Begins an episode where `mask`: hole, hand and peg at random, as far as the level says, the peg held."""
        N, level = self.num_envs, self.level[:, None]
        hole = self._tensor(HOLE_POSITION) + level * self._tensor(HOLE_NOISE) * self._uniform(N, 3)
        hole_yaw = self.level * HOLE_YAW * self._uniform(N)
        hand = level * self._tensor(HAND_NOISE) * self._uniform(N, 3)
        yaw = self.level * HAND_YAW * self._uniform(N)
        grasp = level * self._tensor(GRASP_NOISE) * self._uniform(N, 3)
        noise = OBSERVATION_NOISE * level * torch.randn(N, 3, generator=self.generator, device=self.device)
        self.hole = torch.where(mask[:, None], hole, self.hole)
        self.hole_noise = torch.where(mask[:, None], noise, self.hole_noise)

        # Inverse kinematics for those who need it; which they are, a GPU cannot say without stalling the queue.
        rows = slice(None) if self.device.type == "cuda" else mask.nonzero()[:, 0]
        fingertip = hole + hand + (HOLE_DEPTH + HAND_HEIGHT) * self._up
        cos, sin, zero = torch.cos(yaw), torch.sin(yaw), torch.zeros_like(yaw)
        x_axis = torch.stack((cos, sin, zero), 1)
        y_axis = torch.stack((sin, -cos, zero), 1)
        rotation = torch.stack((x_axis, y_axis, -self._up.expand(N, 3)), 2)
        start = self._reset_pose.repeat(N, 1)
        start[:, 6] -= yaw
        q = start.clone()
        q[rows] = inverse_kinematics(start[rows], fingertip[rows], rotation[rows], FINGERTIP, iterations=4)

        # Factory's frame of the grasp is the hand's turned about its y axis: z up.
        peg = fingertip - grasp[:, :1] * x_axis + (grasp[:, 2:] - (PEG_LENGTH - GRIP_DEPTH)) * self._up
        # The peg's x axis is the hand's, negated.
        peg_quat = torch.stack((-torch.sin(yaw / 2), zero, zero, torch.cos(yaw / 2)), 1)
        fingers = torch.full((N, 2), GRASPED, device=self.device)
        qpos = torch.cat((q, fingers, peg, peg_quat), 1)
        self.physics.reset(mask, qpos, torch.zeros(N, self.model.nv, device=self.device))

        hole_quat = torch.stack((torch.cos(hole_yaw / 2), zero, zero, torch.sin(hole_yaw / 2)), 1)
        small, large = math.log(CLEARANCE[1]), math.log(CLEARANCE[0])
        clearance = torch.exp(large + (small - large) * self.level)
        if self.cfg.clearance:
            clearance = torch.full_like(self.level, self.cfg.clearance)
        radius = HOLE_RADIUS - 0.5 * clearance
        for target, value in (
            (self.physics.mocap_pos[:, self._hole], hole),
            (self.physics.mocap_quat[:, self._hole], hole_quat),
            (self.physics.fields["geom_size"][:, self._peg, :1], radius[:, None]),
        ):
            target.copy_(torch.where(mask[:, None], value.to(target.dtype), target))
        for name in ("action", "episode_length", "phase", "succeeded"):
            old = getattr(self, name)
            setattr(self, name, old.masked_fill(mask.view(-1, *[1] * (old.dim() - 1)), 0))
        self.totals = self.totals.masked_fill(mask, 0.0)
        if _observes(self.cfg, "tactile"):
            self._rest(mask, grasp)

    def _rest(self, mask: torch.Tensor, grasp: torch.Tensor):
        """Touch where an episode begins: the grasp's normal forces at its points, as no step has measured them yet."""
        force = torch.zeros_like(self.contact_force)
        force[..., 0] = GRIP_FORCE / len(GRIPS)
        position = torch.zeros_like(self.contact_position)
        position[..., 0] = -grasp[:, None, :1]
        height = self._tensor(GRIP_HEIGHTS) - (PEG_LENGTH - GRIP_DEPTH)
        position[..., 1] = -(height + grasp[:, 2:])[:, None]
        mask = mask[:, None, None, None]
        self.contact_force = torch.where(mask, force, self.contact_force)
        self.contact_position = torch.where(mask, position, self.contact_position)


gym.register("PegInsert-v0", vector_entry_point="common.envs.peg_insert:PegInsertEnv")
