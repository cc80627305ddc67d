"""Pick-and-place of scanned objects with a Franka Panda, batched in MuJoCo.

    python common/envs/real2sim.py inspect scan.stl      # what becomes of a scan, in words and as a picture
    python common/envs/real2sim.py examples scans        # writes example scans into the folder scans

See docs/real2sim.md for spaces, rewards and what they were modelled on. A control step of 20 ms, physics steps of 5 ms,
delta-joint actions of 0.04 rad and a box to a target in the air are those of PandaPickCube (MuJoCo Playground); the
staged reward and the threshold of success are near ManiSkill's PickCube.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # run as a file: the repository's root is where `common` is
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from common.envs.real2sim_config import ENV_SETTINGS, Real2SimConfig, check, load_reward
from common.envs.real2sim_looks import NUMBERS, Looks, multiply
from common.envs.real2sim_model import CENTRE, FINGER_MAX, HOME, build, is_box
from common.meshes import picture, prepare, write_examples
from common.panda import LOWER, UPPER, Frames, quaternion_down
from common.physics import BatchedMujoco, resolve_backend

SUBSTEPS = 4  # physics steps of 5 ms per control step: 50 Hz
JOINT_STEP = 0.04  # rad, a joint's target per control step at action 1
FINGER_STEP = 0.004  # m, a finger's
HOME_NOISE = 0.02  # rad, half width
TCP = 0.1034  # m along the hand's z axis, between the pads
TABLE_MIN, TABLE_MAX = (-0.2, -0.6), (0.9, 0.6)  # m; an object whose centre is beyond has fallen off
HELD_FORCE = 1.0  # N of each finger
HELD_SPEED = 0.05  # m/s, fingers that still move are on their way
LIFTED = 0.05  # m above where it rested: the reward for lifting is complete
SUCCESS_DISTANCE = 0.025  # m from the goal
# What the task `place` adds, in the manner of ManiSkill's StackCube: at rest, and let go of.
PLACE_DISTANCE = 0.1  # m, at least, from where the object lies to its goal
AWAY = 0.05  # m from the hand to where it grasped: no hand that holds anything is that far
STILL = 0.05  # m/s, below which the object is at rest
MAX_TILT = math.pi / 4  # rad; an object that leans more is paid nothing for being let go of
TERMS = {"reach": 0.15, "grasp": 0.1, "lift": 0.15, "place": 0.3, "success": 0.3}  # weights of the dense reward
PLACE_TERMS = {"reach": 0.1, "grasp": 0.1, "lift": 0.1, "place": 0.2, "success": 0.5}  # of the task `place`
MAX_POSITION, MAX_VELOCITY = 10.0, 1e3  # m or rad, and per s: beyond these the simulation has diverged
MASSES = ("body_mass", "body_inertia", "body_subtreemass")  # proportional to the object's mass, and the inverse of it:
INVERSE_MASSES = ("body_invweight0", "dof_invweight0")
# Fields that differ between objects and matter to the C engine alone, if at all.
C_ONLY = {"bvh_aabb", "geom_sameframe", "dof_M0", "dof_length", "cam_poscom0", "light_poscom0"}
RANDOMISED = ("mass", "friction", "restitution", "damping")


def _where(mask: torch.Tensor, new, old):
    """torch.where over rows, of two tensors or of two dicts; `old` may be a number."""
    if isinstance(new, dict):
        return {k: _where(mask, value, old[k] if isinstance(old, dict) else old) for k, value in new.items()}
    return torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, old)


def rotate(quat: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """`vector` (N, 3) turned by the unit quaternions `quat` (N, 4), w first."""
    w, axis = quat[:, :1], quat[:, 1:]
    twice = 2 * torch.linalg.cross(axis, vector)
    return vector + w * twice + torch.linalg.cross(axis, twice)


class Real2SimEnv(VectorEnv):
    """A vector environment as docs/environments.md says: torch tensors, same-step autoreset, true last observations.

    Action (num_envs, 9), clipped to -1 to 1: by how much the targets of the seven joints move, in units of JOINT_STEP,
    and those of the two fingers, in units of FINGER_STEP (positive: open). Observation: see `observe`. An episode is
    terminated where the object falls off the table (not with the sparse reward, where that would end a punishment).
    With the task `hold` success is the object within SUCCESS_DISTANCE of a goal in the air, with `place` of one on the
    table, at rest and with the hand away. `info["object"]` (num_envs,): which of the objects each environment had.

    A task of your own: subclass, and override `reward` or `observe`. Raises ValueError for settings that do not fit.
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
        check(cfg, num_envs)
        self.device, backend = resolve_backend(cfg.backend, device)
        self.num_envs = num_envs
        self._reward_file = load_reward(cfg.reward_file) if cfg.reward_file else None
        self.variants = variants = build(cfg)
        self.model = variants.models[0]
        self._init_physics(backend, physics_threads)
        self.looks = None
        if cfg.observation == "rgb":
            self.looks = Looks(cfg, num_envs, self.device, backend, physics_threads)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        finger = self.model.actuator("left_finger")
        self._gain, self._damping = float(finger.gainprm[0]), -float(finger.biasprm[2])  # N/m, N s/m
        self._rest_heights, self._rest_quats = self._tensor(variants.height), self._tensor(variants.quat)
        self._grasp_points = self._tensor(variants.grasp)
        self._off_centre = bool((self._grasp_points.abs() > 1e-6).any())  # of the objects' points to be grasped
        self._object_index = torch.as_tensor(variants.object_index, device=self.device)

        self._lower, self._upper = self._tensor((*LOWER, 0, 0)), self._tensor((*UPPER, FINGER_MAX, FINGER_MAX))
        self._action_scale = self._tensor((JOINT_STEP,) * 7 + (FINGER_STEP,) * 2)
        self._home = self._tensor((*HOME, FINGER_MAX, FINGER_MAX))
        self._home_noise = self._tensor((HOME_NOISE,) * 7 + (0, 0))
        self._centre = self._tensor(CENTRE)
        self._table_min, self._table_max = self._tensor(TABLE_MIN), self._tensor(TABLE_MAX)
        self._object_area, self._goal_area = self._tensor(cfg.object_area), self._tensor(cfg.goal_area)
        self._weights = self._tensor(tuple((PLACE_TERMS if cfg.task == "place" else TERMS).values()))[:, None]

        N, zeros = num_envs, lambda *shape: torch.zeros(*shape, device=self.device)
        self.action = zeros(N, 9)
        self.target = zeros(N, 9)  # rad and m, of joints and fingers
        self.goal = zeros(N, 3)  # m, of the object's centre
        self.variant = torch.zeros(N, dtype=torch.long, device=self.device)  # of the object
        self.poses = zeros(cfg.delay[1] + 1, N, 7)  # measured of the object: position and quaternion, newest first
        self.age = torch.zeros(N, dtype=torch.long, device=self.device)  # of the pose that is observed (steps)
        self.look = zeros(N, NUMBERS)  # uniform numbers from which lamp, colours and camera follow
        self.episode_length = torch.zeros(N, dtype=torch.long, device=self.device)
        self.phase = torch.zeros_like(self.episode_length)  # the episode length at reset
        self.succeeded = torch.zeros(N, dtype=torch.bool, device=self.device)
        self.lifted = torch.zeros_like(self.succeeded)  # held above LIFTED at some moment of the episode
        self.totals = zeros(1 + len(TERMS), N)  # sums over the episode: return and its terms
        self.nan_resets = torch.zeros((), dtype=torch.long, device=self.device)
        self._everyone = torch.ones(N, dtype=torch.bool, device=self.device)

        # One observation tells the space's shape, whoever overrides `observe`.
        self._reset(self._everyone)
        self._read_state()
        self.single_observation_space = _space(self.observe())
        self.reward(self._terms())  # a reward file's mistakes are found before training
        self.generator.manual_seed(seed)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (9,))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    BUFFERS = ("action", "target", "goal", "variant", "poses", "age", "look", "episode_length", "phase", "succeeded")
    BUFFERS += ("lifted", "totals", "nan_resets")

    def _init_physics(self, backend: str, physics_threads: int):
        """Worlds whose own are the fields in which variants differ or that are randomised."""
        cfg, tables = self.cfg, self.variants.tables()
        names = set(tables)
        names |= {*MASSES, *INVERSE_MASSES, "dof_M0"} if cfg.mass[0] < cfg.mass[1] or cfg.mass[0] != 1 else set()
        names |= {"pair_friction"} if cfg.friction != (1, 1) else set()
        names |= {"pair_solref"} if cfg.restitution != (0, 0) else set()
        names |= {"actuator_biasprm"} if cfg.damping != (1, 1) else set()
        if backend != "mujoco":
            names -= C_ONLY
        contacts, rows = (24, 96) if is_box(cfg) else (96, 400)
        impl = ("jax" if is_box(cfg) else "warp") if cfg.mjx_impl == "auto" else cfg.mjx_impl
        per_world = tuple(sorted(names))
        self.physics = BatchedMujoco(
            self.model, self.num_envs, self.device, backend, physics_threads, per_world, contacts, rows, impl
        )
        # (variants or 1, ...) of each field, as the worlds hold it.
        self._tables = {
            name: torch.as_tensor(tables.get(name, getattr(self.model, name)[None]), device=self.device)
            .to(field.dtype)
            .view(-1, *field.shape[1:])
            for name, field in self.physics.fields.items()
        }
        self._body, self._dof = self.model.body("object").id, int(self.model.joint("object").dofadr[0])
        ids = [self.model.geom(i).id for i in range(self.model.ngeom) if self.model.geom(i).name.startswith("object")]
        of_object = np.isin(self.model.pair_geom1, ids) | np.isin(self.model.pair_geom2, ids)
        self._pairs = torch.as_tensor(of_object.nonzero()[0], device=self.device)

    def _tensor(self, values) -> torch.Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.float32, device=self.device)

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
        return self.observe(), {}

    def step(self, actions: torch.Tensor):
        """Advances all environments by 20 ms; see docs/environments.md for what it returns."""
        self.action = torch.as_tensor(actions, dtype=torch.float32, device=self.device).clamp(-1.0, 1.0)
        target = self.target + self._action_scale * self.action
        target = torch.maximum(torch.minimum(target, self.q + self.cfg.lead), self.q - self.cfg.lead)
        self.target = torch.maximum(torch.minimum(target, self._upper), self._lower)
        self.physics.ctrl.copy_(self.target)
        self.physics.step(SUBSTEPS)
        self.episode_length = self.episode_length + 1
        self._read_state()
        self._measure()

        terms = self._terms()
        reward = self.reward(terms)
        # A state that diverges is absurd before it is infinite; comparisons with NaN are false.
        finite = (self.physics.qpos.abs() < MAX_POSITION).all(1) & (self.physics.qvel.abs() < MAX_VELOCITY).all(1)
        finite = finite & torch.isfinite(self.target).all(1) & torch.isfinite(reward)
        reward = torch.where(finite, reward, 0.0)
        self.totals = self.totals + torch.where(finite, torch.cat((reward[None], terms)), 0.0)
        self.succeeded = self.succeeded | (self.at_goal & finite)
        self.lifted = self.lifted | (self.held & (self.object[:, 2] > self.rest_height + LIFTED))
        terminated = ~finite
        if self.cfg.reward != "sparse":
            terminated = terminated | self.fallen
        truncated = (self.episode_length >= self.cfg.max_episode_steps) & ~terminated
        done = terminated | truncated
        self.nan_resets = self.nan_resets + (~finite).sum()

        obs = final_obs = _where(finite, self.observe(), 0)
        info = {"final_obs": final_obs, "_final_obs": done, "_episode": done, "nan_resets": self.nan_resets}
        info["object"] = self._object_index[self.variant]
        info["episode"] = self._episode(finite)
        # Asking whether any episode ended saves the CPU this work; on a GPU the question would stall the queue.
        if self.device.type == "cuda" or bool(done.any()):
            self._reset(done)
            self._read_state(None if self.device.type == "cuda" else done.nonzero()[:, 0])
            obs = _where(done, self.observe(done, final_obs), final_obs)
        return obs, reward, terminated, truncated, info

    def _episode(self, finite: torch.Tensor) -> dict[str, torch.Tensor]:
        length = self.episode_length - self.phase
        episode = {"r": self.totals[0], "l": length, "success": (self.at_goal & finite).float()}
        episode |= {"success_once": self.succeeded.float(), "fallen": (self.fallen & finite).float()}
        episode |= {"lifted": self.lifted.float(), "goal_distance": torch.where(finite, self.goal_distance, 0.0)}
        return episode | {f"reward_{name}": self.totals[1 + i] / length for i, name in enumerate(TERMS)}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The environment's own entries of `info["episode"]`."""
        return ("success", "success_once", "fallen", "lifted", "goal_distance", *(f"reward_{name}" for name in TERMS))

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

    def close_extras(self, **kwargs):
        """Frees the cameras."""
        if self.looks is not None:
            self.looks.close()

    # --- state and observation

    def _read_state(self, rows: torch.Tensor | None = None):
        """What is known of all worlds, or anew of those of `rows`, from the physics' state."""
        for name, value in self._derive(slice(None) if rows is None else rows).items():
            if rows is None:
                setattr(self, name, value)
            else:
                getattr(self, name)[rows] = value

    def _derive(self, rows) -> dict[str, torch.Tensor]:
        qpos, qvel = self.physics.qpos[rows].float(), self.physics.qvel[rows].float()
        variant = self.variant[rows]
        q, qd, position, quat = qpos[:, :9], qvel[:, :9], qpos[:, 9:12], qpos[:, 12:16]
        frames = Frames(q[:, :7])
        tcp = frames.point(TCP)
        grasp_point = position
        if self._off_centre:
            grasp_point = position + rotate(quat, self._grasp_points[variant])
        to_goal = self.goal[rows] - position
        goal_distance = to_goal.norm(dim=1)
        fingers, speed = q[:, 7:], qd[:, 7:]
        force = self._gain * (fingers - self.target[rows, 7:]) + self._damping * speed  # N, of the servos, closing
        held = ((force > HELD_FORCE) & (speed.abs() < HELD_SPEED)).all(1)  # only an object stops both
        hand_distance = (grasp_point - tcp).norm(dim=1)
        at_goal = goal_distance < SUCCESS_DISTANCE
        if self.cfg.task == "place":
            at_goal = at_goal & (hand_distance > AWAY) & (qvel[:, 9:12].norm(dim=1) < STILL)
        xy = position[:, :2]
        return {
            "q": q,
            "qd": qd,
            "object": position,
            "object_quat": quat,
            "object_velocity": qvel[:, 9:15],
            "tcp": tcp,
            "hand_rotation": frames.rotation,
            "grasp_point": grasp_point,
            "to_object": grasp_point - tcp,
            "hand_distance": hand_distance,
            "to_goal": to_goal,
            "goal_distance": goal_distance,
            "at_goal": at_goal,
            "rest_height": self._rest_heights[variant],
            "held": held,
            "fallen": ((xy < self._table_min) | (xy > self._table_max)).any(1),
        }

    def _measure(self):
        """One more measurement of the object's pose, with noise, or none where it is not seen."""
        cfg, N = self.cfg, self.num_envs
        if not (cfg.pose_noise or cfg.dropout or cfg.delay[1]):
            return
        pose = torch.cat((self.object, self.object_quat), 1)
        noise = torch.randn(N, 7, generator=self.generator, device=self.device)
        pose = pose + cfg.pose_noise * self._tensor((1, 1, 1, 10, 10, 10, 10)) * noise
        pose = torch.cat((pose[:, :3], torch.nn.functional.normalize(pose[:, 3:], dim=1)), 1)
        seen = self._uniform(N, 1, low=0.0) >= cfg.dropout
        self.poses = torch.cat((torch.where(seen, pose, self.poses[0])[None], self.poses[:-1]))

    @property
    def observed_pose(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Position (num_envs, 3) and quaternion (num_envs, 4) of the object as the robot believes them to be."""
        cfg = self.cfg
        if not (cfg.pose_noise or cfg.dropout or cfg.delay[1]):
            return self.object, self.object_quat
        pose = self.poses[self.age, torch.arange(self.num_envs, device=self.device)]
        return pose[:, :3], pose[:, 3:]

    def observe(self, mask: torch.Tensor | None = None, old: dict | None = None):
        """compact: (num_envs, 25), positions (m) in the robot's base, quaternions w, x, y, z:

        0-2 hand (the point between the pads), 3-6 its quaternion (x > 0), 7-9 object's centre of mass, 10-13 its
        quaternion (w >= 0), 14-16 from the hand to where the object is to be grasped, 17-19 from object to goal,
        20-22 goal, 23 opening of the gripper, 24 the opening that it was told. `full` goes on to 58: 25-33 positions of
        joints (rad) and fingers (m), 34-42 their velocities, 43-51 their targets less their positions, 52-57 the
        object's velocity (m/s and, in its own axes, rad/s).

        rgb: a dict of `rgb`, uint8 (num_envs, image_size, image_size, 3), and `proprio` (num_envs, 39): columns 0-6 and
        20-51 of `full`. Pictures are drawn where `mask` (num_envs,); elsewhere they are those of `old`.
        """
        hand = (self.tcp, quaternion_down(self.hand_rotation))
        gripper = (self.q[:, 7:].sum(1, keepdim=True), self.target[:, 7:].sum(1, keepdim=True))
        joints = (self.q, self.qd, self.target - self.q)
        if self.cfg.observation == "rgb":
            proprio = torch.cat((*hand, self.goal, *gripper, *joints), 1)
            return {"rgb": self._pictures(mask, old and old["rgb"]), "proprio": proprio}
        position, quat = self.observed_pose
        to_object = position - self.tcp
        if self._off_centre:
            to_object = to_object + rotate(quat, self._grasp_points[self.variant])
        quat = torch.where(quat[:, :1] < 0, -quat, quat)
        parts = [*hand, position, quat, to_object, self.goal - position, self.goal, *gripper]
        if self.cfg.observation == "full":
            parts += [*joints, self.object_velocity]
        return torch.cat(parts, 1)

    # --- rewards

    def _terms(self) -> torch.Tensor:
        """(terms, num_envs), each from 0 to 1, in the order of TERMS."""
        held = self.held.float()
        down = (-self.hand_rotation[:, 2, 2]).clamp(0, 1)  # 1 where the hand points down
        reach = (1 - torch.tanh(5 * self.hand_distance)) * down
        # Held or not, and nothing for a hand that opens or closes: SAC took three times as long with such a term.
        height = self.object[:, 2] - self.rest_height
        place = 1 - torch.tanh(5 * self.goal_distance)
        if self.cfg.task == "hold":
            lift = (height / LIFTED).clamp(0, 1)
            return torch.stack((reach, held, lift * held, place * held, self.at_goal.float()))
        # High on the way, low near the goal, and only what is lifted comes nearer: paid as well for drawing the object
        # along the table, PPO did that for two million steps. Where it is in its place, all is paid without the hand.
        wanted = LIFTED * (self.to_goal[:, :2].norm(dim=1) / PLACE_DISTANCE).clamp(0, 1)
        lift = 1 - (wanted - height).clamp(0, LIFTED) / LIFTED
        terms = torch.stack((reach, held, lift * held, place * lift * held))
        there = self.goal_distance < SUCCESS_DISTANCE
        terms = torch.where(there, torch.stack((torch.ones_like(place),) * 3 + (place,)), terms)
        # Half for how far the fingers are told to be open, and half for being told to open now: those of a hand that
        # carries are told to close in every step, and one step the other way opens nothing, so it would teach nothing.
        opening = (self.target[:, 7:].mean(1) / FINGER_MAX + (1 + self.action[:, 7:].mean(1)) / 2) / 2
        away = (self.hand_distance / AWAY).clamp(0, 1)
        upright = (1 - self._tilt() / MAX_TILT).clamp(0, 1)  # what is let go of while it leans falls over
        success = torch.where(self.at_goal, 1.0, there * upright * (0.5 * opening + 0.25 * away))
        return torch.cat((terms, success[None]))

    def _tilt(self) -> torch.Tensor:
        """(num_envs,): the angle (rad) between the object's upward direction and that of the object at rest."""
        rest = self._rest_quats[self.variant]
        turned = multiply(self.object_quat, torch.cat((rest[:, :1], -rest[:, 1:]), 1))
        return 2 * turned[:, 1:3].norm(dim=1).clamp(max=1).asin()

    def reward(self, terms: torch.Tensor) -> torch.Tensor:
        """(num_envs,), of `terms` (terms, num_envs) from 0 to 1 in the order of TERMS, or of any state there is."""
        if self._reward_file is not None:
            function, names = self._reward_file
            reward = torch.as_tensor(function(**{name: getattr(self, name) for name in names}), device=self.device)
            if reward.shape != (self.num_envs,):
                shape = tuple(reward.shape)
                raise ValueError(f"--reward-file {self.cfg.reward_file} gave shape {shape}, not ({self.num_envs},)")
            return reward.float()
        if self.cfg.reward == "sparse":
            return 2 * self.at_goal.float() - 1
        return (self._weights * terms).sum(0)

    # --- resets

    def _reset(self, mask: torch.Tensor):
        """Begins an episode where `mask`: the hand open over the table, an object on it, a goal elsewhere."""
        N, cfg = self.num_envs, self.cfg
        count = len(self.variants.models)
        variant = torch.randint(count, (N,), generator=self.generator, device=self.device)
        q = self._home + self._home_noise * self._uniform(N, 9)
        xy = self._centre + self._object_area * self._uniform(N, 2)
        half_yaw = 0.5 * cfg.object_yaw * self._uniform(N)
        low, high = cfg.goal_height
        goal = self._centre + self._goal_area * self._uniform(N, 2)
        height = self._uniform(N, 1, low=low, high=high)
        if cfg.task == "place":
            way = goal - xy
            goal = xy + way * (PLACE_DISTANCE / way.norm(dim=1, keepdim=True).clamp(min=1e-6)).clamp(min=1)
            height = self._rest_heights[variant][:, None]
        goal = torch.cat((goal, height), 1)
        age = torch.randint(cfg.delay[0], cfg.delay[1] + 1, (N,), generator=self.generator, device=self.device)
        look = self._uniform(N, self.look.shape[1])
        zero = torch.zeros_like(half_yaw)
        turn = torch.stack((torch.cos(half_yaw), zero, zero, torch.sin(half_yaw)), 1)
        quat = multiply(turn, self._rest_quats[variant])
        qpos = torch.cat((q, xy, self._rest_heights[variant][:, None], quat), 1)
        for name, value in (("variant", variant), ("goal", goal), ("target", q), ("age", age), ("look", look)):
            setattr(self, name, _where(mask, value, getattr(self, name)))
        self.poses = torch.where(mask[:, None], qpos[:, 9:], self.poses)
        for name in ("action", "episode_length", "phase", "succeeded", "lifted"):
            old = getattr(self, name)
            setattr(self, name, old.masked_fill(mask.view(-1, *[1] * (old.dim() - 1)), 0))
        self.totals = self.totals.masked_fill(mask, 0.0)
        self._set_dynamics(mask)
        self.physics.reset(mask, qpos, torch.zeros(N, self.model.nv, device=self.device))

    def _set_dynamics(self, mask: torch.Tensor):
        """Shape, mass, friction, restitution and damping of a new episode where `mask`."""
        cfg, N = self.cfg, self.num_envs
        draws = {
            name: self._uniform(N, 1, low=getattr(cfg, name)[0], high=getattr(cfg, name)[1]) for name in RANDOMISED
        }
        # Of those who need it; which they are, a GPU cannot say without stalling the queue.
        rows = slice(None) if self.device.type == "cuda" else mask.nonzero()[:, 0]
        mask, variant = mask[rows], self.variant[rows]
        mass, friction, restitution, damping = (draws[name][rows] for name in RANDOMISED)
        for name, field in self.physics.fields.items():
            table = self._tables[name]
            value = table[variant if len(table) > 1 else torch.zeros_like(variant)]
            if name in MASSES:
                value[:, self._body] *= mass.to(value.dtype).view(-1, *[1] * (value.dim() - 2))
            elif name == "body_invweight0":
                value[:, self._body] /= mass.to(value.dtype)
            elif name == "dof_M0":  # where a body's inertia is diagonal the C engine takes its mass from here
                value[:, self._dof : self._dof + 6] *= mass.to(value.dtype)
            elif name == "dof_invweight0":
                value[:, self._dof : self._dof + 6] /= mass.to(value.dtype)
            elif name == "pair_friction":
                value[:, self._pairs] *= friction.to(value.dtype)[..., None]
            elif name == "pair_solref":
                value[:, self._pairs, 1] = damping_ratio(restitution).to(value.dtype)
            elif name == "actuator_biasprm":
                value[:, :7, 2] *= damping.to(value.dtype)
            field[rows] = _where(mask, value, field[rows])

    # --- pictures

    def _pictures(self, mask: torch.Tensor | None, old: torch.Tensor | None) -> torch.Tensor:
        """uint8 (num_envs, image_size, image_size, 3)."""
        self.looks.set(self.goal, self.variant, self.look)
        qpos = self.physics.qpos.nan_to_num(0.0, 0.0, 0.0).clamp(-MAX_POSITION, MAX_POSITION)
        if mask is None or self.device.type == "cuda":
            return self.looks.renderer.render(qpos)
        pictures = old.clone()
        pictures[mask] = self.looks.renderer.render(qpos, mask)
        return pictures


def damping_ratio(restitution: torch.Tensor) -> torch.Tensor:
    """Of a spring-damper contact that gives back this share of the speed: -ln e / sqrt(pi^2 + ln^2 e)."""
    log = restitution.clamp(min=1e-6).log()
    ratio = -log / torch.sqrt(math.pi**2 + log.square())
    return torch.where(restitution > 0, ratio, 1.0)


def _space(obs) -> gym.Space:
    if isinstance(obs, dict):
        return gym.spaces.Dict({name: _space(value) for name, value in obs.items()})
    if obs.dtype == torch.uint8:
        return gym.spaces.Box(0, 255, tuple(obs.shape[1:]), np.uint8)
    return gym.spaces.Box(-math.inf, math.inf, tuple(obs.shape[1:]))


gym.register("Real2Sim-v0", vector_entry_point="common.envs.real2sim:Real2SimEnv")


def main(arguments: list[str]) -> int:
    """The command line of this file; its exit code."""
    if len(arguments) != 2 or arguments[0] not in ("inspect", "examples"):
        print("usage: python common/envs/real2sim.py inspect SCAN | examples FOLDER", file=sys.stderr)
        return 2
    command, what = arguments
    if command == "examples":
        print("\n".join(map(str, write_examples(what))))
        return 0
    try:
        found = prepare(what)
        variants = build(Real2SimConfig(objects=(what,)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    size = " x ".join(f"{1000 * side:.1f}" for side in found.extents)
    print(f"{what}: {size} mm, {1e6 * found.volume:.1f} cm3")
    print("\n".join(f"  {note}" for note in found.notes))
    print(f"  stands {1000 * variants.height[0]:.1f} mm high to its centre of mass, which is what the goal is for")
    path = Path(f"{found.name}_hulls.png")
    picture(found, path)
    print(f"  mesh and convex pieces are drawn in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
