"""Pick and place on instruction with a Franka Panda, batched in MuJoCo: cubes and pads in colours, and a sentence.

See docs/pick.md for spaces, sentences, rewards and the scripted expert. All figures are ours unless a comment says so.
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

from common.panda import LOWER, UPPER, Frames, rotation_error
from common.physics import STATE, BatchedMujoco, resolve_backend
from common.render import BatchedRenderer

ASSET = Path(__file__).parent.parent / "assets" / "pick.xml"
CONTROL_DT = 0.05  # s
POSITION_STEP, YAW_STEP = 0.0125, 0.1  # m and rad, by which an action of 1 moves the hand's target
LEASH = 0.04  # m, the furthest the target is ahead of the hand
TARGET_LOW, TARGET_HIGH = (0.33, -0.3, 0.012), (0.69, 0.3, 0.32)  # m, the box that the hand's target never leaves
MAX_YAW = 1.5  # rad, of that target
TCP = 0.1034  # m from the hand's frame along its z: Franka's end-effector frame, between the pads
FINGER_OPEN = 0.04  # m, a finger's position when the gripper is open
HOME = (0.0, 0.046, 0.0, -2.376, 0.0, 2.422, 0.7854)  # rad: hand upright over the middle of the workspace, at z = .2 m
START_NOISE = 0.03  # rad, half width of uniform noise on HOME where an episode begins
NULL_GAIN = 0.1  # share of the way to HOME that the elbow goes in a control step, where the hand does not mind

CUBE = 0.04  # m, an edge
CUBE_MASS = 0.05  # kg
TIPS, TIP_RADIUS = ((-0.006, 0.037), (0.006, 0.0455)), 0.008  # m in the finger's x and z, where it meets the cubes
GRIP_FRICTION, TABLE_FRICTION = 1.0, 0.5
COLOURS = {
    "red": (0.85, 0.12, 0.10),
    "green": (0.12, 0.65, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.95, 0.80, 0.10),
}
INSTRUCTIONS = tuple(f"pick up the {cube} cube" for cube in COLOURS)
INSTRUCTIONS += tuple(f"put the {cube} cube on the {pad} pad" for cube in COLOURS for pad in COLOURS)
MOST_CUBES, PADS = 3, 2
CENTRE = (0.5, 0.0)  # m, x and y of the middle of the workspace
RANGE_EASY, RANGE_HARD = (0.04, 0.06), (0.12, 0.2)  # m, half widths around it of a lone cube at difficulty 0 and 1
CELL, CELL_NOISE = (0.12, 0.14), 0.02  # m, of the 2 x 3 cells of a full scene, one thing in each
AWAY = (0.5, 3.0)  # m, x and y of what is not in the scene, out of sight

LIFTED = 0.05  # m above the table: picked up
NEAR = 0.03  # m between hand and cube: held
ON_PAD = 0.03  # m, the furthest in x and y that a cube on a pad is from its middle; half an edge is .045
LET_GO = 0.008  # m by which the gripper is wider than the cube that it has let go
STILL = 0.05  # m/s
MAX_POSITION, MAX_VELOCITY = 10.0, 1e3  # m or rad, and per s: beyond these the simulation has diverged


@dataclass
class PickConfig:
    """The environment's flags."""

    backend: Literal["auto", "mujoco", "warp"] = "auto"
    """physics engine: C thread pool (mujoco), MuJoCo Warp, or auto: warp on CUDA, mujoco on a CPU"""
    substeps: int = 5
    """physics steps per control step of 0.05 s"""
    solver_iterations: int = 8
    """most iterations of the constraint solver (Newton)"""
    observation: Literal["images", "state"] = "images"
    """images: a dict of pictures, proprioception and instruction; state: all that in numbers, objects included"""
    cameras: tuple[Literal["front", "wrist"], ...] = ("front", "wrist")
    """the pictures of an images observation"""
    image_size: int = 56
    """height and width of the pictures (pixels)"""
    chunk: int = 8
    """control steps per environment step; 1: actions have no axis of the chunk"""
    difficulty: float = 1.0
    """0: one cube near the middle, to be picked up; 1: two or three cubes, turned, two pads, all instructions"""
    reward: Literal["sparse", "dense"] = "sparse"
    """sparse: 1 for success; dense: beside it, what the progress of the hand and the cube is worth"""
    reward_gamma: float = 0.99
    """the learner's discount factor per control step, by which the dense reward leaves the best policy unchanged"""
    max_episode_steps: int = 128
    """time limit of an episode (control steps)"""


ENV_SETTINGS = tuple(field.name for field in fields(PickConfig))


def num_cubes(cfg: PickConfig) -> int:
    """How many cubes the model has; an episode may have fewer."""
    return 1 if cfg.difficulty == 0 else MOST_CUBES


def build_model(cfg: PickConfig, visual: bool = False) -> mujoco.MjModel:
    """Robot, table, cubes and pads with the physics options of `cfg`."""
    spec = mujoco.MjSpec.from_file(str(ASSET))
    spec.compiler.discardvisual = not visual
    option = spec.option
    option.timestep = CONTROL_DT / cfg.substeps
    option.solver = mujoco.mjtSolver.mjSOL_NEWTON
    option.iterations, option.ls_iterations = cfg.solver_iterations, 20
    for flag in ("ISLAND", "MIDPHASE", "EQUALITY"):
        option.disableflags |= getattr(mujoco.mjtDisableBit, f"mjDSBL_{flag}")
    spec.camera("wrist").fovy = 65  # from its start the hand sees the cube of an easy episode wherever it lies
    for body in spec.body("link0").find_all("body"):
        body.gravcomp = 1
    # Each finger meets a cube in two points, diagonally, so that a grip holds it upright and turns it to the hand.
    tips = []
    for finger in ("left_finger", "right_finger"):
        for x, z in TIPS:
            tips.append(f"{finger}_tip{len(tips)}")
            tip = spec.body(finger).add_geom(name=tips[-1], type=mujoco.mjtGeom.mjGEOM_SPHERE, pos=(x, TIP_RADIUS, z))
            tip.size[0], tip.group = TIP_RADIUS, 4
            tip.contype = tip.conaffinity = 0
    friction = dict.fromkeys(tips, GRIP_FRICTION) | {"table": TABLE_FRICTION}  # of a cube, by what it touches
    for i in range(num_cubes(cfg)):
        name = f"cube{i}"
        body = spec.worldbody.add_body(name=name, pos=(*AWAY, CUBE / 2))
        body.add_freejoint(name=name)
        body.explicitinertial, body.mass, body.ipos = True, CUBE_MASS, (0, 0, 0)
        body.inertia = [CUBE_MASS * CUBE**2 / 6] * 3
        geom = body.add_geom(name=name, type=mujoco.mjtGeom.mjGEOM_BOX, size=[CUBE / 2] * 3)
        geom.contype = geom.conaffinity = 0
        for other, coefficient in friction.items():
            pair = spec.add_pair(geomname1=other, geomname2=name, condim=3)
            pair.friction[:2] = coefficient
            pair.solref[0] = 2 * option.timestep  # s, the stiffest that is stable
        friction[name] = TABLE_FRICTION
    return spec.compile()


def _picture_model(cfg: PickConfig) -> mujoco.MjModel:
    """What small pictures need: round shapes with a third of the usual faces."""
    model = build_model(cfg, visual=True)
    quality = model.vis.quality
    quality.numslices, quality.numstacks, quality.numquads = 12, 6, 1
    return model


def _check(cfg: PickConfig, num_envs: int):
    """Raises ValueError, in one sentence, for a setting that no environment can have."""

    def require(valid: bool, name: str, takes: str, got):
        if not valid:
            raise ValueError(f"--{name.replace('_', '-')} takes {takes}, got {got!r}")

    for field in fields(cfg):
        value, choices = getattr(cfg, field.name), get_args(field.type)
        if get_origin(field.type) is Literal:
            require(value in choices, field.name, f"one of {', '.join(choices)}", value)
    require(num_envs >= 1, "num_envs", "1 or more", num_envs)
    known = bool(cfg.cameras) and set(cfg.cameras) <= {"front", "wrist"}
    require(known, "cameras", "one or more of front, wrist", cfg.cameras)
    for name in ("substeps", "solver_iterations", "image_size", "chunk", "max_episode_steps"):
        require(getattr(cfg, name) >= 1, name, "1 or more", getattr(cfg, name))
    require(0 <= cfg.difficulty <= 1, "difficulty", "a number from 0 to 1", cfg.difficulty)
    require(0 < cfg.reward_gamma <= 1, "reward_gamma", "a number above 0, at most 1", cfg.reward_gamma)


def _where(mask: torch.Tensor, new, old):
    """torch.where over rows, of two tensors or of two dicts; `old` may be a number."""
    if isinstance(new, dict):
        return {k: _where(mask, value, old[k] if isinstance(old, dict) else old) for k, value in new.items()}
    return torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, old)


class PickEnv(VectorEnv):
    """A vector environment as docs/environments.md says: torch tensors, same-step autoreset, true last observations.

    Action (num_envs, chunk, 7), or (num_envs, 7) where the chunk is 1, clipped to -1 to 1, executed one after the
    other at 20 Hz: the displacement of the hand's target in units of POSITION_STEP along x, y, z of the robot's base, a
    rotation in units of YAW_STEP, of which the hand, kept upright, obeys the last, and the gripper, from -1, closed,
    to 1, open. Reward is the sum over the chunk; a world whose episode ends within the chunk stays as it is then.
    Observation: see docs/pick.md. Raises ValueError for settings and actions that do not fit.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_fps": round(1 / CONTROL_DT)}
    metric_names = ("success", "grasped", "wrong_cube")
    exact_resume = True  # `load_state_dict` restores all there is

    def __init__(
        self,
        num_envs: int = 1,
        device: str | torch.device = "cpu",
        seed: int = 1,
        cfg: PickConfig | None = None,
        physics_threads: int = 0,
        **config,
    ):
        unknown = config.keys() - set(ENV_SETTINGS)
        if unknown:
            raise ValueError(f"PickEnv has no setting {', '.join(sorted(unknown))}")
        cfg = cfg or PickConfig()
        self.cfg = cfg = replace(PickConfig(**{name: getattr(cfg, name) for name in ENV_SETTINGS}), **config)
        _check(cfg, num_envs)
        self.device, backend = resolve_backend(cfg.backend, device)
        # Asking which episodes ended saves a CPU the work for the others; on a GPU the question would stall the queue.
        self._asks = self.device.type != "cuda"
        self.num_envs, self.num_cubes = num_envs, num_cubes(cfg)
        self.model = build_model(cfg)
        self.physics = BatchedMujoco(self.model, num_envs, device, backend, physics_threads, nconmax=32, njmax=96)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._lower, self._upper = self._tensor(LOWER) + 0.05, self._tensor(UPPER) - 0.05
        self._home, self._damping = self._tensor(HOME), 1e-4 * torch.eye(6, device=self.device)
        self._target_low = self._tensor((*TARGET_LOW, -MAX_YAW))
        self._target_high = self._tensor((*TARGET_HIGH, MAX_YAW))
        self._step_size = self._tensor((*[POSITION_STEP] * 3, YAW_STEP))
        colours = torch.arange(len(COLOURS), device=self.device)
        nothing = torch.full_like(colours, -1)
        self._cube_of = torch.cat((colours, colours.repeat_interleave(len(COLOURS))))  # colour, by instruction
        self._pad_of = torch.cat((nothing, colours.repeat(len(COLOURS))))
        # One-hot, by instruction: the cube's colour, then the pad's, of which there may be none.
        words = (self._cube_of[:, None] == colours, self._pad_of[:, None] == colours)
        self._words = torch.cat(words, 1).float()

        self.renderer = None
        if cfg.observation == "images":
            model, size = _picture_model(cfg), cfg.image_size
            per_world = ("geom_rgba", "mocap_pos")
            self.renderer = BatchedRenderer(
                model, num_envs, cfg.cameras, size, size, device, backend, physics_threads, per_world
            )

        self.single_observation_space = gym.spaces.Box(-math.inf, math.inf, (STATE_DIM,))
        if cfg.observation == "images":
            pictures = gym.spaces.Box(0, 255, (cfg.image_size, cfg.image_size, 3), np.uint8)
            spaces = {name: pictures for name in cfg.cameras}
            spaces["state"] = gym.spaces.Box(-math.inf, math.inf, (PROPRIO_DIM,))
            spaces["instruction"] = gym.spaces.Discrete(len(INSTRUCTIONS))
            self.single_observation_space = gym.spaces.Dict(spaces)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (7,) if cfg.chunk == 1 else (cfg.chunk, 7))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        N, zeros = num_envs, lambda *shape: torch.zeros(*shape, device=self.device)
        self.target = zeros(N, 4)  # of the hand: x, y, z (m) and yaw (rad)
        self.joint_target = self._home.repeat(N, 1)
        self.instruction = torch.zeros(N, dtype=torch.long, device=self.device)
        # Cube 0 is the one of the instruction, and so is pad 0 where it names one. Colours are indices; -1: not there.
        self.cube_colour = torch.full((N, MOST_CUBES), -1, device=self.device)
        self.pad_colour = torch.full((N, PADS), -1, device=self.device)
        self.pads = zeros(N, PADS, 2)  # m, x and y
        self.potential = zeros(N)
        self.episode_length = torch.zeros(N, dtype=torch.long, device=self.device)
        self.phase = torch.zeros_like(self.episode_length)  # the episode length at reset
        self.grasped_once = torch.zeros(N, dtype=torch.bool, device=self.device)
        self.wrong_cube = torch.zeros_like(self.grasped_once)
        self.returns = zeros(N)
        self.nan_resets = torch.zeros((), dtype=torch.long, device=self.device)
        self._everyone = torch.ones_like(self.grasped_once)

    BUFFERS = ("target", "joint_target", "instruction", "cube_colour", "pad_colour", "pads", "potential")
    BUFFERS += ("episode_length", "phase", "grasped_once", "wrong_cube", "returns", "nan_resets")

    def _tensor(self, values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def _uniform(self, *shape: int) -> torch.Tensor:
        """From -1 to 1."""
        return 2 * torch.rand(shape, generator=self.generator, device=self.device) - 1

    @property
    def instructions(self) -> list[str]:
        """The sentence that every world obeys now."""
        return [INSTRUCTIONS[i] for i in self.instruction.tolist()]

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
        return self._observe(), {}

    def step(self, actions: torch.Tensor):
        """Executes one chunk of actions; see docs/environments.md for what it returns."""
        N, chunk = self.num_envs, self.cfg.chunk
        actions = torch.as_tensor(actions, dtype=torch.float32, device=self.device).detach()
        if actions.numel() != N * chunk * 7 or len(actions) != N:
            raise ValueError(f"actions have the shape {tuple(actions.shape)}, the environment's is {(N, chunk, 7)}")
        actions = actions.view(N, chunk, 7)
        total = torch.zeros(N, device=self.device)
        terminated, truncated, success = (torch.zeros_like(self._everyone) for _ in range(3))
        failed = torch.zeros_like(success)
        stopped, stop_state = torch.zeros_like(success), None
        for k in range(chunk):
            self._set_targets(actions[:, k])
            self.physics.step(self.cfg.substeps)
            self._read_state()
            running = ~(terminated | truncated)
            # A state that diverges is absurd before it is infinite; comparisons with NaN are false.
            finite = (self.physics.qpos.abs() < MAX_POSITION).all(1) & (self.physics.qvel.abs() < MAX_VELOCITY).all(1)
            finite = finite & torch.isfinite(actions[:, k]).all(1)
            done_well = self.succeeded & finite
            total = total + torch.where(running & finite, self._rewards(done_well), 0.0)
            self.episode_length = self.episode_length + running
            self.grasped_once = self.grasped_once | (running & finite & self.grasped)
            self.wrong_cube = self.wrong_cube | (running & finite & self.lifts_wrong_cube)
            success = success | (running & done_well)
            failed = failed | (running & ~finite)
            terminated = success | failed
            truncated = truncated | ((self.episode_length >= self.cfg.max_episode_steps) & ~terminated)
            ended = running & (terminated | truncated)
            if k < chunk - 1 and (not self._asks or bool(ended.any())):
                state = self._copy_state()
                stop_state = state if stop_state is None else _where(ended, state, stop_state)
                stopped = stopped | ended
        if stop_state is not None:
            self._put(stopped, stop_state)
            self._read_state()
        self.returns = self.returns + total
        self.nan_resets = self.nan_resets + failed.sum()
        done = terminated | truncated

        obs = final_obs = _where(~failed, self._observe(), 0)
        info = {"final_obs": final_obs, "_final_obs": done, "_episode": done, "nan_resets": self.nan_resets}
        info["episode"] = {"r": self.returns, "l": self.episode_length - self.phase, "success": success.float()}
        info["episode"] |= {"grasped": self.grasped_once.float(), "wrong_cube": self.wrong_cube.float()}
        if not self._asks or bool(done.any()):
            self._reset(done)
            obs = _where(done, self._observe(done, final_obs), final_obs)
        return obs, total, terminated, truncated, info

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
        if self.renderer is not None:
            self.paint(self.renderer)

    def close_extras(self, **kwargs):
        """Frees the cameras."""
        if self.renderer is not None:
            self.renderer.close()

    # --- control

    def _set_targets(self, action: torch.Tensor):
        """Moves the hand's target by an action (num_envs, 7), and the joints' targets after it by one step of damped
        least squares, in whose null space they return to HOME.
        """
        action = action.clamp(-1.0, 1.0)
        moves = torch.cat((action[:, :3], action[:, 5:6]), 1)
        target = self.target + self._step_size * moves
        ahead = (target[:, :3] - self.tcp).clamp(-LEASH, LEASH)
        target = torch.cat((self.tcp + ahead, target[:, 3:]), 1)
        self.target = torch.clamp(target, self._target_low, self._target_high)

        yaw, zero = self.target[:, 3], torch.zeros_like(self.target[:, 3])
        cos, sin = torch.cos(yaw), torch.sin(yaw)
        upright = torch.stack((cos, sin, zero, sin, -cos, zero, zero, zero, zero - 1), 1).view(-1, 3, 3)
        turn = rotation_error(upright, self.reached_rotation)
        error, J = torch.cat((self.target[:, :3] - self.reached, turn), 1), self.reached_jacobian
        home = NULL_GAIN * (self._home - self.joint_target)
        wanted = error[..., None] - J @ home[..., None]
        change, _ = torch.linalg.solve_ex(J @ J.transpose(1, 2) + self._damping, wanted)
        moved = self.joint_target + home + (J.transpose(1, 2) @ change)[..., 0]
        self.joint_target = torch.clamp(moved, self._lower, self._upper)
        self.physics.ctrl[:, :7] = self._cast(self.joint_target)
        self.physics.ctrl[:, 7:9] = self._cast(FINGER_OPEN / 2 * (1 + action[:, 6:]))

    def _cast(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.physics.qpos.dtype)

    # --- state and observation

    def _read_state(self, rows: torch.Tensor | None = None):
        """Brings what follows from the physics up to date, in all worlds or in `rows` (k,)."""
        for name, value in self._derive(slice(None) if rows is None else rows).items():
            if rows is None:
                setattr(self, name, value)
            else:
                getattr(self, name)[rows] = value  # no step has returned these tensors

    def _derive(self, rows: torch.Tensor | slice) -> dict[str, torch.Tensor]:
        qpos, qvel = self.physics.qpos[rows].float(), self.physics.qvel[rows].float()
        K = len(qpos)
        frames = Frames(torch.cat((qpos[:, :7], self.joint_target[rows])))
        place, jacobian = frames.point(TCP), frames.jacobian(TCP)
        tcp, x_axis = place[:K], frames.rotation[:K, :, 0]
        width = qpos[:, 7] + qpos[:, 8]
        poses = qpos[:, 9:].view(K, self.num_cubes, 7)
        cubes = poses[..., :3]
        w, x, y, z = poses[..., 3:].unbind(2)
        between = (cubes - tcp[:, None]).norm(dim=2) < NEAR
        lifted = between & (cubes[..., 2] > CUBE / 2 + LIFTED)
        put = self._pad_of[self.instruction[rows]] >= 0
        on_pad = (cubes[:, 0, :2] - self.pads[rows, 0]).abs().amax(1) < ON_PAD
        lies = (cubes[:, 0, 2] < CUBE / 2 + 0.01) & (qvel[:, 9:12].norm(dim=1) < STILL)
        let_go = width > CUBE + LET_GO
        return {
            "q": qpos[:, :7],  # rad
            "qd": qvel[:, :7],  # rad/s
            "tcp": tcp,  # m
            "yaw": torch.atan2(x_axis[:, 1], x_axis[:, 0]),  # rad, of the hand
            "width": width,  # m between the pads
            "cubes": cubes,  # m
            "cube_yaw": torch.atan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z)),  # rad
            "put": put,  # the instruction names a pad
            "grasped": between[:, 0] & ((width - CUBE).abs() < 0.004),
            "lifts_wrong_cube": lifted[:, 1:].any(1),
            "succeeded": torch.where(put, on_pad & lies & let_go, lifted[:, 0]),
            # Where the joints' targets bring the hand, how it is turned there, and the Jacobian.
            "reached": place[K:],
            "reached_rotation": frames.rotation[K:],
            "reached_jacobian": jacobian[K:],
        }

    def proprioception(self) -> torch.Tensor:
        """(num_envs, PROPRIO_DIM): joint angles 7 (rad) and velocities 7 (rad/s), position of the hand's end-effector
        frame 3 (m), sine and cosine of its yaw, gap between the fingers (m).
        """
        hand = torch.stack((torch.sin(self.yaw), torch.cos(self.yaw), self.width), 1)
        return torch.cat((self.q, self.qd, self.tcp, hand), 1)

    def _observe(self, mask: torch.Tensor | None = None, old: dict | None = None):
        """(num_envs, STATE_DIM), or a dict, whose pictures are drawn where `mask`; elsewhere they are `old`'s."""
        if self.cfg.observation == "state":
            return self._flat()
        obs = self._pictures(mask, old)
        return obs | {"state": self.proprioception(), "instruction": self.instruction}

    def _flat(self) -> torch.Tensor:
        """(num_envs, STATE_DIM): see docs/pick.md."""
        N, tcp = self.num_envs, self.tcp
        there = (self.cube_colour >= 0).float()[..., None]
        cubes = torch.nn.functional.pad(self.cubes - tcp[:, None], (0, 0, 0, MOST_CUBES - self.num_cubes)) * there
        turned = 4 * (self.cube_yaw[:, 0] - self.yaw)  # a cube looks the same after a quarter turn
        pads = (self.pad_colour >= 0).float()[..., None]
        pad_offset = (self.pads - self.cubes[:, :1, :2]) * pads
        parts = [self.proprioception(), self.target[:, :3] - tcp, self.cubes[:, 0]]
        parts += [torch.sin(turned)[:, None], torch.cos(turned)[:, None], cubes.reshape(N, -1), there[:, 1:, 0]]
        parts += [pad_offset.reshape(N, -1), pads[..., 0]]
        parts += [self.put[:, None].float(), self._words[self.instruction]]
        return torch.cat(parts, 1)

    def _pictures(self, mask: torch.Tensor | None, old: dict | None) -> dict[str, torch.Tensor]:
        """uint8 (num_envs, image_size, image_size, 3) by camera."""
        drawn = mask if self._asks else None
        qpos = self.physics.qpos.nan_to_num(0.0, 0.0, 0.0).clamp(-MAX_POSITION, MAX_POSITION)
        pictures = self.renderer.render(qpos, drawn)
        obs = {}
        for i, name in enumerate(self.cfg.cameras):
            obs[name] = pictures[:, i].contiguous()
            if drawn is not None:
                obs[name] = old[name].clone()
                obs[name][drawn] = pictures[:, i]
        return obs

    def paint(self, renderer: BatchedRenderer):
        """Tells a renderer of this environment's worlds the colours of cubes and pads, and where the pads lie."""
        model, palette = renderer.model, self._tensor(tuple(COLOURS.values()))
        rgba, positions = renderer.fields["geom_rgba"], renderer.fields["mocap_pos"]
        for i in range(self.num_cubes):
            rgba[:, model.geom(f"cube{i}").id, :3] = palette[self.cube_colour[:, i]].to(rgba.dtype)
        for i in range(PADS):
            rgba[:, model.geom(f"pad{i}").id, :3] = palette[self.pad_colour[:, i]].to(rgba.dtype)
            positions[:, model.body(f"pad{i}").mocapid[0], :2] = self.pads[:, i].to(positions.dtype)

    # --- rewards

    def _rewards(self, success: torch.Tensor) -> torch.Tensor:
        """Reward (num_envs,) of a control step. `dense`: potential-based shaping (Ng, Harada and Russell 1999), which
        leaves the best policy what it is, on top of the reward for success.
        """
        if self.cfg.reward == "sparse":
            return success.float()
        potential = torch.where(success, 1.0, self._potential())
        reward = success + self.cfg.reward_gamma * potential - self.potential
        self.potential = potential
        return reward

    def _potential(self) -> torch.Tensor:
        """(num_envs,) from 0 to 1: how near the task is to its end. The hand at the cube, the cube in its grip, lifted,
        and, where there is a pad to go to, over the pad and down on it.
        """
        near = lambda distance, scale: 1 - torch.tanh(distance / scale)  # noqa: E731
        cube, grip = self.cubes[:, 0], self.grasped.float()
        reach = near((cube - self.tcp).norm(dim=1), 0.1)
        height = cube[:, 2] - CUBE / 2
        lift = (height / LIFTED).clamp(0, 1)
        picked = 0.4 * reach + 0.2 * grip + 0.4 * lift * grip
        sideways = (cube[:, :2] - self.pads[:, 0]).norm(dim=1)
        over = near(sideways, 0.1)
        there = sideways < ON_PAD
        # Over the pad the cube need not be high, nor held once it lies there.
        carried = torch.where(there, 1.0, lift * grip)
        lowered = there * near(height.clamp(min=0), 0.05)
        put = 0.2 * reach + 0.2 * torch.where(there, 1.0, grip) + 0.2 * carried + 0.2 * over * carried + 0.2 * lowered
        return torch.where(self.put, put, picked)

    # --- resets

    def _reset(self, mask: torch.Tensor):
        """Begins an episode where `mask`: instruction, colours and places at random, as far as the difficulty says."""
        rows = mask.nonzero()[:, 0] if self._asks else torch.arange(self.num_envs, device=self.device)
        K, difficulty = len(rows), self.cfg.difficulty
        draw = lambda *shape: torch.rand(shape, generator=self.generator, device=self.device)  # noqa: E731
        full = draw(K, 1) < difficulty  # a scene with several cubes and pads
        cube_colour = draw(K, len(COLOURS)).argsort(1)[:, :MOST_CUBES]
        pad_colour = draw(K, len(COLOURS)).argsort(1)[:, :PADS]
        puts = full[:, 0] & (draw(K) < 0.5)
        third = full & (draw(K, 1) < 0.5)
        cube_there = torch.cat((torch.ones_like(full), full, third), 1)
        pick = cube_colour[:, 0]
        put = len(COLOURS) * (1 + pick) + pad_colour[:, 0]

        half_width = self._tensor(RANGE_EASY) * (1 - difficulty) + self._tensor(RANGE_HARD) * difficulty
        alone = self._tensor(CENTRE) + half_width * self._uniform(K, 2)
        things = MOST_CUBES + PADS
        cell = draw(K, 6).argsort(1)[:, :things]
        middle = torch.stack((cell % 2 - 0.5, cell // 2 - 1.0), 2) * self._tensor(CELL) + self._tensor(CENTRE)
        place = middle + CELL_NOISE * self._uniform(K, things, 2)
        place[:, 0] = torch.where(full, place[:, 0], alone)
        away = self._tensor([(AWAY[0], AWAY[1] + 0.2 * i) for i in range(things)])
        there = torch.cat((cube_there, full.expand(K, PADS)), 1)
        place = torch.where(there[..., None], place, away)
        half_yaw = difficulty * math.pi / 8 * self._uniform(K, MOST_CUBES)

        q = self._home + START_NOISE * self._uniform(K, 7)
        zero = torch.zeros_like(half_yaw)
        height = torch.full_like(half_yaw, CUBE / 2)[..., None]
        quaternion = torch.stack((torch.cos(half_yaw), zero, zero, torch.sin(half_yaw)), 2)
        poses = torch.cat((place[:, :MOST_CUBES], height, quaternion), 2)[:, : self.num_cubes]
        fingers = torch.full((K, 2), FINGER_OPEN, device=self.device)
        qpos = self.physics.qpos.clone()
        qpos[rows] = self._cast(torch.cat((q, fingers, poses.reshape(K, -1)), 1))
        self.physics.reset(mask, qpos, torch.zeros_like(self.physics.qvel))

        def begin(name: str, value):
            old = getattr(self, name)
            new = old.clone()
            new[rows] = value
            setattr(self, name, _where(mask, new, old))

        begin("instruction", torch.where(puts, put, pick))
        begin("cube_colour", torch.where(cube_there, cube_colour, -1))
        begin("pad_colour", torch.where(full, pad_colour, -1))
        begin("pads", place[:, MOST_CUBES:])
        begin("joint_target", q)
        for name in ("episode_length", "phase", "returns", "grasped_once", "wrong_cube"):
            begin(name, 0)
        self._read_state(None if self.num_envs == K else rows)
        begin("target", torch.cat((self.tcp, self.yaw[:, None]), 1)[rows])
        if self.cfg.reward == "dense":
            self.potential = torch.where(mask, self._potential(), self.potential)
        if self.renderer is not None:
            self.paint(self.renderer)

    def _copy_state(self) -> dict[str, torch.Tensor]:
        state = {name: getattr(self.physics, name).clone() for name in STATE}
        return state | {"target": self.target, "joint_target": self.joint_target}

    def _put(self, mask: torch.Tensor, state: dict[str, torch.Tensor]):
        """Puts the worlds of `mask` back into `_copy_state`'s."""
        for name in STATE:
            live = getattr(self.physics, name)
            live.copy_(torch.where(mask[:, None], state[name], live))
        self.target = _where(mask, state["target"], self.target)
        self.joint_target = _where(mask, state["joint_target"], self.joint_target)


PROPRIO_DIM = 20
STATE_DIM = PROPRIO_DIM + 3 + 3 + 2 + 4 * MOST_CUBES - 1 + 3 * PADS + 1 + 2 * len(COLOURS)

gym.register("Pick-v0", vector_entry_point="common.envs.pick:PickEnv")
