"""Isaac Lab's Factory PegInsert with a camera and touch, behind the interface of `PegInsertEnv`.

Written against the sources of Isaac Lab 2.3 and 3.0 (isaaclab_tasks/direct/factory, isaaclab_contrib/sensors/
tacsl_sensor) and tested with doubles of them: it has not run on Isaac Lab itself, which needs Isaac Sim and an RTX GPU.
"""

import importlib
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from common.envs import isaac
from common.envs.peg_insert import (
    ENGAGED,
    FINGERTIP,
    GRIP_DEPTH,
    HOLE_DEPTH,
    SEATED,
    TAXELS,
    PegInsertConfig,
    build_model,
)
from common.panda import LOWER, UPPER

FINGERS = ("panda_leftfinger", "panda_rightfinger")
FINGER_HEIGHT = 0.0584  # m from the hand's frame to a finger's (franka_description)
# Where the cameras of common/assets hang in Factory's scene. Each environment's origin is the robot's base.
PRIMS = {"wrist": "/World/envs/env_.*/Robot/panda_hand/camera", "side": "/World/envs/env_.*/camera"}
APERTURE = 20.955  # mm, of Isaac Lab's pinhole camera
# N/m of penetration: a peg pressed by 26 N into pads that yield by half a millimetre, over about 500 of 1024 taxels.
STIFFNESS = 100.0
WIDTHS = {"tactile": 6 * TAXELS * TAXELS, "proprio": 21}


def is_factory(env_id: str) -> bool:
    return "Factory-PegInsert" in env_id


class FactoryPegEnv(VectorEnv):
    """`PegInsertEnv`'s spaces and `info["episode"]` on Isaac Lab's task `env_id`, at Factory's full difficulty.

    The simulator can neither be resumed exactly nor be made twice in a process: evaluation takes place in the
    environments of training. Raises ValueError with one sentence where Isaac Lab is missing.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_fps": 15}
    exact_resume = False
    metric_names = ("success", "success_once", "engaged")

    def __init__(self, num_envs: int, device, seed: int, cfg: PegInsertConfig, env_id: str, video_dir: str = ""):
        self.cfg = cfg
        pictures = cfg.observation == "multimodal" and "rgb" in cfg.modalities
        self.flat = isaac.make_env(
            env_id,
            num_envs,
            device,
            seed,
            physics="",
            clip_actions=1.0,
            launcher_args=("--enable_cameras",) if pictures else (),
            video_dir=video_dir,
            customise=lambda task_cfg: with_senses(env_id, task_cfg, cfg),
        )
        self.num_envs, self.device = self.flat.num_envs, self.flat.device
        self.single_action_space, self.action_space = self.flat.single_action_space, self.flat.action_space
        box = gym.spaces.Box
        spaces = {
            "rgb": box(0, 255, (cfg.image_size, cfg.image_size, 3), np.uint8),
            "tactile": box(-math.inf, math.inf, (6, TAXELS, TAXELS)),
            "proprio": box(-math.inf, math.inf, (21,)),
        }
        self.single_observation_space = self.flat.single_observation_space
        if cfg.observation == "multimodal":
            self.single_observation_space = gym.spaces.Dict({name: spaces[name] for name in cfg.modalities})
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    @property
    def nan_resets(self) -> torch.Tensor:
        return self.flat.nan_resets

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Starts all episodes at once: Factory's reset moves every robot of the scene, so their ages never spread."""
        obs, info = self.flat.reset(seed=seed, options=options)
        return self._split(obs), info

    def step(self, actions: torch.Tensor):
        obs, reward, terminated, truncated, info = self.flat.step(actions)
        info["final_obs"] = self._split(info["final_obs"])
        # Tensors of the task's last rewards, which it computes before it resets.
        task = self.flat.sim
        info["episode"] |= {"success": task.seated.float(), "success_once": task.seated_once.float()}
        info["episode"]["engaged"] = task.engaged.float()
        return self._split(obs), reward, terminated, truncated, info

    def _split(self, flat: torch.Tensor):
        """The modalities of `Senses._get_observations`, (num_envs, all of them)."""
        if self.cfg.observation == "state":
            return flat
        parts = flat.split([_width(name, self.cfg) for name in self.cfg.modalities], 1)
        obs = {}
        for name, part in zip(self.cfg.modalities, parts, strict=True):
            part = part.view(-1, *self.single_observation_space[name].shape)
            obs[name] = part.byte() if name == "rgb" else part
        return obs

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict):
        pass

    def close_extras(self, **kwargs):
        self.flat.close()


def _width(modality: str, cfg: PegInsertConfig) -> int:
    return cfg.image_size**2 * 3 if modality == "rgb" else WIDTHS[modality]


def with_senses(env_id: str, task_cfg, cfg: PegInsertConfig) -> gym.envs.registration.EnvSpec:
    """The task's entry in Gymnasium's registry, with a class that has the senses of `cfg`; completes `task_cfg`."""
    spec = gym.spec(env_id)
    base = gym.envs.registration.load_env_creator(spec.entry_point)
    for name in ("rerender_on_reset", "num_rerenders_on_reset"):  # 2.3's and 3.x's: the first picture of an episode
        if hasattr(task_cfg, name):
            setattr(task_cfg, name, type(getattr(task_cfg, name))(1))
    return replace(spec, entry_point=type("SensingFactoryEnv", (Senses, base), {"peg_cfg": cfg}))


class Senses:
    """What FactoryEnv becomes by inheriting from this first: `peg_cfg` says which senses it has.

    Its observation is one vector, so that whatever common/envs/isaac.py does with observations holds for it: Factory's
    own 19 numbers, or the modalities one after the other, pictures as numbers from 0 to 255.
    """

    peg_cfg: PegInsertConfig

    def _sensed(self, modality: str) -> bool:
        return self.peg_cfg.observation == "multimodal" and modality in self.peg_cfg.modalities

    def _setup_scene(self):
        super()._setup_scene()
        if self._sensed("rgb"):
            self.camera = _camera(self.peg_cfg)
            self.scene.sensors["camera"] = self.camera
        if self._sensed("tactile"):
            self.pads = [_pad(finger) for finger in FINGERS]
            self.scene.sensors |= dict(zip(FINGERS, self.pads, strict=True))

    def _configure_gym_env_spaces(self):
        # FactoryEnv has just written the widths of its own observations there.
        if self.peg_cfg.observation == "multimodal":
            self.cfg.observation_space = sum(_width(name, self.peg_cfg) for name in self.peg_cfg.modalities)
        self.cfg.state_space = 0  # actor and critic see the same
        super()._configure_gym_env_spaces()

    def _get_observations(self):
        if self.peg_cfg.observation == "state":
            return {"policy": super()._get_observations()["policy"]}
        senses = {"rgb": self._rgb, "tactile": self._tactile, "proprio": self._proprio}
        return {"policy": torch.cat([senses[name]().flatten(1).float() for name in self.peg_cfg.modalities], 1)}

    def _get_rewards(self):
        rewards = super()._get_rewards()
        self.seated = self._get_curr_successes(SEATED / HOLE_DEPTH)
        self.engaged = self._get_curr_successes(ENGAGED / HOLE_DEPTH)
        # The task forgets at the next step that an episode began, not at its end.
        self.seated_once = self.ep_succeeded.bool()
        return rewards

    def _rgb(self):  # (N, H, W, 3)
        return torch.as_tensor(self.camera.data.output["rgb"])[..., :3]

    def _tactile(self):
        """(N, 6, TAXELS, TAXELS), N: for each pad its normal force and its shears along the hand's x and z."""
        channels = []
        for pad, side in zip(self.pads, (1.0, -1.0), strict=True):  # the right finger is the left one turned about z
            shear_x, shear_z = pad.data.tactile_shear_force.unbind(2)  # along the frame that `pad_grid` gives
            channels += [pad.data.tactile_normal_force, side * shear_x, -shear_z]
        return torch.stack(channels, 1).view(-1, 6, TAXELS, TAXELS)

    def _proprio(self):  # (N, 21), as PegInsertEnv.proprioception
        q, lower, upper = self.joint_pos[:, :7], *(torch.tensor(x, device=self.device) for x in (LOWER, UPPER))
        if self.peg_cfg.normalize_joint_angles:
            q = 2 * (q - lower) / (upper - lower) - 1
        quaternion = self.fingertip_midpoint_quat
        if isaac.is_version_3():  # x y z w
            quaternion = quaternion.roll(1, 1)
        quaternion = quaternion * torch.where(quaternion[:, 1:2] < 0, -1.0, 1.0)  # w x y z with x > 0
        return torch.cat((q, self.joint_vel[:, :7], self.fingertip_midpoint_pos, quaternion), 1)


def _camera(cfg: PegInsertConfig):
    """Isaac Lab's batched camera, where the one of common/assets is and with its field of view."""
    sensors, sim = (importlib.import_module(f"isaaclab.{name}") for name in ("sensors", "sim"))
    model = build_model(PegInsertConfig(), visual=True)
    camera = model.camera(cfg.camera)
    quaternion = camera.quat if not isaac.is_version_3() else np.roll(camera.quat, -1)
    focal_length = APERTURE / (2 * math.tan(math.radians(float(camera.fovy[0])) / 2))
    config = sensors.TiledCameraCfg
    return sensors.TiledCamera(
        config(
            prim_path=PRIMS[cfg.camera],
            update_period=0.0,
            height=cfg.image_size,
            width=cfg.image_size,
            data_types=["rgb"],
            spawn=sim.PinholeCameraCfg(focal_length=focal_length, horizontal_aperture=APERTURE),
            # As MuJoCo's: looking along -z, with y up.
            offset=config.OffsetCfg(pos=tuple(camera.pos), rot=tuple(quaternion), convention="opengl"),
        )
    )


def pad_grid() -> tuple[torch.Tensor, torch.Tensor]:
    """Taxels (TAXELS^2, 3) in m in a finger's frame, rows along its z and columns along its x, as a twin's pad has
    them, and the quaternion w x y z of their frame: z into the finger, x along its x.
    """
    centres = (torch.arange(TAXELS) + 0.5) / TAXELS * GRIP_DEPTH
    z, x = torch.meshgrid(centres - GRIP_DEPTH + FINGERTIP - FINGER_HEIGHT, centres - GRIP_DEPTH / 2, indexing="ij")
    half = 0.5**0.5
    return torch.stack((x, torch.zeros_like(x), z), 2).view(-1, 3), torch.tensor((half, -half, 0.0, 0.0))


def _pad(finger: str):
    """TacSL's force field (Akinola et al. 2024, arXiv 2408.06506) on a finger of Factory's robot, which has no gel:
    the points that the sensor would look for on a gel's mesh are those of `pad_grid`.
    """
    module = importlib.import_module("isaaclab_contrib.sensors.tacsl_sensor")

    class Pad(module.VisuoTactileSensor):
        def _generate_tactile_points(self, num_divs, margin, visualize):
            points, quaternion = pad_grid()
            if isaac.is_version_3():
                quaternion = quaternion.roll(-1)
            if finger == FINGERS[1]:  # its columns too run along the hand's x
                points = points * torch.tensor((-1.0, 1.0, 1.0))
            self._tactile_pos_local = points.to(self._device)
            self._tactile_quat_local = quaternion.repeat(len(points), 1).to(self._device)
            self.num_tactile_points = len(points)

    rendering = importlib.import_module("isaaclab_assets.sensors").GELSIGHT_R15_CFG  # required, though none is drawn
    return Pad(
        module.VisuoTactileSensorCfg(
            prim_path=f"/World/envs/env_.*/Robot/{finger}/tactile_sensor",
            render_cfg=rendering,
            enable_camera_tactile=False,
            enable_force_field=True,
            tactile_array_size=(TAXELS, TAXELS),
            tactile_margin=0.0,
            contact_object_prim_path_expr="/World/envs/env_.*/HeldAsset",
            normal_contact_stiffness=STIFFNESS,
        )
    )
