"""Unitree Go2 velocity tracking on flat ground, batched in MuJoCo. See docs/go2.md for spaces, rewards and sources."""

import math
from dataclasses import replace

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from common.envs.go2_config import (
    CONTROL_DT,
    ENV_SETTINGS,
    JOINTS,
    MAX_LATENCY,
    Go2Config,
    build_model,
    check,
    foot_names,
)
from common.physics import BatchedMujoco, resolve_backend

# Left and right exchanged: legs change places, and of their joints' angles the hip's changes its sign.
MIRRORED_JOINTS, MIRRORED_SIGNS = (3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8), (-1.0, 1.0, 1.0) * 4
DEFAULT_POSE = (0.0, 0.8, -1.5, 0.0, 0.8, -1.5, 0.0, 1.0, -1.5, 0.0, 1.0, -1.5)  # rad, Genesis go2_train.py
MAX_POSITION, MAX_VELOCITY = 1e4, 1e3  # m or rad, and per s: beyond these the simulation has diverged
COMMAND_SCALE = (2.0, 2.0, 0.25, 2.0, 2.0)  # observation scales of legged_gym and, for height and jump, Genesis' forks
LIN_VEL_SCALE, ANG_VEL_SCALE, DOF_VEL_SCALE = 2.0, 0.25, 0.05
# Half widths of uniform noise in SI units, legged_gym `noise_scales`: lin vel, ang vel, gravity, q, qd
NOISE = (0.1, 0.2, 0.05, 0.01, 1.5)
JUMP_WINDOW = 0.5  # s a jump command lasts at most; it ends when the base is within JUMP_TOLERANCE of its height
JUMP_TOLERANCE = 0.05  # m
JUMP_LANDING = 0.7  # s after take-off ends in which the velocity command stays zero

# Weight of each reward term per second. `reference`: Genesis go2_train.py. `natural`: the sources stand in `_rewards`.
REFERENCE = {
    "lin_vel": 1.0,
    "ang_vel": 0.2,
    "lin_vel_z": -1.0,
    "base_height": -50.0,
    "action_rate": -0.005,
    "pose": -0.1,
}
NATURAL = REFERENCE | {
    "lin_vel": 2.0,
    "ang_vel": 0.5,
    "action_rate": -0.01,
    "pose": -0.05,
    "ang_vel_xy": -0.05,
    "air_time": 2.0,
    "clearance": -10.0,
    "slip": -0.1,
    "trot": 1.0,
    "stand": -0.3,
    "power": -0.0005,
}
JUMP = {"jump_height": 6.0, "jump_land": 1.0}
# Standing still on four feet is no virtue while a jump is under way.
OFF_IN_JUMP = ("lin_vel_z", "base_height", "action_rate", "pose", "air_time", "clearance", "trot", "stand", "power")
# The fields of the model that differ between worlds with `randomise`.
RANDOMISED = ("geom_friction", "body_mass", "body_inertia", "actuator_gainprm", "actuator_biasprm")
RANDOMISED += ("actuator_forcerange", "dof_damping", "dof_frictionloss", "dof_armature")
SWING_HEIGHT = 0.1  # m, the height of a foot's centre that `clearance` asks of a swing
TERMS = (*NATURAL, *JUMP)


class Go2Env(VectorEnv):
    """A vector environment as docs/environments.md says: torch tensors, same-step autoreset, true last observations.

    `cfg` is copied, whatever dataclass holds its fields beside others; named settings override it. `physics_threads`
    (0: all cores) is for the mujoco backend.

    Action (num_envs, 12): offset from the default pose in units of `action_scale` rad, in the order of JOINTS.
    Observation (num_envs, obs_dim * history): see docs/go2.md. Raises ValueError for settings that do not fit.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_fps": round(1 / CONTROL_DT)}
    exact_resume = True  # `load_state_dict` restores all there is

    def __init__(
        self,
        num_envs: int = 1,
        device: str | torch.device = "cpu",
        seed: int = 1,
        cfg: Go2Config | None = None,
        physics_threads: int = 0,
        **config,
    ):
        unknown = config.keys() - set(ENV_SETTINGS)
        if unknown:
            raise ValueError(f"Go2Env has no setting {', '.join(sorted(unknown))}")
        cfg = cfg or Go2Config()
        self.cfg = cfg = replace(Go2Config(**{name: getattr(cfg, name) for name in ENV_SETTINGS}), **config)
        check(cfg, num_envs)
        self.device, backend = resolve_backend(cfg.backend, device)
        self.num_envs = num_envs
        self.model = build_model(cfg, backend)
        self.base = int(self.model.jnt_bodyid[0])  # the floating body
        lightest = cfg.mass_range[0] * self.model.body_mass[self.base]
        if cfg.randomise and cfg.payload_range[0] <= -lightest:
            raise ValueError(f"--payload-range takes masses above {-lightest:.2f} kg, got {cfg.payload_range}")
        self.physics = BatchedMujoco(
            self.model,
            num_envs,
            device,
            backend,
            physics_threads,
            RANDOMISED if cfg.randomise else (),
            nconmax=32,
            njmax=256,
        )
        # A file may declare its joints in any order; ours declares them in JOINTS' own, and a slice is a free view.
        ids = [self.model.joint(name) for name in JOINTS]
        q_index, v_index = [int(j.qposadr[0]) for j in ids], [int(j.dofadr[0]) for j in ids]
        in_order = q_index == list(range(7, 19))
        self._q = slice(7, 19) if in_order else torch.tensor(q_index, device=self.device)
        self._v = slice(6, 18) if in_order else torch.tensor(v_index, device=self.device)

        self.foot_radius = float(self.model.geom(foot_names(self.model)[0]).size[0])
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.default_pose = self._tensor(DEFAULT_POSE)
        self._spawn = torch.zeros(19, device=self.device)
        self._spawn[2], self._spawn[3], self._spawn[self._q] = cfg.spawn_height, 1.0, self.default_pose
        names = ("vx", "vy", "yaw", "height", "jump")[: 5 if cfg.commands == "full" else 3]
        ranges = self._tensor([getattr(cfg, f"command_{name}") for name in names])
        self._command_low, self._command_span = ranges[:, 0], ranges[:, 1] - ranges[:, 0]
        self._command_scale = self._tensor(COMMAND_SCALE[: len(names)])
        noise = (NOISE[0] * LIN_VEL_SCALE,) * 3 if cfg.observation == "full" else ()
        noise += (NOISE[1] * ANG_VEL_SCALE,) * 3 + (NOISE[2],) * 3 + (0.0,) * len(names)
        noise += (NOISE[3],) * 12 + (NOISE[4] * DOF_VEL_SCALE,) * 12 + (0.0,) * 12
        self._noise = self._tensor(noise) * cfg.observation_noise
        vector, rotation = ((0, 1, 2), (1.0, -1.0, 1.0)), ((0, 1, 2), (-1.0, 1.0, -1.0))
        mirror = [vector, rotation, vector] if cfg.observation == "full" else [rotation, vector]
        mirror += [(range(len(names)), (1.0, -1.0, -1.0, 1.0, 1.0)[: len(names)])]
        mirror += [(MIRRORED_JOINTS, MIRRORED_SIGNS)] * 3
        order, signs = [], []
        for part_order, part_signs in mirror * cfg.history:
            order += [len(signs) + i for i in part_order]
            signs += part_signs
        self._mirrored_obs = torch.tensor(order, device=self.device), self._tensor(signs)
        self._mirrored_actions = torch.tensor(MIRRORED_JOINTS, device=self.device), self._tensor(MIRRORED_SIGNS)
        self.weights = self._reward_weights()
        self.max_episode_length = math.ceil(cfg.episode_seconds / CONTROL_DT)

        self.single_observation_space = gym.spaces.Box(-math.inf, math.inf, (len(noise) * cfg.history,))
        self.single_action_space = gym.spaces.Box(-math.inf, math.inf, (12,))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        N, zeros = num_envs, lambda *shape: torch.zeros(*shape, device=self.device)
        self.fixed_commands = None  # (num_envs, commands) to evaluate with, in place of random ones
        self.command = zeros(N, len(names))
        self.action = zeros(N, 12)  # the newest action, part of the observation
        self.pending = zeros(N, MAX_LATENCY + 1, 12)  # the last actions, newest first
        self.latency = torch.full((N,), cfg.action_latency, device=self.device)
        self.episode_length = torch.zeros(N, dtype=torch.long, device=self.device)
        self.phase = torch.zeros_like(self.episode_length)  # the episode length at reset
        self.air_time = zeros(N, 4)  # s, per foot in the order of LEGS
        self.foot_pos = zeros(N, 4, 3)
        self.jump_time = zeros(N) - 1.0  # s since a jump was commanded; negative: none under way
        self.jump_peak = zeros(N)  # m, highest base of the jump under way
        self.history = zeros(N, cfg.history, len(noise))
        self.totals = zeros(3 + len(self.weights), N)  # sums over the episode: return, errors, reward terms
        self.nan_resets = torch.zeros((), dtype=torch.long, device=self.device)
        self._everyone = torch.ones(N, dtype=torch.bool, device=self.device)
        if cfg.randomise:
            self._nominal = {name: field[0].clone() for name, field in self.physics.fields.items()}
            self._randomise_bodies()

    BUFFERS = ("command", "action", "pending", "latency", "episode_length", "phase", "air_time", "foot_pos")
    BUFFERS += ("jump_time", "jump_peak", "history", "totals", "nan_resets")

    def _tensor(self, values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def _uniform(self, *shape: int, low: float | torch.Tensor = 0.0, high: float | torch.Tensor = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def _reward_weights(self) -> dict[str, float]:
        weights = dict(REFERENCE if self.cfg.rewards == "reference" else NATURAL)
        if self.cfg.commands == "full":
            weights |= JUMP
        for item in self.cfg.reward_weights:
            name, _, value = item.partition("=")
            if name not in TERMS:
                raise ValueError(f"--reward-weights: there is no term {name!r}; the terms are {', '.join(TERMS)}")
            if name in JUMP and self.cfg.commands != "full":
                raise ValueError(f"--reward-weights: {name} needs --commands full")
            try:
                weights[name] = float(value)
            except ValueError:
                raise ValueError(f"--reward-weights: {item!r} is not of the form term=number") from None
            if not math.isfinite(weights[name]):
                raise ValueError(f"--reward-weights: {item!r} is not a finite number")
        return weights

    # --- the Gymnasium interface

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Starts all episodes; `options={"random_phase": True}` spreads their ages over the time limit."""
        if seed is not None:
            self.generator.manual_seed(seed)
        self._reset(self._everyone)
        if options and options.get("random_phase"):  # detail 14, in the form used with a time limit
            self.phase = (self._uniform(self.num_envs) * self.max_episode_length).long()
            self.episode_length = self.phase
        self._read_state()
        return self._observe(self._everyone), {}

    def step(self, actions: torch.Tensor):
        """One control step of 0.02 s. See docs/environments.md for what it returns."""
        cfg, last_action = self.cfg, self.action
        # A copy: the caller may reuse the tensor (a CUDA graph's output) before `last_action` is read.
        self.action = torch.as_tensor(actions, dtype=torch.float32, device=self.device).detach().clone()
        self.pending = torch.cat((self.action[:, None], self.pending[:, :-1]), 1)
        if cfg.randomise:
            executed = self.pending[torch.arange(self.num_envs, device=self.device), self.latency]
            self._push()
        else:
            executed = self.pending[:, cfg.action_latency]
        self.physics.ctrl.copy_(self.default_pose + cfg.action_scale * executed)
        self.physics.step(cfg.substeps)
        self.episode_length = self.episode_length + 1
        self._read_state()

        reward, terms = self._rewards(last_action)
        # A state that diverges is absurd before it is infinite; comparisons with NaN are false.
        finite = (self.physics.qpos.abs() < MAX_POSITION).all(1) & (self.physics.qvel.abs() < MAX_VELOCITY).all(1)
        finite = finite & torch.isfinite(self.action).all(1) & torch.isfinite(reward)
        reward = torch.where(finite, reward, 0.0)
        self.totals = self.totals + torch.where(finite, terms, 0.0)
        # Euler angles of the body's z axis; atan2 keeps roll right when the robot lies on its back.
        pitch = torch.asin(self.gravity[:, 0].clamp(-1, 1))
        roll = torch.atan2(-self.gravity[:, 1], -self.gravity[:, 2])
        self.tilt = torch.rad2deg(torch.maximum(pitch.abs(), roll.abs()))  # of this step, also where it ends an episode
        terminated = (self.tilt > cfg.termination_degrees) | ~finite
        truncated = (self.episode_length >= self.max_episode_length) & ~terminated
        done = terminated | truncated
        self.nan_resets = self.nan_resets + (~finite).sum()

        obs = final_obs = torch.where(finite[:, None], self._observe(~self._everyone), 0.0)
        length = self.episode_length - self.phase
        info = {"final_obs": final_obs, "_final_obs": done, "_episode": done, "nan_resets": self.nan_resets}
        info["episode"] = {"r": self.totals[0], "l": length}
        info["episode"] |= {name: self.totals[1 + i] / length for i, name in enumerate(self.metric_names)}
        changed = self._new_commands()
        # Asking whether any episode ended saves the CPU this work; on a GPU the question would stall the queue.
        on_gpu = self.device.type == "cuda"
        if on_gpu or bool(done.any()):
            self._reset(done)
            self._read_state()
        if on_gpu or bool((changed | done).any()):
            obs = self._observe(done, refresh=True)
        return obs, reward, terminated, truncated, info

    def mirror_obs(self, obs: torch.Tensor) -> torch.Tensor:
        """Observations (..., obs_dim) with left and right exchanged: robot and task are symmetric."""
        order, signs = self._mirrored_obs
        return obs[..., order] * signs

    def mirror_actions(self, actions: torch.Tensor) -> torch.Tensor:
        """Actions (..., 12) with left and right exchanged."""
        order, signs = self._mirrored_actions
        return actions[..., order] * signs

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The environment's own entries of `info["episode"]`: means over the episode, in SI units."""
        return ("lin_vel_error", "yaw_rate_error", *(f"reward_{name}" for name in self.weights))

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
        w, x, y, z = qpos[:, 3:7].unbind(1)
        # The columns of the body's rotation matrix, each a world axis' coordinates when multiplied from the left.
        rows = (
            torch.stack((1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)), 1),
            torch.stack((2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)), 1),
            torch.stack((2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)), 1),
        )
        world_to_body = torch.stack(rows, 1)
        self.lin_vel = torch.einsum("nij,nj->ni", world_to_body, qvel[:, :3])  # m/s, body frame
        self.ang_vel = qvel[:, 3:6]  # rad/s, body frame
        self.gravity = -world_to_body[:, :, 2]  # unit vector, body frame
        self.height = qpos[:, 2]
        self.dof_pos = qpos[:, self._q] - self.default_pose
        self.dof_vel = qvel[:, self._v]

    def _observe(self, reset: torch.Tensor, refresh: bool = False) -> torch.Tensor:
        """(num_envs, obs_dim * history). `reset` marks new episodes, whose history is filled with the first
        observation; `refresh` replaces the newest frame of the others instead of adding one.
        """
        parts = [self.lin_vel * LIN_VEL_SCALE] if self.cfg.observation == "full" else []
        parts += [self.ang_vel * ANG_VEL_SCALE, self.gravity, self.command * self._command_scale]
        parts += [self.dof_pos, self.dof_vel * DOF_VEL_SCALE, self.action]
        obs = torch.cat(parts, 1)
        if self.cfg.randomise:
            obs = obs + self._noise * (2 * torch.rand(obs.shape, generator=self.generator, device=self.device) - 1)
        if self.cfg.history == 1:
            return obs
        old = self.history[:, :-1] if refresh else self.history[:, 1:]
        stacked = torch.cat((old, obs[:, None]), 1)
        self.history = torch.where(reset[:, None, None], obs[:, None].expand_as(stacked), stacked)
        return self.history.flatten(1)

    # --- rewards

    def _rewards(self, last_action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reward (num_envs,), and (3 + terms, num_envs): reward, velocity error, yaw rate error, weighted terms.

        Sources: the first six terms are Genesis examples/locomotion/go2_env.py; ang_vel_xy, air_time,
        slip and stand legged_gym legged_robot.py; clearance Ji et al. 2022 (arXiv 2202.05481) eq. 4; trot
        the contact pattern of Margolis & Agrawal 2022 (arXiv 2212.03238) without its clock; power Fu et al. 2021
        (arXiv 2111.01674).
        """
        command, dt = self.command, CONTROL_DT
        lin_error = (command[:, :2] - self.lin_vel[:, :2]).square().sum(1)
        yaw_error = (command[:, 2] - self.ang_vel[:, 2]).square()
        target = command[:, 3] if self.cfg.commands == "full" else self.cfg.base_height_target
        terms = {
            "lin_vel": torch.exp(-lin_error / 0.25),
            "ang_vel": torch.exp(-yaw_error / 0.25),
            "lin_vel_z": self.lin_vel[:, 2].square(),
            "base_height": (self.height - target).square(),
            "action_rate": (self.action - last_action).square().sum(1),
            "pose": self.dof_pos.abs().sum(1),
        }
        if self.weights.keys() - terms.keys():
            sensors = self.physics.sensordata.float()
            foot_pos, contact = sensors[:, :12].view(-1, 4, 3), sensors[:, 12:] > 0
            # The sensors are one control step apart, so their difference is the mean velocity in between.
            known = self.episode_length - self.phase > 1
            foot_vel = (foot_pos - self.foot_pos)[..., :2].norm(dim=2) / dt * known[:, None]
            moving = (command[:, :2].norm(dim=1) > 0.1) | (command[:, 2].abs() > 0.1)
            fr, fl, rr, rl = contact.unbind(1)
            terms |= {
                "ang_vel_xy": self.ang_vel[:, :2].square().sum(1),
                "air_time": ((self.air_time - 0.2).clamp(max=0.1) * contact * (self.air_time > 0)).sum(1) * moving,
                "clearance": ((foot_pos[..., 2] - SWING_HEIGHT).square() * foot_vel * ~contact).sum(1),
                "slip": (foot_vel.square() * contact).sum(1),
                "trot": ((fr == rl) & (fl == rr) & (fr != fl)) * moving,
                "stand": (self.dof_pos.abs().sum(1) + (~contact).sum(1)) * ~moving,
                "power": (self.physics.actuator_force.float() * self.dof_vel).abs().sum(1),
            }
            self.foot_pos, self.air_time = foot_pos.clone(), torch.where(contact, 0.0, self.air_time + dt)
        if self.cfg.commands == "full":
            jumping, rising = self.jump_time >= 0, command[:, 4] > 0
            terms = {name: term * ~jumping if name in OFF_IN_JUMP else term for name, term in terms.items()}
            gain = torch.minimum(self.height, command[:, 4]) - self.jump_peak
            terms["jump_height"] = gain.clamp(min=0) * rising / (command[:, 4] - self.cfg.base_height_target) / dt
            terms["jump_land"] = torch.exp(-(self.height - target).square() / 0.01) * (jumping & ~rising)
            self.jump_peak = torch.maximum(self.jump_peak, self.height)
        weighted = torch.stack([terms[name] * (weight * dt) for name, weight in self.weights.items()])
        reward = weighted.sum(0)
        if self.cfg.rewards == "natural":
            reward = reward.clamp(min=0)  # legged_gym only_positive_rewards: else falling early pays at first
        return reward, torch.cat((torch.stack((reward, lin_error.sqrt(), yaw_error.sqrt())), weighted))

    # --- commands, resets and disturbances

    def _sample_commands(self) -> torch.Tensor:
        if self.fixed_commands is not None:
            return self.fixed_commands.clone()
        share = self._uniform(self.num_envs, len(self._command_low), low=-0.5, high=0.5) / (1 - self.cfg.command_ends)
        command = self._command_low + self._command_span * (0.5 + share.clamp(-0.5, 0.5))
        stand = self._uniform(self.num_envs) < self.cfg.standing_fraction
        command[:, :3] *= ~stand[:, None]
        if self.cfg.commands == "full":
            command[:, 4] = 0.0
        return command

    def _new_commands(self) -> torch.Tensor:
        """Draws the commands that are due; returns whose command changed, (num_envs,) bool."""
        due = self.episode_length % round(self.cfg.resample_seconds / CONTROL_DT) == 0
        if self.cfg.commands == "velocity":
            if self.device.type == "cuda" or bool(due.any()):
                self.command = torch.where(due[:, None], self._sample_commands(), self.command)
            return due
        # A jump: its height is commanded until the base is there or the window is over, then it lands, standing.
        jumping = self.jump_time >= 0
        jump_time = self.jump_time + CONTROL_DT * jumping
        rising = self.command[:, 4] > 0
        top = rising & ((self.height > self.command[:, 4] - JUMP_TOLERANCE) | (jump_time >= JUMP_WINDOW))
        jump_time = torch.where(top, JUMP_WINDOW, jump_time)
        landed = jumping & ~rising & (jump_time >= JUMP_WINDOW + JUMP_LANDING)
        # Who cannot walk yet is not asked to jump: otherwise hopping on the spot is learned, and walking never.
        tracks = self.totals[1] < self.cfg.jump_tracking * (self.episode_length - self.phase)
        start = ~jumping & tracks & (self._uniform(self.num_envs) < CONTROL_DT / self.cfg.jump_interval)
        self.jump_time = torch.where(start, 0.0, torch.where(landed, -1.0, jump_time))
        self.jump_peak = torch.where(start, self.height, self.jump_peak)
        due = (due & ~jumping & ~start) | landed
        command = torch.where(due[:, None], self._sample_commands(), self.command)
        command[:, :3] *= ~start[:, None]
        jump_height = self._command_low[4] + self._command_span[4] * self._uniform(self.num_envs)
        command[:, 4] = torch.where(start, jump_height, torch.where(top, 0.0, command[:, 4]))
        self.command = command
        return due | start | top

    def _reset(self, mask: torch.Tensor):
        qpos = self._spawn.repeat(self.num_envs, 1)
        qpos[:, self._q] += self.cfg.spawn_noise * self._uniform(self.num_envs, 12, low=-1.0)
        self.physics.reset(mask, qpos, torch.zeros(self.num_envs, 18, device=self.device))
        self.command = torch.where(mask[:, None], self._sample_commands(), self.command)
        for name in ("action", "pending", "episode_length", "phase", "air_time", "foot_pos", "jump_peak"):
            old = getattr(self, name)
            setattr(self, name, old.masked_fill(mask.view(-1, *[1] * (old.dim() - 1)), 0))
        self.jump_time = self.jump_time.masked_fill(mask, -1.0)
        self.totals = self.totals.masked_fill(mask, 0.0)
        if self.cfg.randomise:
            self._randomise_motors(mask)

    def _draw(self, name: str, *shape: int) -> torch.Tensor:
        low, high = getattr(self.cfg, f"{name}_range")
        return self._uniform(*shape, low=low, high=high)

    def _draw_joints(self, name: str) -> torch.Tensor:
        """(num_envs, nv): one number per joint, zero for the floating base. The robots differ by more than the joints
        of one do, so that some are stiff, or loose, in all of them.
        """
        low, high = getattr(self.cfg, f"{name}_range")
        N, drawn = self.num_envs, torch.zeros(self.num_envs, self.model.nv, device=self.device)
        share = self._uniform(N, 1, low=-0.4, high=1.4) + self._uniform(N, 12, low=-0.3, high=0.3)
        drawn[:, self._v] = low + (high - low) * share.clamp(0, 1)
        return drawn

    def _randomise_bodies(self):
        """Friction, masses, payload and armature: one draw per world, kept for the whole run."""
        N, fields = self.num_envs, self.physics.fields
        fields["geom_friction"][..., 0] = self._draw("friction", N, 1).to(fields["geom_friction"].dtype)
        mass = self._draw("mass", N, self.model.nbody)
        fields["body_mass"].copy_(self._nominal["body_mass"] * mass)
        fields["body_mass"][:, self.base] += self._draw("payload", N)
        fields["body_inertia"].copy_(self._nominal["body_inertia"] * mass[..., None])
        fields["dof_armature"].copy_(self._draw_joints("armature"))
        self.physics.set_const()

    def _randomise_motors(self, mask: torch.Tensor):
        """Strength, gains, latency and the joints' friction: drawn anew for every episode."""
        N, cfg, nominal = self.num_envs, self.cfg, self._nominal
        strength = self._draw("strength", N, 12)
        kp = strength * self._draw("gain", N, 12)
        kd = strength * self._draw("gain", N, 12)
        gain = nominal["actuator_gainprm"].repeat(N, 1, 1)
        bias = nominal["actuator_biasprm"].repeat(N, 1, 1)
        gain[..., 0] *= kp
        bias[..., 1] *= kp
        bias[..., 2] *= kd
        limits = nominal["actuator_forcerange"] * strength[..., None]
        drawn = {"actuator_gainprm": gain, "actuator_biasprm": bias, "actuator_forcerange": limits}
        drawn |= {f"dof_{name}": self._draw_joints(name) for name in ("damping", "frictionloss")}
        for name, value in drawn.items():
            field = self.physics.fields[name]
            field.copy_(torch.where(mask.view(N, *[1] * (field.dim() - 1)), value.to(field.dtype), field))
        low, high = cfg.latency_range
        extra = torch.randint(low, high + 1, (N,), generator=self.generator, device=self.device)
        self.latency = torch.where(mask, cfg.action_latency + extra, self.latency)

    def _push(self):
        pushed = self._uniform(self.num_envs, 1) < CONTROL_DT / self.cfg.push_interval
        kick = self._uniform(self.num_envs, 2, low=-self.cfg.push_velocity, high=self.cfg.push_velocity)
        self.physics.qvel[:, :2] += kick * pushed


gym.register("Go2-v0", vector_entry_point="common.envs.go2:Go2Env")
