"""Every rule of the Go2 environment, on the `mujoco` backend. The same rules on `warp` are in test_physics.py."""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import menagerie_like
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from common.envs import go2
from common.envs.go2 import DEFAULT_POSE, NATURAL, REFERENCE, Go2Env
from common.envs.go2_config import CONTROL_DT, JOINTS, TORQUE_LIMITS

POSE = torch.tensor(DEFAULT_POSE)
DT = 0.02


@pytest.fixture(autouse=True)
def log_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo leaves a MUJOCO_LOG.TXT behind when a state is not finite


def make(num_envs=2, seed=1, **config) -> Go2Env:
    env = Go2Env(num_envs, seed=seed, **({"physics_threads": 1} | config))
    env.reset()
    return env


def freeze(env):
    """Physics that stands still, for rules that have nothing to do with it."""
    env.physics.step = lambda nsubsteps: None
    return env


def put(env, index=0, rpy=(0, 0, 0), height=0.3, velocity=(0, 0, 0), spin=(0, 0, 0), joints=0.0, speeds=0.0):
    """Sets a state by hand: angles in degrees, velocity in the world, spin in the body, joints off the default pose."""
    quat = np.zeros(4)
    mujoco.mju_euler2Quat(quat, np.radians(rpy), "XYZ")  # fixed axes: roll first
    env.physics.qpos[index, 2] = height
    env.physics.qpos[index, 3:7] = torch.from_numpy(quat)
    env.physics.qpos[index, 7:] = POSE + torch.as_tensor(joints)
    env.physics.qvel[index, :3] = torch.tensor(velocity, dtype=torch.float64)
    env.physics.qvel[index, 3:6] = torch.tensor(spin, dtype=torch.float64)
    env.physics.qvel[index, 6:] = torch.as_tensor(speeds, dtype=torch.float64)
    env._read_state()
    return quat


def in_body(quat, vector) -> torch.Tensor:
    """A vector of the world in the axes of the body, by MuJoCo's own rotation."""
    inverse, out = np.zeros(4), np.zeros(3)
    mujoco.mju_negQuat(inverse, quat)
    mujoco.mju_rotVecQuat(out, np.array(vector, dtype=float), inverse)
    return torch.from_numpy(out).float()


def sense(env, feet=None, contact=(1, 1, 1, 1), torque=0.0):
    """Sensor readings by hand. `feet` (4, 3) are positions in the order FR FL RR RL."""
    readings = torch.zeros(env.num_envs, 16)
    if feet is not None:
        readings[:, :12] = torch.as_tensor(feet, dtype=torch.float32).flatten()
    readings[:, 12:] = torch.tensor(contact, dtype=torch.float32)
    env.physics.sensordata = readings
    env.physics.actuator_force = torch.zeros(env.num_envs, 12) + torch.as_tensor(torque)


def actions(steps, num_envs, scale=0.5, seed=0):
    return scale * torch.randn(steps, num_envs, 12, generator=torch.Generator().manual_seed(seed))


def rollout(env, actions):
    """Everything that `step` returned, flattened: one tuple of tensors per step."""
    return [flat(env.step(a)) for a in actions]


def flat(returned) -> tuple:
    *tensors, info = returned
    return (*tensors, *(v for k, v in sorted(info.items()) if k != "episode"), *info["episode"].values())


def same(a, b) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


# --- symmetry


@pytest.mark.parametrize(
    "config",
    [{}, {"commands": "full"}, {"observation": "proprioceptive", "history": 3}],
    ids=["default", "full", "proprioceptive"],
)
def test_mirrored_robot_moves_as_the_mirror_image(config):
    """Two robots in mirrored states that get mirrored actions stay mirrored, and earn the same."""
    exact = {"solver": "newton", "solver_iterations": 50}  # a few PGS iterations depend on the order of the contacts
    env = make(2, jump_interval=math.inf, **exact, **config)
    joints = torch.linspace(-0.2, 0.3, 12)
    put(env, 0, (3, -4, 0), 0.32, (0.4, -0.3, 0.1), (0.3, -0.6, 0.9), joints)
    put(env, 1, (-3, -4, 0), 0.32, (0.4, 0.3, 0.1), (-0.3, -0.6, -0.9), env.mirror_actions(joints))
    env.command[0] = torch.tensor([0.7, -0.3, 0.5, 0.3, 0.0])[: env.command.shape[1]]
    env.command[1] = env.command[0] * torch.tensor([1, -1, -1, 1, 1])[: env.command.shape[1]]
    obs = env._observe(torch.ones(2, dtype=torch.bool))
    for action in actions(15, 1, 0.3):
        torch.testing.assert_close(env.mirror_obs(obs[:1]), obs[1:], atol=1e-3, rtol=0)
        assert not torch.allclose(obs[:1], obs[1:], atol=0.05)
        obs, reward, terminated, truncated, _ = env.step(torch.cat((action, env.mirror_actions(action))))
        assert not (terminated | truncated).any()
        torch.testing.assert_close(reward[0], reward[1], atol=1e-4, rtol=0)


def test_mirror_twice_is_the_original():
    env = make(2, commands="full", history=2)
    obs, action = torch.randn(5, 2, 100), torch.randn(5, 2, 12)
    assert torch.equal(env.mirror_obs(env.mirror_obs(obs)), obs)
    assert torch.equal(env.mirror_actions(env.mirror_actions(action)), action)


# --- observation


def test_observation_layout():
    """The 48 numbers and their scales, as legged_gym has them, from a state set by hand."""
    env = make(1)
    joints, speeds = torch.linspace(-0.2, 0.3, 12), torch.linspace(-4, 5, 12)
    quat = put(env, 0, (5, -7, 130), 0.3, (0.4, -0.8, 0.2), (0.3, -0.6, 0.9), joints, speeds)
    env.command = torch.tensor([[0.7, -0.3, 0.5]])
    env.action = torch.linspace(-1, 1, 12)[None]
    parts = (
        2.0 * in_body(quat, (0.4, -0.8, 0.2)),
        0.25 * torch.tensor([0.3, -0.6, 0.9]),
        in_body(quat, (0, 0, -1)),
        torch.tensor([2 * 0.7, 2 * -0.3, 0.25 * 0.5]),
        joints,
        0.05 * speeds,
        env.action[0],
    )
    obs = env._observe(torch.zeros(1, dtype=torch.bool))
    assert obs.shape == (1, 48) and obs.dtype == torch.float32
    torch.testing.assert_close(obs[0], torch.cat(parts), atol=1e-6, rtol=0)


def test_observation_variants():
    nobody = torch.zeros(2, dtype=torch.bool)
    plain, blind, full = make(), make(observation="proprioceptive"), make(commands="full")
    assert [e.single_observation_space.shape for e in (plain, blind, full)] == [(48,), (45,), (50,)]
    assert torch.equal(blind._observe(nobody), plain._observe(nobody)[:, 3:])
    full.command = torch.tensor([[0.5, 0.1, 0.2, 0.35, 0.6]]).repeat(2, 1)
    obs = full._observe(nobody)
    torch.testing.assert_close(obs[:, 9:14], torch.tensor([[1.0, 0.2, 0.05, 0.7, 1.2]]).repeat(2, 1))
    full.command = plain.command = torch.zeros(2, 3)
    full.command = torch.zeros(2, 5)
    for env in (plain, full):
        put(env, 0), put(env, 1)
    a, b = plain._observe(nobody), full._observe(nobody)
    assert torch.equal(a[:, :9], b[:, :9]) and torch.equal(a[:, 12:], b[:, 14:])


def test_history():
    """Three stacked observations, newest last; filled with the first one where an episode begins."""
    config = {"episode_seconds": 0.14, "resample_seconds": 0.06}
    one, three = make(3, **config), make(3, history=3, **config)
    assert three.single_observation_space.shape == (144,)
    frame, stacked = one.reset(seed=5)[0], three.reset(seed=5)[0]
    assert torch.equal(stacked, frame.repeat(1, 3))
    frames = [frame, frame, frame]
    for action in actions(20, 3):
        obs, _, terminated, truncated, info = one.step(action)
        stacked, _, _, _, info3 = three.step(action)
        done = (terminated | truncated)[:, None]
        assert torch.equal(info3["final_obs"], torch.cat((*frames[-2:], info["final_obs"]), 1))
        # The newest frame shows a new command at once; the older ones stay as they were seen.
        frames = [torch.where(done, obs, f) for f in frames[-2:]] + [obs]
        assert torch.equal(stacked, torch.cat(frames, 1))


def test_observation_noise():
    """Uniform, of the documented half widths, on what a robot measures; none on command and action."""
    env, quiet = make(64, randomise=True), make(64, randomise=True, observation_noise=0.0)
    nobody = torch.zeros(64, dtype=torch.bool)
    env.cfg.randomise = False
    clean = env._observe(nobody)
    env.cfg.randomise = True
    noise = torch.stack([env._observe(nobody) - clean for _ in range(50)])
    bound = torch.cat(
        [
            torch.tensor([0.2] * 3 + [0.05] * 3 + [0.05] * 3 + [0.0] * 3),  # 2 * .1, .25 * .2, .05, no noise
            torch.tensor([0.01] * 12 + [0.075] * 12 + [0.0] * 12),  # .01, .05 * 1.5, no noise
        ]
    )
    assert (noise.abs().amax((0, 1)) <= bound + 1e-6).all()
    assert (noise.amax((0, 1)) >= 0.95 * bound).all() and (noise.amin((0, 1)) <= -0.95 * bound).all()
    assert (noise.mean((0, 1)).abs() <= 0.06 * bound + 1e-6).all()
    assert torch.equal(quiet._observe(nobody), quiet._observe(nobody))


# --- rewards


def term(env, name, last_action=None) -> torch.Tensor:
    """The weighted term as it stands in the reward, (num_envs,), with its dt taken out."""
    last_action = env.action if last_action is None else last_action
    _, totals = env._rewards(last_action)
    return totals[3 + list(env.weights).index(name)] / DT


def test_reference_weights():
    """To the letter those of the reference, and nothing else."""
    assert REFERENCE == {
        "lin_vel": 1.0,
        "ang_vel": 0.2,
        "lin_vel_z": -1.0,
        "base_height": -50.0,
        "action_rate": -0.005,
        "pose": -0.1,
    }
    assert make(rewards="reference").weights == REFERENCE and make(rewards="natural").weights == NATURAL
    assert set(REFERENCE) < set(NATURAL)


def test_reference_reward():
    """Each of the six terms, and their sum times dt, which may be negative."""
    env = make(2, rewards="reference")
    joints = torch.linspace(-0.2, 0.3, 12)
    quat = put(env, 0, (5, -7, 130), 0.27, (0.4, -0.8, 0.2), (0.3, -0.6, 0.9), joints)
    put(env, 1)
    env.command = torch.tensor([[0.7, -0.3, 0.5], [0.0, 0.0, 0.0]])
    env.action, last = torch.linspace(-1, 1, 12).repeat(2, 1), torch.full((2, 12), 0.25)
    velocity = in_body(quat, (0.4, -0.8, 0.2))
    rate = -0.005 * (torch.linspace(-1, 1, 12) - 0.25).square().sum()
    moving = {
        "lin_vel": math.exp(-((0.7 - velocity[0]) ** 2 + (-0.3 - velocity[1]) ** 2) / 0.25),
        "ang_vel": 0.2 * math.exp(-((0.5 - 0.9) ** 2) / 0.25),
        "lin_vel_z": -(float(velocity[2]) ** 2),
        "base_height": -50 * (0.27 - 0.3) ** 2,
        "action_rate": rate,
        "pose": -0.1 * joints.abs().sum(),
    }
    still = {"lin_vel": 1.0, "ang_vel": 0.2, "lin_vel_z": 0, "base_height": 0, "action_rate": rate, "pose": 0}
    for name in moving:
        expected = torch.tensor([float(moving[name]), float(still[name])])
        torch.testing.assert_close(term(env, name, last), expected, atol=1e-6, rtol=1e-5, msg=name)
    reward, totals = env._rewards(last)
    expected = torch.tensor([float(sum(terms.values())) * DT for terms in (moving, still)])
    torch.testing.assert_close(reward, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(totals[0], reward)
    errors = torch.tensor([math.hypot(0.7 - velocity[0], -0.3 - velocity[1]), 0.0])
    torch.testing.assert_close(totals[1], errors, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(totals[2], torch.tensor([0.4, 0.0]), atol=1e-6, rtol=1e-5)
    put(env, 0, height=0.6, velocity=(3, 0, 0))
    assert env._rewards(last)[0][0] < -0.05


def test_base_height_target():
    env = make(1, rewards="reference", base_height_target=0.25)
    put(env, height=0.3)
    assert term(env, "base_height").item() == pytest.approx(-50 * 0.05**2, rel=1e-4)


# Each of the terms that `natural` adds: keyword arguments of `put` and `sense`, the command, and the value.
FAST, STILL = (0.5, 0.0, 0.0), (0.0, 0.05, 0.0)
LOW = [[0.02, 0.0, 0.04]] * 4  # 2 cm further in x than before, 4 cm high: 1 m/s for a step of .02 s
SINK = [[0.0, 0.0, 0.04]] * 4
CASES = (
    ("ang_vel_xy", {"spin": (0.3, -0.4, 2.0)}, {}, FAST, 0.25),
    ("clearance", {}, {"feet": LOW, "contact": (0, 0, 1, 1)}, FAST, 2 * (0.04 - go2.SWING_HEIGHT) ** 2),
    ("clearance", {}, {"feet": SINK, "contact": (0, 0, 0, 0)}, FAST, 0),  # a foot on its way down is not too low
    ("slip", {}, {"feet": LOW, "contact": (0, 1, 1, 2)}, FAST, 3 * 1.0**2),
    ("slip", {}, {"feet": SINK}, FAST, 0),
    ("trot", {}, {"contact": (1, 0, 0, 1)}, FAST, 1),
    ("trot", {}, {"contact": (0, 1, 1, 0)}, FAST, 1),
    ("trot", {}, {"contact": (1, 1, 0, 0)}, FAST, 0),
    ("trot", {}, {"contact": (1, 0, 1, 0)}, FAST, 0),
    ("trot", {}, {"contact": (1, 1, 1, 1)}, FAST, 0),
    ("trot", {}, {"contact": (0, 0, 0, 0)}, FAST, 0),
    ("trot", {}, {"contact": (1, 0, 0, 1)}, STILL, 0),
    ("trot", {}, {"contact": (1, 0, 0, 1)}, (0, 0, 0.3), 1),  # turning is moving
    ("stand", {"joints": 0.1}, {"contact": (1, 0, 1, 1)}, STILL, 12 * 0.1 + 1),
    ("stand", {"joints": 0.1}, {"contact": (1, 0, 1, 1)}, FAST, 0),
    ("power", {"speeds": -2.0}, {"torque": 5.0}, FAST, 12 * 10.0),
)


@pytest.mark.parametrize(("name", "state", "sensors", "command", "value"), CASES)
def test_natural_term(name, state, sensors, command, value):
    env = make(1, reward_weights=(f"{name}=3",))
    env.episode_length += 2
    put(env, **state)
    sense(env, **sensors)
    env.command = torch.tensor([command])
    assert term(env, name).item() == pytest.approx(3 * value, rel=1e-4, abs=1e-6)


def test_air_time():
    """Paid when a foot comes down, for what it flew beyond .2 s and at most .1 s; a foot that stood earns nothing."""
    env = make(1, reward_weights=("air_time=3",))
    put(env)
    sense(env, contact=(1, 1, 1, 1))
    env.command = torch.tensor([FAST])
    flown = torch.tensor([[0.1, 0.25, 0.5, 0.0]])
    env.air_time = flown.clone()
    assert term(env, "air_time").item() == pytest.approx(3 * (-0.1 + 0.05 + 0.1), abs=1e-5)
    assert not env.air_time.any()
    env.air_time, env.command = flown.clone(), torch.tensor([STILL])
    assert term(env, "air_time").item() == 0
    env.air_time, env.command = flown.clone(), torch.tensor([FAST])
    sense(env, contact=(1, 0, 0, 0))
    assert term(env, "air_time").item() == pytest.approx(3 * -0.1, abs=1e-5)
    torch.testing.assert_close(env.air_time, torch.tensor([[0.0, 0.27, 0.52, 0.02]]))


def test_feet_have_no_speed_in_the_first_step():
    """The place of a foot before a reset, or at the origin, is no place it came from."""
    for options in (None, {"random_phase": True}):
        env = make(8, reward_weights=("slip=-1", "clearance=-1"))
        env.reset(seed=2, options=options)
        env.step(torch.zeros(8, 12))
        for name in ("slip", "clearance"):
            assert env.totals[3 + list(env.weights).index(name)].abs().max() == 0, (options, name)


def test_feet_are_remembered():
    """Their speed is that since the last step, not since the first."""
    env = make(1, reward_weights=("slip=1",))
    env.episode_length += 2
    put(env)
    for place, speed in ((0.0, 0.0), (0.01, 0.5), (0.03, 1.0), (0.03, 0.0)):
        sense(env, feet=[[0, place, 0.02]] * 4)
        assert term(env, "slip").item() == pytest.approx(4 * speed**2, abs=1e-4)


def test_natural_reward():
    """The weighted sum of all terms, but never below zero."""
    env = make(2, rewards="natural")
    env.episode_length += 2
    put(env, 0, height=0.29, velocity=(0.4, 0, 0.1), spin=(0.2, 0.1, 0), joints=0.05, speeds=1.0)
    put(env, 1, height=0.8)
    env.foot_pos = torch.tensor([[0.0, 0.0, 0.04]]).repeat(2, 4, 1)
    sense(env, feet=[[0.01, 0, 0.05]] * 4, contact=(1, 0, 0, 1), torque=3.0)
    env.command = torch.tensor([[0.5, 0.0, 0.0]]).repeat(2, 1)
    memory = env.foot_pos, env.air_time
    terms = {}
    for name, weight in env.weights.items():
        env.foot_pos, env.air_time = memory
        assert weight == NATURAL[name]
        terms[name] = term(env, name)
    env.foot_pos, env.air_time = memory
    reward, totals = env._rewards(env.action)
    total = torch.stack(list(terms.values())).sum(0) * DT
    assert total[0] > 0 > total[1]
    torch.testing.assert_close(reward, torch.tensor([float(total[0]), 0.0]))
    torch.testing.assert_close(totals[0], reward)


def test_reward_weights():
    env = make(1, rewards="reference", reward_weights=("pose=-0.7", "slip=2e-1"))
    assert env.weights == REFERENCE | {"pose": -0.7, "slip": 0.2}
    assert env.metric_names[-1] == "reward_slip"
    put(env, joints=0.1)
    sense(env)
    assert term(env, "pose").item() == pytest.approx(-0.7 * 1.2, rel=1e-4)


@pytest.mark.parametrize(
    ("item", "words"),
    (("bounce=1", "bounce.*slip"), ("slip", "term=number"), ("slip=much", "term=number"), ("slip=nan", "finite")),
)
def test_bad_reward_weights(item, words):
    refused(words, reward_weights=(item,))


def test_jump_terms_need_jumps():
    refused("--commands full", reward_weights=("jump_land=1",))
    assert make(1, commands="full", reward_weights=("jump_land=4",)).weights["jump_land"] == 4


def refused(words: str, **config):
    """The one sentence of a ValueError."""
    with pytest.raises(ValueError, match=words) as error:
        Go2Env(1, **config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    (
        ({"colour": "red"}, "no setting colour"),
        ({"observation": "half"}, "--observation .*proprioceptive.*half"),
        ({"rewards": "none"}, "--rewards"),
        ({"commands": "all"}, "--commands"),
        ({"solver": "sor"}, "--solver"),
        ({"backend": "mjx"}, "--backend"),
        ({"history": 0}, "--history"),
        ({"substeps": 0}, "--substeps"),
        ({"episode_seconds": 0.0}, "--episode-seconds"),
        ({"resample_seconds": 0.0}, "--resample-seconds"),
        ({"action_latency": 4}, "--action-latency .*4"),
        ({"action_latency": -1}, "--action-latency"),
        ({"action_latency": 2, "latency_range": (0, 3)}, "--latency-range"),
        ({"latency_range": (2, 1)}, "--latency-range"),
        ({"randomise": True, "push_interval": 0.0}, "--push-interval .* inf for never, got 0.0"),
        ({"push_interval": -1.0}, "--push-interval"),
        ({"commands": "full", "jump_interval": 0.0}, "--jump-interval .* inf for never, got 0.0"),
        ({"jump_interval": math.nan}, "--jump-interval"),
        ({"commands": "full", "command_jump": (0.3, 0.3)}, "--command-jump .*--base-height-target 0.3"),
        ({"commands": "full", "command_jump": (0.7, 0.5)}, "--command-jump"),
        ({"command_vx": (1.0, -1.0)}, "--command-vx takes two finite numbers, the smaller one first"),
        ({"command_yaw": (0.0, math.inf)}, "--command-yaw"),
        ({"friction_range": (1.2, 0.4)}, "--friction-range"),
        ({"friction_range": (-0.1, 0.4)}, "--friction-range"),
        ({"mass_range": (0.0, 1.0)}, "--mass-range takes factors above 0"),
        ({"strength_range": (-1.0, 1.0)}, "--strength-range"),
        ({"damping_range": (-0.1, 1.0)}, "--damping-range takes numbers from 0"),
        ({"frictionloss_range": (0.2, 0.1)}, "--frictionloss-range"),
        ({"armature_range": (math.nan, 0.1)}, "--armature-range"),
        ({"randomise": True, "payload_range": (-7.0, 0.0)}, "--payload-range .* above -5.88 kg"),
        ({"resample_seconds": math.inf}, "--resample-seconds"),
        ({"standing_fraction": 1.1}, "--standing-fraction"),
        ({"observation_noise": -1.0}, "--observation-noise"),
        ({"kp": 0.0}, "--kp"),
        ({"cone": "round"}, "--cone .*elliptic"),
    ),
)
def test_bad_setting(config, words):
    refused(words, **config)


def test_never():
    """No push and no jump, where the mean time between them is infinite."""
    env = freeze(make(200, randomise=True, commands="full", push_interval=math.inf, jump_interval=math.inf))
    for _ in range(20):
        env.step(torch.zeros(200, 12))
    assert not env.physics.qvel.any() and (env.jump_time < 0).all()


# --- the end of an episode


@pytest.mark.parametrize(
    ("rpy", "ends"),
    (
        ((9.99, 0, 0), False),
        ((10.01, 0, 0), True),
        ((-9.99, 0, 0), False),
        ((-10.01, 0, 0), True),
        ((0, 9.99, 0), False),
        ((0, 10.01, 0), True),
        ((0, -9.99, 0), False),
        ((0, -10.01, 0), True),
        ((9.9, 9.9, 77), False),  # tilted by 14 degrees, but neither angle is beyond ten
        ((9.9, 10.1, 200), True),
        ((10.1, -9.9, -40), True),
        ((0, 0, 179), False),
        ((180, 0, 0), True),  # on its back
        ((179, 3, 20), True),
        ((0, 179, 0), True),
        ((90, 0, 0), True),
    ),
)
def test_termination(rpy, ends):
    env = freeze(make(2))
    put(env, 0), put(env, 1, rpy)
    _, _, terminated, truncated, _ = env.step(torch.zeros(2, 12))
    assert terminated.tolist() == [False, ends] and not truncated.any()


def test_termination_degrees():
    for degrees, ends in ((24.9, False), (25.1, True)):
        env = freeze(make(1, termination_degrees=25.0))
        put(env, 0, (degrees, 0, 0))
        assert env.step(torch.zeros(1, 12))[2].item() == ends


def test_time_limit():
    """It truncates and does not terminate; a fall in the last step terminates and does not truncate."""
    env = freeze(make(2, episode_seconds=0.1))
    for step in range(1, 11):
        put(env, 0), put(env, 1)
        if step == 10:
            put(env, 1, (30, 0, 0))
        _, _, terminated, truncated, info = env.step(torch.zeros(2, 12))
        assert truncated.tolist() == [step % 5 == 0, step == 5] and terminated.tolist() == [False, step == 10]
        assert torch.equal(info["_episode"], terminated | truncated)
        assert torch.equal(info["_final_obs"], terminated | truncated)
    assert make(1).max_episode_length == 1000  # 20 s at 50 Hz


def test_autoreset():
    """One robot is knocked over. Its twin in an environment that never terminates shows what must be seen of it."""
    env, twin = make(4), make(4, termination_degrees=180.0)
    first = env.reset(seed=3)[0]
    assert torch.equal(first, twin.reset(seed=3)[0])
    moves, returns = actions(12, 4, 0.2), torch.zeros(4)
    for step, action in enumerate(moves):
        if step == 8:
            for e in (env, twin):
                e.physics.qpos[2, 3:7] = torch.tensor([math.cos(0.3), math.sin(0.3), 0, 0])
        last_command = env.command.clone()
        obs, reward, terminated, truncated, info = env.step(action)
        true_obs, true_reward, _, _, true_info = twin.step(action)
        returns += reward
        others = [0, 1, 2, 3] if step < 8 else [0, 1, 3]
        assert torch.equal(obs[others], true_obs[others]) and torch.equal(reward[others], true_reward[others])
        assert terminated.tolist() == [False, False, step == 8, False] and not truncated.any()
        if step == 8:
            assert torch.equal(info["final_obs"], true_obs) and torch.equal(true_info["final_obs"], true_obs)
            assert torch.equal(info["final_obs"][2, 36:], action[2])
            scale = torch.tensor([2, 2, 0.25])
            assert torch.equal(info["final_obs"][2, 9:12], last_command[2] * scale)
            assert torch.equal(obs[2, 9:12], env.command[2] * scale) and (env.command[2] != last_command[2]).all()
            standing = torch.tensor([0.0] * 6 + [0, 0, -1])
            assert torch.equal(obs[2, :9], standing) and not obs[2, 24:].any()
            assert 0.01 < obs[2, 12:24].abs().max() <= 0.1
            assert env.height[2] == pytest.approx(0.34)
            assert info["_episode"].tolist() == [False, False, True, False]
            torch.testing.assert_close(info["episode"]["r"][2], returns[2])
            assert info["episode"]["l"][2] == 9
            returns[2] = 0
    torch.testing.assert_close(env.totals[0], returns)
    assert env.episode_length.tolist() == [12, 12, 3, 12]


@pytest.mark.parametrize("options", (None, {"random_phase": True}), ids=("together", "random phase"))
def test_episode_statistics(options):
    """`r`, `l` and the metrics, against sums made from what `step` returned and a learner can see."""
    env = make(6, episode_seconds=0.3, rewards="reference")  # which clamps no sum
    env.reset(seed=4, options=options)
    if options:
        assert len(env.episode_length.unique()) >= 4 and env.episode_length.max() < 15
    sums, ended = torch.zeros(4, 6), 0
    for action in actions(40, 6, 0.3):
        command = env.command
        obs, reward, terminated, truncated, info = env.step(action)
        last = info["final_obs"]
        velocity, yaw_rate = last[:, :2] / 2, last[:, 5] / 0.25
        error = (command[:, :2] - velocity).norm(dim=1), (command[:, 2] - yaw_rate).abs()
        sums += torch.stack((reward, *error, torch.ones(6)))
        done = terminated | truncated
        r, length = info["episode"]["r"], info["episode"]["l"]
        assert torch.equal(length[done], sums[3][done].long())
        torch.testing.assert_close(r[done], sums[0][done])
        torch.testing.assert_close(info["episode"]["lin_vel_error"][done], (sums[1] / sums[3])[done])
        torch.testing.assert_close(info["episode"]["yaw_rate_error"][done], (sums[2] / sums[3])[done])
        terms = sum(value for name, value in info["episode"].items() if name.startswith("reward_"))
        torch.testing.assert_close((terms * length)[done], r[done], atol=1e-5, rtol=1e-4)
        ended += int(done.sum())
        sums[:, done] = 0
    assert ended >= 12


CONFIGS = {
    "default": {},
    "history": {"history": 3},
    "randomise": {"randomise": True, "push_interval": 0.1, "history": 2},
    "full": {"commands": "full", "jump_interval": 0.3, "observation": "proprioceptive", "action_latency": 1},
}
SHORT = {"episode_seconds": 0.3, "resample_seconds": 0.12}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_returned_tensors_are_never_overwritten(config):
    env = make(4, **SHORT, **config)
    kept = [env.reset()[:1]]
    copies = [tuple(t.clone() for t in kept[0])]
    for action in actions(40, 4):
        kept.append(flat(env.step(action)))
        copies.append(tuple(t.clone() for t in kept[-1]))
    assert same(kept, copies)


def test_the_callers_action_may_be_overwritten():
    """As the output of a CUDA graph is, before the next `step`."""
    env, twin = make(2), make(2)
    buffer = torch.zeros(2, 12)
    for action in actions(5, 2):
        buffer.copy_(action)
        a, b = env.step(buffer), twin.step(action)
        assert torch.equal(a[1], b[1])
    buffer.fill_(9)
    assert torch.equal(env.action, twin.action)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_seeds(config):
    moves = actions(30, 4)
    a, b, other = (make(4, seed=seed, **SHORT, **config) for seed in (7, 7, 8))
    first, second, third = (rollout(env, moves) for env in (a, b, other))
    assert same(first, second)
    assert not any(torch.equal(x[0], y[0]) for x, y in zip(first, third, strict=True))
    a.reset(seed=5), b.reset(seed=5)
    assert same(rollout(a, moves), rollout(b, moves))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_state_dict(config):
    """Continues bit for bit, in itself and in an environment of another seed and past."""
    moves = actions(60, 4)
    env, other = make(4, **SHORT, **config), make(4, seed=9, **SHORT, **config)
    env.reset(seed=2, options={"random_phase": True})
    rollout(env, moves[:25])
    state = env.state_dict()
    expected = rollout(env, moves[25:])
    assert any(step[2].any() or step[3].any() for step in expected)
    rollout(other, moves[:3])
    for target in (env, other):
        target.load_state_dict(state)
        assert same(rollout(target, moves[25:]), expected)


def test_standing_is_possible():
    """The zero action stands for ten seconds: the body level, at its height, and hardly moving."""
    env = make(4, standing_fraction=1.0)
    for _ in range(500):
        _, _, terminated, _, _ = env.step(torch.zeros(4, 12))
        assert not terminated.any()
    assert ((env.height > 0.28) & (env.height < 0.33)).all() and env.lin_vel.norm(dim=1).max() < 0.05


# --- latency


@pytest.mark.parametrize("randomise", (False, True))
@pytest.mark.parametrize("latency", (0, 1, 2, 3))
def test_latency(latency, randomise):
    """An action is executed exactly so many control steps later, and never after a reset."""
    config = {"randomise": True, "latency_range": (latency, latency)} if randomise else {"action_latency": latency}
    env = freeze(make(2, **config))
    spike = torch.zeros(2, 12)
    spike[:, 4] = 1.0
    for step in range(8):
        put(env, 0), put(env, 1)
        if step == 3:
            put(env, 1, (45, 0, 0))  # the second robot falls in the step of the spike
        env.step(spike if step == 3 else torch.zeros(2, 12))
        seen = env.physics.ctrl - POSE
        expected = 0.3 if step == 3 + latency else 0.0
        assert seen[0, 4].item() == pytest.approx(expected, abs=1e-6), step
        if step != 3:  # in that step its control was cleared by the reset
            assert seen[1].abs().max().item() < 1e-6
        assert seen[0, [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]].abs().max() < 1e-6


def test_action_scale():
    env = freeze(make(1, action_scale=0.2))
    action = torch.linspace(-1, 1, 12)[None]
    env.step(action)
    torch.testing.assert_close(env.physics.ctrl[0].float(), POSE + 0.2 * action[0])


# --- a state that is not finite


@pytest.mark.parametrize("field", ("qpos", "qvel", "action"))
@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_not_finite(field, bad):
    """That one is reset and counted; the learner sees finite numbers, and the others nothing at all."""
    env, clean = make(3), make(3)
    for step, action in enumerate(actions(20, 3, 0.2)):
        expected = clean.step(action)
        if step == 5 and field == "action":
            action = action.clone()
            action[1, 4] = bad
        elif step == 5:
            getattr(env.physics, field)[1, 9] = bad
        obs, reward, terminated, truncated, info = env.step(action)
        assert terminated.tolist() == [False, step == 5, False] and not truncated.any()
        assert info["nan_resets"] == int(step >= 5)
        for tensor in (obs, reward, info["final_obs"], *info["episode"].values()):
            assert tensor.isfinite().all()
        assert torch.equal(obs[[0, 2]], expected[0][[0, 2]]) and torch.equal(reward[[0, 2]], expected[1][[0, 2]])
        if step == 5:
            assert reward[1] == 0 and obs[1, 8] == -1 and info["episode"]["l"][1] == 6
    assert torch.isfinite(env.totals).all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_nothing_of_it_stays(config):
    """In no buffer, whatever the settings."""
    env = make(3, **config)
    for step in range(12):
        if step == 3:
            env.physics.qpos[1] = math.nan
            env.physics.qvel[1] = math.nan
        obs, reward, terminated, _, info = env.step(torch.zeros(3, 12))
        assert obs.isfinite().all() and reward.isfinite().all() and terminated[1].item() == (step == 3)
    assert info["nan_resets"] == 1
    for name in Go2Env.BUFFERS:
        assert torch.isfinite(getattr(env, name)).all(), name


# --- commands


def test_commands():
    """Drawn anew at the period, the asked share of them zero, of each another share at the ends of its range, the rest
    uniform over it.
    """
    ranges = {"command_vx": (-0.2, 1.4), "command_vy": (0.1, 0.3), "command_yaw": (-0.9, -0.5)}
    env = freeze(make(2000, standing_fraction=0.3, command_ends=0.2, resample_seconds=0.1, **ranges))
    low, high = torch.tensor([[-0.2, 0.1, -0.9], [1.4, 0.3, -0.5]])
    for step in range(1, 12):
        before = env.command
        obs, _, _, _, info = env.step(torch.zeros(2000, 12))
        changed = (env.command != before).any(1)
        assert torch.equal(obs[:, 9:12], env.command * torch.tensor([2, 2, 0.25]))
        assert torch.equal(info["final_obs"][:, 9:12], before * torch.tensor([2, 2, 0.25]))
        standing = (env.command == 0).all(1)
        drawn = env.command[~standing]
        share = (drawn - low) / (high - low)
        assert (share > -1e-6).all() and (share < 1 + 1e-6).all()
        for end in (0, 1):
            assert ((share - end).abs().lt(1e-5).float().mean(0) - 0.1).abs().max() < 0.045  # 5 standard deviations
        inside = share[((share > 0.001) & (share < 0.999)).all(1)]
        assert (inside.mean(0) - 0.5).abs().max() < 0.07 and (inside.std(0) - 12**-0.5).abs().max() < 0.03
        assert abs(standing.float().mean() - 0.3) < 0.05  # 4.9 standard deviations
        # Two draws in a row may both be zero.
        assert changed.float().mean() > 0.85 if step % 5 == 0 else not changed.any(), step


def test_default_commands_are_those_of_the_reference():
    cfg = go2.Go2Config()
    assert (cfg.command_vx, cfg.command_vy, cfg.command_yaw) == ((-1.0, 2.0), (-0.5, 0.5), (-0.6, 0.6))


def test_fixed_commands():
    env = make(3, resample_seconds=0.04)
    env.fixed_commands = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    env.reset()
    for action in actions(6, 3):
        assert torch.equal(env.command, env.fixed_commands)
        env.step(action)


def test_jump_rate():
    """Jumps begin at the configured rate, wherever none is under way."""
    env = freeze(make(2000, commands="full", jump_interval=2.0, jump_tracking=math.inf, resample_seconds=20.0))
    begun = free = 0
    for _ in range(60):
        idle = env.jump_time < 0
        env.step(torch.zeros(2000, 12))
        starts = idle & (env.jump_time == 0)
        assert torch.equal(env.command[:, 4] > 0, (env.jump_time >= 0) & (env.jump_time < go2.JUMP_WINDOW - 1e-4))
        jumps = env.command[starts, 4]
        assert (jumps >= 0.5).all() and (jumps <= 0.7).all() and not env.command[starts, :3].any()
        begun, free = begun + int(starts.sum()), free + int(idle.sum())
    rate = 0.02 / 2.0
    assert abs(begun - free * rate) < 5 * math.sqrt(free * rate)
    assert jumps.numel() and begun > 500


def test_only_who_tracks_is_told_to_jump():
    """Two robots stand still, one of them as it should: after any step it may be told to jump, the other never."""
    env = freeze(make(2, commands="full", jump_interval=1e-9, jump_tracking=0.25, resample_seconds=20.0))
    env.command[:, :3] = torch.tensor([[0.2, 0.0, 0.0], [0.3, 0.0, 0.0]])
    for _ in range(3):
        env.step(torch.zeros(2, 12))
    assert env.jump_time[0] >= 0 and env.jump_time[1] < 0


def jumping(**config):
    """Two robots that have just been told to jump, standing still."""
    settings = {"standing_fraction": 0.0, "resample_seconds": 0.04, "jump_tracking": math.inf} | config
    env = freeze(make(2, commands="full", **settings))
    env.cfg.jump_interval = 1e-9
    put(env, 0), put(env, 1)
    env.step(torch.zeros(2, 12))
    env.cfg.jump_interval = 1e9
    assert env.jump_time.tolist() == [0, 0] and (env.command[:, 4] >= 0.5).all()
    return env


def test_a_jump_from_start_to_end():
    """Its height is commanded until the base is there (the second robot) or the window is over (the first); then the
    robot lands, standing; then it is given a velocity again. It keeps one height to land on all the while.
    """
    env = jumping()
    height, jump = env.command[:, 3].clone(), env.command[:, 4].clone()
    reached, window, landing = 10, round(go2.JUMP_WINDOW / DT), round(go2.JUMP_LANDING / DT)
    commanded, landed = [], []
    for step in range(1, 80):
        put(env, 0), put(env, 1)
        if step == reached:
            put(env, 1, height=float(jump[1]) - go2.JUMP_TOLERANCE + 0.01)
        if step == reached - 1:
            put(env, 1, height=float(jump[1]) - go2.JUMP_TOLERANCE - 0.01)
        obs, _, terminated, _, info = env.step(torch.zeros(2, 12))
        assert not terminated.any()
        commanded.append((env.command[:, 4] > 0).tolist())
        landed.append((env.jump_time < 0).tolist())
        still = env.jump_time >= 0
        assert not env.command[still, :3].any() and env.command[~still, :2].abs().sum(1).gt(0).all()
        assert torch.equal(env.command[still, 3], height[still])
        rising = env.command[:, 4] > 0
        assert torch.equal(env.command[rising, 4], jump[rising])
        assert torch.equal(obs[:, 13], env.command[:, 4] * 2)
    first, second = (list(column) for column in zip(*commanded, strict=True))
    assert abs(first.count(True) - (window - 1)) <= 1 and second.count(True) == reached - 1
    first, second = (list(column).index(True) + 1 for column in zip(*landed, strict=True))
    assert abs(first - (window + landing)) <= 1 and abs(second - (reached + landing)) <= 1


def test_jump_rewards():
    """The climb pays once for each new centimetre up to the commanded height, at most its weight in all; the landing
    pays for being at the height of the command. What asks to stay on the ground is off, and on again afterwards.
    """
    env = jumping(reward_weights=("jump_height=2", "jump_land=1"))
    goal = float(env.command[0, 4])
    paid = []
    for height in (0.3, 0.35, 0.4, 0.4, 0.38, 0.41, goal - go2.JUMP_TOLERANCE - 0.01):
        put(env, 0, height=height, velocity=(0, 0, 1.0), joints=0.3), put(env, 1)
        env.foot_pos, env.air_time = torch.rand(2, 4, 3), torch.full((2, 4), 0.3)
        reward, totals = env._rewards(torch.ones(2, 12))
        values = dict(zip(env.weights, totals[3:, 0] / DT, strict=True))
        assert [values[name].item() for name in go2.OFF_IN_JUMP] == [0] * len(go2.OFF_IN_JUMP)
        assert values["jump_land"] == 0 and values["lin_vel"] > 0
        paid.append(values["jump_height"].item() * DT)
    climb = goal - 0.3
    expected = [0.0, 0.05, 0.05, 0.0, 0.0, 0.01, goal - go2.JUMP_TOLERANCE - 0.01 - 0.41]
    assert paid == pytest.approx([2 * rise / climb for rise in expected], abs=1e-4)
    put(env, 0, height=goal + 0.2)
    assert sum(paid) + term(env, "jump_height")[0].item() * DT == pytest.approx(2, abs=1e-3)

    env.command[:, 4] = 0.0  # it lands
    put(env, 0, height=float(env.command[0, 3]) + 0.05)
    assert term(env, "jump_land")[0].item() == pytest.approx(math.exp(-(0.05**2) / 0.01), rel=1e-3)
    assert term(env, "jump_height")[0] == 0 and term(env, "base_height")[0] == 0
    env.jump_time[:] = -1.0
    assert term(env, "jump_land")[0] == 0
    assert term(env, "base_height")[0].item() == pytest.approx(NATURAL["base_height"] * 0.05**2, rel=1e-3)


def test_commanded_height_is_the_target():
    env = make(1, commands="full", rewards="reference")
    env.command = torch.tensor([[0.0, 0, 0, 0.22, 0]])
    put(env, height=0.3)
    assert term(env, "base_height").item() == pytest.approx(-50 * 0.08**2, rel=1e-4)


# --- randomisation


def test_bodies_are_drawn_once():
    """Friction, masses and payload span their ranges; all geoms of a world share its friction; no reset draws again."""
    env = make(300, randomise=True, episode_seconds=0.04)
    fields, model = env.physics.fields, env.model
    friction = fields["geom_friction"][..., 0]
    assert torch.equal(friction, friction[:, :1].expand_as(friction))
    spans(friction[:, 0], 0.4, 1.2)
    assert torch.equal(fields["geom_friction"][..., 1:], torch.tensor(model.geom_friction[:, 1:]).expand(300, -1, -1))
    inertia = fields["body_inertia"][:, 1:] / torch.tensor(model.body_inertia[1:])
    torch.testing.assert_close(inertia[..., :1].expand_as(inertia), inertia)
    factor = inertia[..., 0]
    for body in range(model.nbody - 1):
        spans(factor[:, body], 0.85, 1.15)
    added = fields["body_mass"][:, 1:] - factor * torch.tensor(model.body_mass[1:])
    spans(added[:, 0], -0.5, 2.0)
    assert added[:, 1:].abs().max() < 1e-6
    kept = {name: fields[name].clone() for name in ("geom_friction", "body_mass", "body_inertia")}
    rollout(env, actions(5, 300, 0.1))
    env.reset()
    assert all(torch.equal(fields[name], value) for name, value in kept.items())


def spans(values, low, high):
    """Within the range, and all of it."""
    margin = 0.03 * (high - low)
    assert low - 1e-6 <= values.min() <= low + margin and high - margin <= values.max() <= high + 1e-6


def test_joints_are_drawn():
    """Damping, dry friction and armature of every joint span their ranges, and the floating base has none of them."""
    env = make(
        400, randomise=True, damping_range=(0.2, 1.5), frictionloss_range=(0.1, 0.9), armature_range=(0.01, 0.06)
    )
    fields = {name: env.physics.fields[f"dof_{name}"].clone() for name in ("damping", "frictionloss", "armature")}
    for name, field in fields.items():
        low, high = getattr(env.cfg, f"{name}_range")
        assert not field[:, :6].any()
        for joint in range(6, 18):
            spans(field[:, joint], low, high)
        share = (field[:, 6:] - low) / (high - low)
        assert (share.mean(1) > 0.95).any() and (share.mean(1) < 0.05).any()  # some robots are stiff in all joints
        assert share.std(1).mean() > 0.05  # and those of one robot differ
    drawn = torch.cat([field[:, 6:7] for field in fields.values()], 1)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.2

    for i in range(400):
        put(env, i, (30, 0, 0) if i < 200 else (0, 0, 0))
    freeze(env).step(torch.zeros(400, 12))
    for name, field in fields.items():
        changed = (env.physics.fields[f"dof_{name}"] != field).any(1)
        # A robot whose joints were all at one end of the range may be there again.
        assert not changed[200:].any() and (changed[:200].sum() > 180 if name != "armature" else not changed.any())


def test_randomisation_does_not_compound():
    """After a hundred episodes the numbers are still within their ranges: each is drawn from the nominal model."""
    env = freeze(make(50, randomise=True, episode_seconds=0.02))
    for _ in range(100):
        assert env.step(torch.zeros(50, 12))[3].all()
    fields = env.physics.fields
    strength = fields["actuator_forcerange"][..., 1] / torch.tensor(TORQUE_LIMITS)
    spans(strength, 0.85, 1.15)
    spans(fields["actuator_gainprm"][..., 0] / 40.0 / strength, 0.9, 1.1)
    spans(-fields["actuator_biasprm"][..., 1] / 40.0 / strength, 0.9, 1.1)
    spans(-fields["actuator_biasprm"][..., 2] / strength, 0.9, 1.1)
    spans(fields["dof_damping"][:, 6:], *env.cfg.damping_range)
    spans(fields["dof_frictionloss"][:, 6:], *env.cfg.frictionloss_range)


def test_first_observation_of_an_episode_is_noisy_too():
    """The robots stand still when they start, so all that is seen of their velocities is noise."""
    env = freeze(make(200, randomise=True, episode_seconds=0.02, push_interval=math.inf))
    for obs in (env.reset()[0], env.step(torch.zeros(200, 12))[0]):
        for part, bound in ((obs[:, :3], 0.2), (obs[:, 3:6], 0.05), (obs[:, 24:36], 0.075)):
            assert (part != 0).all()
            spans(part, -bound, bound)


def test_neutral_randomisation_is_none():
    """With every range shrunk to the nominal value, a randomised robot is the plain one."""
    one = dict.fromkeys(("mass_range", "strength_range", "gain_range"), (1.0, 1.0))
    zero = {"payload_range": (0.0, 0.0), "latency_range": (0, 0), "frictionloss_range": (0.0, 0.0)}
    own = {"friction_range": (0.8, 0.8), "damping_range": (0.1, 0.1), "armature_range": (0.02, 0.02)}
    calm = {"push_interval": math.inf, "observation_noise": 0.0}
    env, plain = make(2, randomise=True, **one, **zero, **own, **calm), make(2)
    for name, field in env.physics.fields.items():
        if name != "geom_friction":
            np.testing.assert_allclose(field[1], getattr(plain.model, name), rtol=1e-6, err_msg=name)
    for index in range(2):
        put(env, index), put(plain, index)
    for action in actions(5, 2, 0.1):
        env.step(action), plain.step(action)
    torch.testing.assert_close(env.physics.qpos, plain.physics.qpos, atol=1e-5, rtol=0)


def test_payload_hangs_on_the_robot(tmp_path):
    """Not on whatever body comes first in a file."""
    path = Path(menagerie_like.write(tmp_path, "motors"))
    post = '<body name="post" pos="3 0 0"><inertial pos="0 0 0" mass="5" diaginertia="1 1 1"/><geom size="0.1"/></body>'
    text = path.read_text().replace("<worldbody>", f"<worldbody>{post}")
    path.write_text(text.replace('fusestatic="true"', ""))  # which would make the post a part of the world
    env = make(20, xml_path=str(path), randomise=True, mass_range=(1.0, 1.0), payload_range=(1.0, 2.0))
    added = env.physics.fields["body_mass"] - torch.tensor(env.model.body_mass)
    names = [env.model.body(i).name for i in range(env.model.nbody)]
    assert names[1] == "post" and names[env.base] == "base"
    assert (added[:, env.base] >= 1.0 - 1e-6).all() and (added[:, env.base] <= 2.0 + 1e-6).all()
    added[:, env.base] = 0
    assert added.abs().max() < 1e-6


def test_motors_are_drawn_per_episode():
    env = freeze(make(300, randomise=True, latency_range=(0, 2), action_latency=1))
    fields = env.physics.fields
    names = ("actuator_gainprm", "actuator_biasprm", "actuator_forcerange")
    strength = fields["actuator_forcerange"][..., 1] / torch.tensor(TORQUE_LIMITS)
    assert torch.equal(fields["actuator_forcerange"][..., 0], -fields["actuator_forcerange"][..., 1])
    spans(strength[:, 3], 0.85, 1.15)
    kp = fields["actuator_gainprm"][..., 0] / 40.0 / strength
    kd = -fields["actuator_biasprm"][..., 2] / 1.0 / strength
    spans(kp[:, 5], 0.9, 1.1), spans(kd[:, 5], 0.9, 1.1)
    # kp stands in two places, and must be one number; strength, kp and kd are drawn apart, and motor by motor.
    torch.testing.assert_close(fields["actuator_biasprm"][..., 1], -fields["actuator_gainprm"][..., 0])
    assert np.abs(np.corrcoef(torch.cat((strength, kp, kd), 1).T) - np.eye(36)).max() < 0.3
    assert env.latency.unique().tolist() == [1, 2, 3]

    before = {name: fields[name].clone() for name in names} | {"latency": env.latency}
    for i in range(300):
        put(env, i, (30, 0, 0) if i < 150 else (0, 0, 0))
    assert env.step(torch.zeros(300, 12))[2].sum() == 150
    for name in names:
        changed = (fields[name] != before[name]).flatten(1).any(1)
        assert changed.tolist() == [True] * 150 + [False] * 150
    assert (env.latency != before["latency"])[:150].any() and torch.equal(env.latency[150:], before["latency"][150:])


def test_randomised_model_is_what_is_simulated():
    """A weak robot with its feet on ice does what `MjModel`'s with those numbers would do."""
    env = make(2, randomise=True, latency_range=(0, 0), push_interval=1e9)
    model = env.physics._batch.get_model(1)
    for name, field in env.physics.fields.items():
        np.testing.assert_array_equal(getattr(model, name), field[1].numpy())
    data = mujoco.MjData(model)
    data.qpos[:] = env.physics.qpos[1]
    for action in actions(10, 2, 0.3):
        env.step(action)
        data.ctrl[:] = POSE + 0.3 * action[1]
        for _ in range(env.cfg.substeps):
            mujoco.mj_step(model, data)
    np.testing.assert_allclose(env.physics.qpos[1].numpy(), data.qpos, atol=1e-9)


def test_pushes():
    """A push adds a horizontal velocity within bounds, at the configured rate, to the base and nothing else."""
    env = freeze(make(1000, randomise=True, push_interval=0.2, push_velocity=0.7))
    pushed = 0
    for _ in range(10):
        before = env.physics.qvel.clone()
        env.step(torch.zeros(1000, 12))
        kick = env.physics.qvel - before
        assert not kick[:, 2:].any() and kick.abs().max() <= 0.7
        pushed += int((kick != 0).any(1).sum())
        last = kick
    assert last.max() > 0.5 and last.min() < -0.5
    assert abs(pushed - 1000) < 5 * math.sqrt(1000)
    still = freeze(make(100, randomise=False))
    still.step(torch.zeros(100, 12))
    assert not still.physics.qvel.any()


# --- other people's robots


@pytest.mark.parametrize("kind", ("motors", "servos"))
def test_xml_path(tmp_path, kind):
    """Joints are found by name, whatever their order in the file; gains and torque limits are ours."""
    path = menagerie_like.write(tmp_path, kind)
    config = {"kp": 33.0, "kd": 0.8, "spawn_noise": 0.0}
    env, plain = make(2, xml_path=path, **config), make(2, **config)
    assert torch.equal(env.reset(seed=1)[0], plain.reset(seed=1)[0])
    model = env.model
    addresses = [int(model.joint(name).qposadr[0]) for name in JOINTS]
    assert addresses != sorted(addresses)
    assert model.nu == 12 and model.opt.timestep == CONTROL_DT / env.cfg.substeps
    for i, (name, limit) in enumerate(zip(JOINTS, TORQUE_LIMITS, strict=True)):
        assert model.actuator_trnid[i, 0] == model.joint(name).id
        assert model.actuator_gainprm[i, 0] == 33 and model.actuator_biasprm[i, :3].tolist() == [0, -33, -0.8]
        assert model.actuator_forcelimited[i] and model.actuator_forcerange[i].tolist() == [-limit, limit]
        assert not model.actuator_ctrllimited[i]
    action = torch.zeros(2, 12)
    action[:, 0], action[:, 7], action[:, 11] = 0.3, -0.4, 0.4  # FR hip, RR thigh, RL calf
    for e in (env, plain):
        e.physics.qpos[:, 2] = 1.0  # in the air, where nothing but the motors moves the joints
    for _ in range(12):
        obs, other = env.step(action)[0], plain.step(action)[0]
    # The same joints went the same way as with our own file (damping 2 in place of .1), and no other did.
    for moved in (obs[0, 12:24], other[0, 12:24]):
        assert moved[0] > 0.05 and moved[7] < -0.05 and moved[11] > 0.05
        assert moved[[1, 2, 3, 4, 5, 6, 8, 9, 10]].abs().max() < 0.02
    for i, name in enumerate(JOINTS):
        expected = env.physics.qpos[0, addresses[i]].float() - POSE[i]
        assert obs[0, 12 + i].item() == pytest.approx(expected.item(), abs=1e-6), name
    env.reset()
    for _ in range(100):
        obs, reward, terminated, _, _ = env.step(torch.zeros(2, 12))
        assert not terminated.any() and obs.isfinite().all() and reward.isfinite().all()
    feet, contact = env.physics.sensordata[:, :12].view(2, 4, 3), env.physics.sensordata[:, 12:]
    assert (feet[..., 0].sign() == torch.tensor([1, 1, -1, -1])).all()
    assert (feet[..., 1].sign() == torch.tensor([-1, 1, -1, 1])).all() and contact.sum() >= 4


def test_xml_path_randomised(tmp_path):
    env = make(2, xml_path=menagerie_like.write(tmp_path, "motors"), randomise=True)
    assert all(t.isfinite().all() for step in rollout(env, actions(20, 2, 0.2)) for t in step)


def test_xml_path_without_the_joints(tmp_path):
    path = Path(menagerie_like.write(tmp_path, "motors"))
    path.write_text(path.read_text().replace("RL_calf_joint", "knee"))
    refused(f"--xml-path.*{re.escape(str(path))}.*RL_calf_joint", xml_path=str(path))
    (tmp_path / "ball.xml").write_text("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
    refused("FR_hip_joint.*RL_calf_joint", xml_path=str(tmp_path / "ball.xml"))


def test_xml_path_with_more_than_the_robot(tmp_path):
    path = Path(menagerie_like.write(tmp_path, "motors"))
    box = "<body><freejoint/><geom type='box' size='.1 .1 .1'/></body></worldbody>"
    path.write_text(path.read_text().replace("</worldbody>", box))
    refused("--xml-path.*nq 26", xml_path=str(path))


def test_xml_path_without_a_model(tmp_path):
    refused("--xml-path: there is no file", xml_path=str(tmp_path / "nothing.xml"))
    refused("--xml-path: there is no file", xml_path=str(tmp_path))
    (tmp_path / "broken.xml").write_text("<mujoco><worldbody>")
    refused("--xml-path.*cannot read", xml_path=str(tmp_path / "broken.xml"))


# --- Gymnasium


def test_gymnasium():
    env = gym.make_vec("Go2-v0", num_envs=8, physics_threads=1)
    assert env.num_envs == 8 and isinstance(env.unwrapped, gym.vector.VectorEnv)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.single_observation_space.shape == (48,) and env.observation_space.shape == (8, 48)
    assert env.single_action_space.shape == (12,) and env.action_space.shape == (8, 12)
    obs, info = env.reset(seed=1)
    assert info == {} and env.observation_space.contains(obs.numpy())
    for _ in range(5):
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())  # numpy, as others have it
        assert env.observation_space.contains(obs.numpy()) and obs.dtype == torch.float32
        assert reward.shape == terminated.shape == truncated.shape == (8,)
        assert reward.dtype == torch.float32 and terminated.dtype == truncated.dtype == torch.bool
        assert not (obs.requires_grad or reward.requires_grad)
    env.close()


def test_settings_as_a_dataclass():
    """Any dataclass with the fields of Go2Config, such as a script's Args; it is copied, and names override it."""

    @dataclass
    class Args(go2.Go2Config):
        learning_rate: float = 1.0

    args = Args(kp=30.0, history=2)
    env = Go2Env(2, "cpu", 1, args, 1, kd=0.7)
    args.kp = 99.0
    assert env.cfg == go2.Go2Config(kp=30.0, history=2, kd=0.7)
    assert env.single_observation_space.shape == (96,)
    assert set(go2.ENV_SETTINGS) == set(asdict(args)) - {"learning_rate"} and "physics_threads" not in asdict(args)
    assert gym.make_vec("Go2-v0", num_envs=1, commands="full").single_observation_space.shape == (50,)


def test_actions_may_carry_gradients():
    env = make(1)
    obs, reward, *_ = env.step(torch.zeros(1, 12, requires_grad=True))
    assert not obs.requires_grad and not reward.requires_grad
