"""Factory PegInsert of Isaac Lab with our senses, on doubles that have the habits found in its sources."""

import contextlib
import sys
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from isaac_doubles import FactoryDouble

from common.envs import isaac, peg_isaac
from common.envs.peg_insert import GRIP_DEPTH, TAXELS, PegInsertConfig, PegInsertEnv, build_model
from common.envs.peg_insert_eval import evaluate
from common.envs.peg_isaac import FINGERS, FactoryPegEnv, pad_grid
from common.panda import LOWER, UPPER

TASK = "Isaac-Factory-PegInsert-Direct-v0"


class FactoryEnv(FactoryDouble):
    """As direct/factory/factory_env.py: writes the widths of its observations into its configuration, then makes the
    scene and the spaces; success is found with the rewards, before the reset, and forgotten at the next step.
    """

    def __init__(self, cfg, render_mode=None):
        cfg.observation_space, cfg.state_space = 19, 43
        self.cfg = cfg
        super().__init__(cfg.scene.num_envs)
        self.cfg = cfg
        self.scene = SimpleNamespace(sensors={}, write_data_to_sim=lambda: None)
        self._setup_scene()
        self._configure_gym_env_spaces()
        self.single_action_space = gym.spaces.Box(-np.inf, np.inf, (6,))
        N = self.num_envs
        self.joint_pos = torch.tensor(UPPER).repeat(N, 1)
        self.joint_pos = torch.cat((self.joint_pos, torch.zeros(N, 2)), 1)
        self.joint_vel = torch.arange(9.0).repeat(N, 1)
        self.fingertip_midpoint_pos = torch.tensor((0.6, 0.0, 0.1)).repeat(N, 1)
        self.fingertip_midpoint_quat = torch.tensor(cfg.quaternion).repeat(N, 1)
        self.ep_succeeded = torch.zeros(N, dtype=torch.long)
        self.height = torch.tensor((0.0, 0.010, 0.024))[:N]  # m of the peg above the floor

    def _setup_scene(self):
        pass

    def _configure_gym_env_spaces(self):
        box = gym.spaces.Box
        self.single_observation_space = gym.spaces.Dict({"policy": box(-np.inf, np.inf, (self.cfg.observation_space,))})
        if self.cfg.state_space:
            self.single_observation_space["critic"] = box(-np.inf, np.inf, (self.cfg.state_space,))

    def _get_observations(self):
        return {"policy": self.clock[:, None].repeat(1, 19), "critic": torch.zeros(self.num_envs, 43)}

    def _get_curr_successes(self, success_threshold, check_rot=False):
        return self.height < 0.025 * success_threshold

    def _get_rewards(self):
        self.ep_succeeded[self._get_curr_successes(0.04)] = 1
        return self.clock.clone()

    def _simulate(self, action):
        env_ids = super()._simulate(action)
        self.reward_buf[:] = self._get_rewards()
        return env_ids


@pytest.fixture(params=[False, True], ids=["2.3", "3.0"])
def isaac_lab(request, monkeypatch):
    """Isaac Lab 2.3 or 3.0, with the task; gives what the sensors were made with."""
    version_3, made, launched = request.param, {}, []

    class Camera:
        def __init__(self, cfg):
            made["camera"] = cfg
            picture = torch.arange(3 * cfg.height * cfg.width * 4, dtype=torch.uint8).view(3, cfg.height, cfg.width, 4)
            self.data = SimpleNamespace(output={"rgb": picture})

    class Tactile:
        def __init__(self, cfg):
            made[cfg.prim_path.split("/")[-2]] = self
            self.cfg, self._device = cfg, "cpu"
            self._generate_tactile_points(list(cfg.tactile_array_size), cfg.tactile_margin, False)
            normal = torch.arange(TAXELS**2).float().repeat(3, 1)
            shear = torch.stack((torch.full_like(normal, 2.0), torch.full_like(normal, 3.0)), 2)
            self.data = SimpleNamespace(tactile_normal_force=normal, tactile_shear_force=shear)

    def module(name, **members):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(members)

    config = type("TiledCameraCfg", (SimpleNamespace,), {"OffsetCfg": SimpleNamespace})
    module("isaaclab")
    module("isaaclab.sensors", TiledCamera=Camera, TiledCameraCfg=config)
    module("isaaclab.sim", PinholeCameraCfg=SimpleNamespace)
    module("isaaclab_contrib")
    module("isaaclab_contrib.sensors")
    contrib = {"VisuoTactileSensor": Tactile, "VisuoTactileSensorCfg": SimpleNamespace}
    module("isaaclab_contrib.sensors.tacsl_sensor", **contrib)
    module("isaaclab_assets")
    module("isaaclab_assets.sensors", GELSIGHT_R15_CFG="gel")

    @contextlib.contextmanager
    def launch(cfg, args):
        launched.append(args.enable_cameras)
        yield

    def add_args(parser):
        parser.add_argument("--enable_cameras", action="store_true")

    quaternion = (0.0, -1.0, 0.0, 0.5)  # w x y z
    quaternion = quaternion if not version_3 else (-1.0, 0.0, 0.5, 0.0)
    cfg = SimpleNamespace(sim=SimpleNamespace(device=""), scene=SimpleNamespace(num_envs=0), seed=0)
    cfg.is_finite_horizon, cfg.quaternion, cfg.rerender_on_reset = False, quaternion, False
    monkeypatch.setattr(isaac, "_launcher", lambda env_id: (launch, add_args))
    monkeypatch.setattr(isaac, "_isaac_config", lambda *args, **kwargs: cfg)
    monkeypatch.setattr(isaac, "is_version_3", lambda: version_3)
    gym.register(TASK, f"{__name__}:FactoryEnv", disable_env_checker=True, order_enforce=False)
    yield SimpleNamespace(made=made, launched=launched, cfg=cfg, version_3=version_3)
    del gym.registry[TASK]


def make(**config):
    return FactoryPegEnv(3, "cpu", 1, PegInsertConfig(**config), TASK)


def test_the_state_is_factorys_own_and_the_critic_sees_no_more(isaac_lab):
    env = make(observation="state")
    assert env.single_observation_space.shape == (19,) and env.single_action_space.shape == (6,)
    obs, _ = env.reset(seed=1)
    assert obs.shape == (3, 19)
    assert isaac_lab.launched == [False] and not isaac_lab.made


def test_spaces_and_observations_are_those_of_the_twin(isaac_lab):
    cfg = PegInsertConfig(observation="multimodal", image_size=8)
    twin = PegInsertEnv(1, cfg=PegInsertConfig(observation="multimodal", modalities=("tactile", "proprio")))
    env = make(observation="multimodal", image_size=8)
    for name, space in twin.single_observation_space.items():
        assert env.single_observation_space[name] == space
    assert isaac_lab.launched == [True] and isaac_lab.cfg.rerender_on_reset is True
    obs, _ = env.reset(seed=1)
    assert {k: v.shape for k, v in obs.items()} == {"rgb": (3, 8, 8, 3), "tactile": (3, 6, 32, 32), "proprio": (3, 21)}
    assert obs["rgb"].dtype == torch.uint8
    pictures = env.flat.sim.camera.data.output["rgb"]
    assert torch.equal(obs["rgb"], pictures[..., :3])
    assert all(batch.shape[1:] == env.single_observation_space[name].shape for name, batch in obs.items())
    assert env.single_observation_space["rgb"].shape == (cfg.image_size, cfg.image_size, 3)


def test_proprioception_has_the_twins_units_and_order(isaac_lab):
    env = make(observation="multimodal", modalities=("proprio",))
    proprio = env.reset(seed=1)[0]["proprio"]
    assert torch.allclose(proprio[:, :7], torch.ones(3, 7)), "at their upper limits"
    assert torch.equal(proprio[0, 7:14], torch.arange(7.0))
    assert torch.allclose(proprio[0, 14:17], torch.tensor((0.6, 0.0, 0.1)))
    assert proprio[0, 17:].tolist() == [0.0, 1.0, 0.0, -0.5]  # w x y z with x > 0, in either version
    env.flat.sim.joint_pos[:, :7] = torch.tensor(LOWER)
    assert torch.allclose(env.step(torch.zeros(3, 6))[0]["proprio"][:, :7], -torch.ones(3, 7))


def test_shears_are_along_the_hands_axes_on_both_pads(isaac_lab):
    tactile = make(observation="multimodal", modalities=("tactile",)).reset(seed=1)[0]["tactile"][0]
    assert torch.equal(tactile[0].flatten(), torch.arange(TAXELS**2).float())
    # The sensor's second shear is along the finger's -z; the right finger's x is against the hand's.
    assert [part.unique().tolist() for part in (tactile[1], tactile[2], tactile[4], tactile[5])] == [
        [2],
        [-3],
        [-2],
        [-3],
    ]


def test_taxels_lie_where_the_twins_pads_do(isaac_lab):
    make(observation="multimodal", modalities=("tactile",))
    model = build_model(PegInsertConfig())
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    hand, tip = data.body("hand"), data.site("fingertip")
    rotation = hand.xmat.reshape(3, 3)
    twin = PegInsertEnv(1, physics_threads=1)._taxels.numpy()  # along the hand's x and z from the fingertip
    for name, finger in zip(("left_finger", "right_finger"), FINGERS, strict=True):
        body, sensor = data.body(name), isaac_lab.made[finger]
        points = sensor._tactile_pos_local.numpy() @ body.xmat.reshape(3, 3).T + body.xpos
        local = ((points - tip.xpos) @ rotation).reshape(TAXELS, TAXELS, 3)
        np.testing.assert_allclose(local[0, :, 0], twin[0], atol=1e-6)
        np.testing.assert_allclose(local[:, 0, 2], twin[1], atol=1e-6)
        # The frame's z axis points into the finger: away from the peg, as the force of the peg on it does.
        quaternion = sensor._tactile_quat_local[0]
        quaternion = (quaternion.roll(1) if isaac_lab.version_3 else quaternion).double().numpy()
        normal, x_axis = np.zeros(3), np.zeros(3)
        mujoco.mju_rotVecQuat(normal, np.array((0.0, 0.0, 1.0)), quaternion)
        mujoco.mju_rotVecQuat(x_axis, np.array((1.0, 0.0, 0.0)), quaternion)
        np.testing.assert_allclose((normal, x_axis), ((0, 1, 0), (1, 0, 0)), atol=1e-6)
    assert np.ptp(pad_grid()[0][:, 2].numpy()) < GRIP_DEPTH


@pytest.mark.parametrize("camera", ["wrist", "side"])
def test_the_camera_hangs_where_the_twins_does(isaac_lab, camera):
    make(observation="multimodal", modalities=("rgb",), camera=camera, image_size=16)
    cfg, twin = isaac_lab.made["camera"], build_model(PegInsertConfig(), visual=True).camera(camera)
    assert ("panda_hand" in cfg.prim_path) == (camera == "wrist")
    assert np.allclose(cfg.offset.pos, twin.pos) and cfg.offset.convention == "opengl"
    quaternion = np.roll(cfg.offset.rot, 1) if isaac_lab.version_3 else cfg.offset.rot
    assert np.allclose(quaternion, twin.quat)
    fovy = 2 * np.degrees(np.arctan(cfg.spawn.horizontal_aperture / (2 * cfg.spawn.focal_length)))
    assert np.isclose(fovy, twin.fovy[0])


def test_a_time_limit_truncates_and_success_is_that_of_the_episode_that_ended(isaac_lab):
    env = make(observation="multimodal", modalities=("proprio",))
    env.reset(seed=1)
    for step in range(1, 6):
        obs, reward, terminated, truncated, info = env.step(torch.full((3, 6), 2.0))
        assert not terminated.any() and truncated.tolist() == [step == 5] * 3
        assert reward.tolist() == [step] * 3
    assert env.flat.sim.received.max() == 1  # actions are clipped, which Factory does not
    assert set(info["final_obs"]) == {"proprio"} and info["_episode"].all()
    episode = {name: info["episode"][name].tolist() for name in ("success", "success_once", "engaged", "l")}
    assert episode == {"success": [1, 0, 0], "success_once": [1, 0, 0], "engaged": [1, 1, 0], "l": [5, 5, 5]}
    result = evaluate(lambda obs: torch.zeros(3, 6), env.cfg, "cpu", 6, envs=env)
    assert result["episodes"] == 6 and np.isclose(result["success_rate"], 1 / 3)
    assert np.isclose(result["engaged_rate"], 2 / 3)


def test_without_isaac_lab_one_sentence_says_what_to_install():
    with pytest.raises(ValueError, match="Isaac Lab cannot be imported"):
        make()
    assert peg_isaac.is_factory("IsaacContrib-Factory-PegInsert-Direct") and not peg_isaac.is_factory("PegInsert-v0")
