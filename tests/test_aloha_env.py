"""The ALOHA environment: the package's physics, rewards and pictures, and the rules that are ours."""

import math
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from common import video
from common.envs.aloha import START_POSE, TASKS, AlohaConfig, AlohaEnv
from common.physics import BatchedMujoco

needs_gl = pytest.mark.skipif(video.find_gl() is None, reason=video.missing_gl_message())


@pytest.fixture(autouse=True)
def log_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo leaves a MUJOCO_LOG.TXT behind when a state is not finite


@pytest.fixture
def make():
    made = []

    def make(num_envs=2, seed=1, **config) -> AlohaEnv:
        made.append(AlohaEnv(num_envs, seed=seed, **{"obs_type": "state", "threads": 1} | config))
        made[-1].reset()
        return made[-1]

    yield make
    for env in made:
        env.close()


def actions(steps, num_envs, scale=1.0, seed=0):
    return scale * torch.randn(steps, num_envs, 14, generator=torch.Generator().manual_seed(seed))


def touch(env, *names):
    """Contact sensors by hand, every world the same; the physics stands still."""
    from common.envs.aloha import CONTACTS

    env.physics.step = env.physics.forward = lambda *arguments: None
    readings = [name in names for name, pairs in CONTACTS[env.cfg.task].items() for _ in pairs]
    tools = env.physics.sensordata[:, -6:].clone()
    env.physics.sensordata = torch.cat((torch.tensor(readings).double().expand(env.num_envs, -1), tools), 1)


def flat(returned) -> tuple:
    *tensors, info = returned
    return (*tensors, *(v for k, v in sorted(info.items()) if k != "episode"), *info["episode"].values())


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


# --- the package


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("mode", ["delta", "absolute"])
def test_physics_and_rewards_are_the_packages(make, env_id, mode):
    """To the bit; the objects start between the fingers of arms that thrash about. benchmark/aloha_env_speed.py has the
    long one, with demonstrations.
    """
    config = {"env_id": env_id, "action_mode": mode, "episode_steps": 40, "joint_step": 0.1, "gripper_step": 0.5}
    fast, package = make(3, **config), make(3, env_backend="gym-aloha", **config)
    state = fast.get_state()
    tools = fast.physics.sensordata[:, -6:].view(-1, 2, 3).flip(1)  # right first, as the objects
    for i in range((fast.model.nq - 16) // 7):
        state["qpos"][:2, 16 + 7 * i : 19 + 7 * i] = tools[:2, i]
    for env in (fast, package):
        env.set_state(torch.arange(3), state)
    levels = set()
    absolute = torch.tensor([1.0, 1, 1, 1, 1, 1, 0] * 2) * fast.target[0].float()  # at rest with closed grippers
    for action in actions(60, 3) if mode == "delta" else absolute + actions(60, 3, 0.2):
        ours, theirs = fast.step(action), package.step(action)
        assert same(ours, theirs) and torch.equal(fast.level, package.level)
        for name in ("qpos", "qvel", "ctrl", "qacc_warmstart"):
            assert torch.equal(getattr(fast.physics, name), getattr(package.physics, name)), name
        levels |= set(fast.level.tolist())
    assert len(levels) > 1
    assert fast.physics.qpos[:, :16].std() > 0.1


def test_starts_are_the_packages(make):
    env = make(500)
    qpos = env.physics.qpos
    assert torch.equal(qpos[:, :16], torch.tensor(START_POSE, dtype=torch.float64).expand(500, 16))
    peg, socket = qpos[:, 16:23], qpos[:, 23:]
    for pose, low, high in ((peg, 0.1, 0.2), (socket, -0.2, -0.1)):
        for axis, ends in enumerate(((low, high), (0.4, 0.6))):
            x = pose[:, axis]
            assert ends[0] <= x.min() < ends[0] + 0.005 and ends[1] - 0.005 < x.max() <= ends[1]
        assert (pose[:, 2:] == torch.tensor([0.05, 1, 0, 0, 0], dtype=torch.float64)).all()
    assert abs(np.corrcoef(peg[:, 0], socket[:, 0])[0, 1]) < 0.2
    cube = make(500, env_id="AlohaTransferCube-v0").physics.qpos[:, 16:]
    assert 0 <= cube[:, 0].min() < 0.005 and 0.195 < cube[:, 0].max() <= 0.2 and cube.shape == (500, 7)


@needs_gl
def test_pictures_of_the_package_are_its_own():
    """To the bit. In a process of its own: dm_control complains at its end when another has used EGL."""
    code = """
import torch
from common.envs.aloha import TASKS, AlohaEnv
for env_id in TASKS:
    env = AlohaEnv(2, env_backend="gym-aloha", env_id=env_id, image_height=480, image_width=640, crop=(0, 0, 1, 1))
    env.reset(seed=1)
    obs = env.step(torch.randn(2, 14))[0]
    theirs = torch.stack([torch.from_numpy(e.render().copy()) for e in env.package.envs])
    assert torch.equal(obs["pixels"], theirs), (obs["pixels"].float() - theirs).abs().mean()
    assert theirs.float().std() > 10
print("same")
"""
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert run.stdout.startswith("same"), run.stderr


@needs_gl
@pytest.mark.parametrize("env_id", TASKS)
def test_fast_pictures_are_close(make, env_id):
    fast = make(3, env_id=env_id, obs_type="pixels")
    smooth = make(3, env_id=env_id, obs_type="pixels", samples=4, shadows=True)
    large = make(3, env_id=env_id, obs_type="pixels", supersample=2, shadows=True)
    package = make(3, env_id=env_id, obs_type="pixels", env_backend="gym-aloha")
    for action in actions(5, 3):
        envs = (fast, smooth, large, package)
        pictures, smoother, averaged, theirs = (env.step(action)[0].float() for env in envs)
    assert (pictures - theirs).abs().mean() < 4.5  # of 255; the shadows are 2 of it
    assert (smoother - theirs).abs().mean() < 1.5
    assert (averaged - theirs).abs().mean() < 1.6
    for colour in (0, 2) if TASKS[env_id] == "insertion" else (0,):  # the peg or cube is red, the socket blue
        rest = [c for c in range(3) if c != colour]
        seen = [p[..., colour] > p[..., rest].amax(-1) + 60 for p in (pictures, theirs)]
        assert torch.allclose(*(s.sum((1, 2)).float() for s in seen), rtol=0.2)
        middles = [torch.stack([s[i].nonzero().float().mean(0) for i in range(3)]) for s in seen]
        assert (middles[0] - middles[1]).abs().max() < 0.6  # pixels


@needs_gl
def test_warp(make):
    """The same movements, levels and places in the picture. Of the light, only how bright it is."""
    config = {"obs_type": "pixels", "image_height": 42, "image_width": 42}
    engines = [make(backend=backend, **config) for backend in ("mujoco", "warp")]
    for action in actions(4, 2):
        (a, paid, *_), (b, traced_paid, *_) = (env.step(action) for env in engines)
    torch.testing.assert_close(engines[1].physics.qpos.double(), engines[0].physics.qpos, atol=1e-3, rtol=0)
    torch.testing.assert_close(paid, traced_paid, atol=1e-3, rtol=0)
    for colour in (0, 2):
        rest = [c for c in range(3) if c != colour]
        seen = [p[..., colour].int() > p[..., rest].int().amax(-1) + 60 for p in (a, b)]
        assert seen[0].sum() > 20 and (seen[0] != seen[1]).sum() <= 6
    assert (a.float() - b.float()).abs().mean() < 20  # of 255


# --- observations


@needs_gl
def test_observation_spaces(make):
    shapes = {"state": (56,), "pixels": (60, 80, 6)}
    for obs_type, shape in shapes.items():
        env = make(obs_type=obs_type, image_height=60, image_width=80, frame_stack=2)
        obs, _ = env.reset()
        assert env.single_observation_space.shape == shape and obs.shape == (2, *shape)
        assert env.observation_space.contains(obs.numpy())
    env = make(obs_type="pixels_agent_pos", action_mode="absolute", image_height=60, image_width=80)
    obs = env.step(torch.zeros(2, 14))[0]
    assert env.observation_space.contains({name: value.numpy() for name, value in obs.items()})
    assert obs["pixels"].shape == (2, 60, 80, 3) and obs["agent_pos"].shape == (2, 14)
    assert make(env_id="AlohaTransferCube-v0").single_observation_space.shape == (49,)


def test_joints_are_in_the_packages_units(make):
    env = make()
    obs = env.reset()[0]
    rest = [0, -0.96, 1.16, 0, -0.3, 0, (0.02239 - 0.01844) / (0.058 - 0.01844)]
    torch.testing.assert_close(obs[:, :28], torch.tensor(rest * 4).expand(2, 28))  # positions, then targets
    assert not obs[:, 28:42].any()
    torch.testing.assert_close(obs[:, 42:], env.physics.qpos[:, 16:].float())
    opening = torch.tensor([0.0, 0, 0, 0, 0, 0, 1] * 2).expand(2, 14)
    for _ in range(40):
        obs = env.step(opening)[0]
    assert (obs[:, 6] > 0.9).all() and (env.physics.qpos[:, 7] < -0.055).all()


@needs_gl
def test_frame_stack(make):
    """Newest last; a new episode's is filled with its first picture; the others keep theirs."""
    env = make(obs_type="pixels", frame_stack=3, episode_steps=4)
    plain = make(obs_type="pixels", episode_steps=4)
    obs, single = env.reset(seed=5)[0], plain.reset(seed=5)[0]
    assert torch.equal(obs, single.repeat(1, 1, 1, 3))
    shown = [single] * 3
    env.set_state(torch.tensor([1]), env.get_state(torch.tensor([1])))
    for step, action in enumerate(actions(7, 2)):
        obs, _, _, truncated, info = env.step(action)
        single, *_, single_info = plain.step(action)
        shown.append(single_info["final_obs"])
        assert torch.equal(info["final_obs"], torch.cat(shown[-3:], -1)) or step > 3
        if truncated.any():
            assert step == 3 and torch.equal(obs, single.repeat(1, 1, 1, 3))
            shown = [single] * 3
        else:
            assert torch.equal(obs, info["final_obs"])


@needs_gl
@pytest.mark.parametrize("frame_stack", [1, 2])
def test_who_is_not_watched_is_not_drawn(make, frame_stack):
    """Neither in a step nor where its episode begins; the others look as they would."""
    config = {"obs_type": "pixels", "episode_steps": 3, "frame_stack": frame_stack}
    env, all_seen = make(3, **config), make(3, **config)
    before, _ = env.reset(seed=5)
    all_seen.reset(seed=5)
    env.watched, drawn = torch.tensor([True, False, True]), []
    render = env.renderer.render
    env.renderer.render = lambda qpos, rows: (drawn.extend(rows.tolist()), render(qpos, rows))[1]
    for action in actions(4, 3):
        obs, theirs = env.step(action)[0], all_seen.step(action)[0]
        assert torch.equal(obs[[0, 2]], theirs[[0, 2]]) and torch.equal(obs[1], before[1])
    assert set(drawn) == {0, 2}


@needs_gl
def test_crop_is_a_part_of_the_whole_picture(make):
    whole = make(obs_type="pixels", crop=(0, 0, 1, 1), image_height=240, image_width=320, mesh_detail=0)
    part = make(obs_type="pixels", crop=(0.25, 0.5, 0.75, 0.75), image_height=60, image_width=160, mesh_detail=0)
    a, b = whole.reset(seed=1)[0][:, 120:180, 80:240].float(), part.reset(seed=1)[0].float()
    assert (a - b).abs().mean() < 0.05 and b.std() > 20


# --- actions


def test_delta_actions(make):
    env = make(joint_step=0.02, gripper_step=0.1)
    start = env.target.clone()
    action = torch.zeros(2, 14)
    action[0, 0], action[0, 6], action[1, 9], action[1, 13] = 0.5, 1.0, -7.0, -1.0
    kept = action.clone()
    env.step(action)
    expected = start.clone()
    expected[0, 0] += 0.01
    expected[0, 6] += 0.1
    expected[1, 9] -= 0.02  # a larger action moves no further
    expected[1, 13] = (0.021 - 0.01844) / (0.058 - 0.01844)  # the end of the control range
    torch.testing.assert_close(env.target, expected)
    assert torch.equal(action, kept)
    finger = expected[0, 6] * (0.058 - 0.01844) + 0.01844
    torch.testing.assert_close(env.physics.ctrl[0, 6:8], torch.stack((finger, -finger)))
    for _ in range(300):
        env.step(torch.full((2, 14), 1.0))
    low, high = torch.from_numpy(env.model.actuator_ctrlrange).T
    assert (env.physics.ctrl >= low - 1e-12).all() and (env.physics.ctrl <= high + 1e-12).all()


def test_absolute_actions_are_not_clipped(make):
    env = make(action_mode="absolute")
    action = torch.linspace(-2, 2, 14).expand(2, 14)
    env.step(action)
    torch.testing.assert_close(env.physics.ctrl[0, :6].float(), action[0, :6])
    torch.testing.assert_close(env.physics.ctrl[0, 8:14].float(), action[0, 7:13])
    assert env.single_action_space.high.max() == math.inf


# --- episodes


def test_levels(make):
    env = make()
    cases = {
        (): 0,
        ("left_socket",): 0,
        ("left_socket", "right_peg", "peg_table"): 1,
        ("left_socket", "right_peg"): 2,
        ("peg_socket", "socket_table"): 0,
        ("left_socket", "right_peg", "peg_socket"): 3,
        ("peg_pin", "peg_table", "socket_table"): 4,
    }
    for names, level in cases.items():
        touch(env, *names)
        assert env._read_level().tolist() == [level] * 2, names
    env = make(env_id="AlohaTransferCube-v0")
    cases = {("right_cube", "cube_table"): 1, ("right_cube",): 2, ("left_cube", "cube_table"): 3, ("left_cube",): 4}
    for names, level in cases.items():
        touch(env, *names)
        assert env._read_level().tolist() == [level] * 2, names


@pytest.mark.parametrize("reward", ["sparse", "document", "progress"])
def test_success_ends_an_episode_and_is_measured_on_the_packages_reward(make, reward):
    env = make(reward=reward)
    paid = 0
    for names in ((), ("left_socket", "right_peg"), (), ("peg_socket",), ("peg_pin",)):
        touch(env, *names)
        _, r, terminated, truncated, info = env.step(torch.zeros(2, 14))
        paid += r
    assert terminated.all() and not truncated.any() and info["_episode"].all() and info["_final_obs"].all()
    episode = info["episode"]
    assert episode["success"].tolist() == [1, 1] and episode["highest_level"].tolist() == [4, 4]
    assert episode["mean_reward"].tolist() == pytest.approx([9 / 5] * 2) and episode["l"].tolist() == [5, 5]
    torch.testing.assert_close(episode["r"], paid)
    assert (env.episode_length == 0).all() and not env.totals.any()


def test_time_limit(make):
    env = make(episode_steps=3)
    for step in range(7):
        obs, _, terminated, truncated, info = env.step(torch.ones(2, 14))
        assert not terminated.any() and truncated.all() == (step in (2, 5))
        moved = info["final_obs"][:, 28:42].abs().max() > 0
        assert moved and torch.equal(obs, info["final_obs"]) != truncated.all()
        if truncated.all():
            assert not obs[:, 28:42].any() and info["episode"]["l"].tolist() == [3, 3]


def test_random_phase(make):
    env = make(64, episode_steps=10)
    env.reset(seed=1, options={"random_phase": True})
    ages = env.episode_length.clone()
    assert len(ages.unique()) > 5
    for step in range(10):
        *_, truncated, info = env.step(torch.zeros(64, 14))
        assert torch.equal(truncated, ages + step + 1 == 10)
        assert (info["episode"]["l"][truncated] == step + 1).all()


@pytest.mark.parametrize("env_backend", ["fast", "gym-aloha"])
@pytest.mark.parametrize("cause", ["action", "state"])
def test_a_simulation_that_diverges_ends_its_own_episode(make, env_backend, cause):
    """Ours and the package's PhysicsError, which with random actions comes every few thousand steps."""
    env, clean = make(3, env_backend=env_backend), make(3)
    action = torch.zeros(3, 14)
    if cause == "action":
        action[1, 3] = math.nan
    else:
        state = env.get_state()
        state["qvel"][1, 16] = 1e12
        env.set_state(torch.tensor([1]), {name: value[1:2] for name, value in state.items()})
    obs, reward, terminated, truncated, info = env.step(action)
    expected = clean.step(torch.zeros(3, 14))
    assert terminated.tolist() == [False, True, False] and not truncated.any()
    assert info["nan_resets"] == 1 and reward[1] == 0 and info["episode"]["success"][1] == 0
    for tensor in (obs, reward, info["final_obs"]):
        assert torch.isfinite(tensor).all()
    assert torch.equal(obs[[0, 2]], expected[0][[0, 2]])
    rest = torch.tensor(START_POSE, dtype=torch.float64)
    assert torch.equal(env.physics.qpos[1, :16], rest)
    for action in actions(5, 3):
        obs, *_, info = env.step(action)
        assert torch.isfinite(obs).all()
    assert info["nan_resets"] == 1


# --- rewards


def discounted(rewards, gamma=0.99) -> float:
    return sum(gamma**t * r for t, r in enumerate(rewards))


def play(env, script):
    """The first world's rewards while its contacts are those of `script`, in a physics that stands still."""
    rewards = []
    for names in script:
        touch(env, *names)
        rewards.append(env.step(torch.zeros(env.num_envs, 14))[1][0].item())
    return rewards


HOLD, INSERT = ("left_socket", "right_peg", "peg_socket"), ("peg_pin",)


def test_the_documents_reward_by_hand(make):
    env = make(reward="document")
    rewards = play(env, [(), ("left_socket", "right_peg"), (), ("left_socket", "right_peg"), HOLD, HOLD, INSERT])
    assert rewards == pytest.approx([0, 0.02 + 0.2, 0, 0.02, 0.03 + 0.1, 0.03, 0.04 + 0.1])


def test_which_reward_makes_insertion_the_best_policy(make):
    """From level 3: hovering there for 100 steps against inserting at once, at the discount .99. The document's reward
    pays 13 times more for hovering; ours pays nothing for it.
    """
    returns = {}
    for reward in ("sparse", "document", "progress"):
        hovering, inserting = make(reward=reward), make(reward=reward)
        play(hovering, [HOLD]), play(inserting, [HOLD])
        returns[reward] = discounted(play(hovering, [HOLD] * 100)), discounted(play(inserting, [INSERT]))
    assert returns["document"] == pytest.approx((1.902, 0.14), abs=1e-3)
    assert returns["sparse"] == (0, 1)
    hover, insert = returns["progress"]
    assert hover < 0 and insert > 1


def test_progress_pays_for_getting_nearer_and_takes_it_back(make):
    """The discounted sum of the shaping depends on where an episode began and ended, not on the way (Ng 1999)."""
    env = make(reward="progress")
    first = env.potential[0].item()
    there_and_back = [("left_socket", "right_peg"), HOLD, (), HOLD, ("left_socket", "right_peg"), ()]
    rewards = play(env, there_and_back)
    assert rewards[0] > 0.05 and rewards[1] > 0.05 and rewards[2] < -0.05
    assert discounted(rewards) == pytest.approx(0.99**6 * env.potential[0].item() - first, abs=1e-6)
    play(env, [HOLD])
    before = env.potential[0].item()
    assert play(env, [INSERT]) == pytest.approx([1 + 0.99 - before], abs=1e-6)


def test_potential_rises_along_the_task(make):
    env = make(1, reward="progress")

    def potential(peg=None, socket=None):
        state = env.get_state()
        for value, column in ((peg, 16), (socket, 23)):
            if value is not None:
                state["qpos"][0, column : column + 3] = value
        env.set_state(torch.tensor([0]), state)
        return env.potential.item()

    left, right = env.physics.sensordata[0, -6:].split(3)
    values = [
        potential(),
        potential(peg=right),
        potential(socket=left),
        potential(peg=left + torch.tensor([0.25, 0, 0])),
        potential(peg=left + torch.tensor([0.12, 0, 0])),
    ]
    assert 0 < values[0] < values[1] < values[2] and values[3] < values[4] < 1


# --- states


@pytest.mark.parametrize("env_backend", ["fast", "gym-aloha"])
def test_state_dict(make, env_backend):
    env, other = make(3, env_backend=env_backend, episode_steps=9), make(3, 7, env_backend=env_backend, episode_steps=9)
    for action in actions(5, 3):
        env.step(action)
    state = env.state_dict()
    expected = [env.step(action) for action in actions(12, 3, seed=1)]
    other.step(actions(1, 3)[0])
    for target in (env, other):
        target.load_state_dict(state)
        for action, before in zip(actions(12, 3, seed=1), expected, strict=True):
            assert same(target.step(action), before)


@needs_gl
def test_state_dict_with_pictures(make):
    config = {"obs_type": "pixels_agent_pos", "frame_stack": 2, "episode_steps": 4}
    env, other = make(**config), make(seed=9, **config)
    env.step(torch.ones(2, 14))
    other.load_state_dict(env.state_dict())
    for action in actions(6, 2):
        a, b = env.step(action), other.step(action)
        assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])


@pytest.mark.parametrize("env_backend", ["fast", "gym-aloha"])
def test_a_state_to_come_back_to(make, env_backend):
    """It goes on from there to the bit, in any world, as an episode that begins."""
    env = make(3, env_backend=env_backend)
    for action in actions(10, 3):
        env.step(action)
    state, following = env.get_state(torch.tensor([1])), []
    for action in actions(5, 3, seed=1):
        env.step(action)
        following.append(env.physics.qpos[1].clone())
    untouched = env.get_state(torch.tensor([0, 1]))
    obs = env.set_state(torch.tensor([2]), state)
    assert obs.shape == (3, 56) and torch.equal(obs[2, 42:], state["qpos"][0, 16:].float())
    assert all(torch.equal(v, untouched[name]) for name, v in env.get_state(torch.tensor([0, 1])).items())
    assert env.episode_length.tolist() == [15, 15, 0] and env.totals[0, 2] == 0
    for action, expected in zip(actions(5, 3, seed=1), following, strict=True):
        env.step(action[[0, 0, 1]])
        assert torch.equal(env.physics.qpos[2], expected)


def test_states_to_start_from(make):
    env = make(3, episode_steps=5)
    for action in actions(4, 3):
        env.step(action)
    bank, asked = env.get_state(), []

    def start(rows):
        asked.append(rows.tolist())
        return {name: value[:1].expand(len(rows), -1) for name, value in bank.items()}

    env.set_state(torch.tensor([1]), env.get_state(torch.tensor([1])))  # one episode is younger
    env.start_states = start
    env.step(torch.zeros(3, 14))
    assert asked == [[0, 2]]
    assert torch.equal(env.physics.qpos[[0, 2]], bank["qpos"][:1].expand(2, -1))
    assert (env.physics.qpos[1] != bank["qpos"][1]).any()
    assert torch.equal(env.target[[0, 2]], bank["target"][:1].expand(2, -1))


def test_seeds(make):
    a, b, c = make(4, seed=3, episode_steps=5), make(4, seed=3, episode_steps=5), make(4, seed=4, episode_steps=5)
    assert torch.equal(a.physics.qpos, b.physics.qpos) and (a.physics.qpos != c.physics.qpos).any()
    c.reset(seed=8), a.reset(seed=8)
    for action in actions(8, 4):
        assert same(a.step(action), c.step(action))


def test_returned_tensors_are_never_overwritten(make):
    env = make(episode_steps=3)
    first = flat(env.step(torch.ones(2, 14)))
    kept = [t.clone() for t in first]
    for action in actions(5, 2):
        env.step(action)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@needs_gl
def test_returned_pictures_are_never_overwritten(make):
    env = make(obs_type="pixels", frame_stack=2, episode_steps=3)
    shown = [env.reset()[0]] + [env.step(action)[0] for action in actions(2, 2)]
    kept = [t.clone() for t in shown]
    for action in actions(5, 2):
        env.step(action)
    assert all(torch.equal(a, b) for a, b in zip(shown, kept, strict=True))


# --- the interface


def test_registration():
    for name, task in TASKS.items():
        env = gym.make_vec(name, num_envs=3, obs_type="state")
        assert env.unwrapped.cfg.task == task and env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        env.reset(seed=1)
        _, reward, terminated, truncated, _ = env.step(torch.zeros(3, 14))
        assert (reward.dtype, terminated.dtype, truncated.dtype) == (torch.float32, torch.bool, torch.bool)
        env.close()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"env_id": "hang"}, "--env-id takes one of AlohaInsertion-v0, AlohaTransferCube-v0, got 'hang'"),
        ({"env_backend": "slow"}, "--env-backend takes one of fast, gym-aloha"),
        (
            {"env_backend": "gym-aloha", "device": "cuda"},
            "--env-backend gym-aloha runs on the CPU, got --backend auto --d",
        ),
        ({"image_height": 0}, "--image-height takes 1 or more, got 0"),
        ({"crop": (0.5, 0, 0.4, 1)}, "--crop takes left, top, right and bottom within 0 and 1"),
        ({"joint_step": 0}, "--joint-step takes a number above 0"),
        ({"reward_gamma": 1.5}, "--reward-gamma takes a number above 0 and at most 1"),
        ({"supersample": 0}, "--supersample takes 1 or more, got 0"),
        ({"samples": 3}, "--samples takes 0 or 4, got 3"),
        ({"size": 3}, "AlohaEnv has no setting size"),
        ({"num_envs": 0}, "--num-envs takes 1 or more"),
    ],
)
def test_mistakes_cost_one_sentence(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        AlohaEnv(**config)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="gym-aloha is missing; install it with: pip install --no-deps gym-aloha"):
        AlohaEnv(obs_type="state")


def test_every_setting_is_documented():
    page = (Path(__file__).parent.parent / "docs" / "aloha.md").read_text()
    for name in AlohaConfig.__dataclass_fields__:
        assert f"`--{name.replace('_', '-')}`" in page, name


@pytest.mark.parametrize(("threads", "expected"), [(0, 3), (2, 2)])
def test_the_ranks_share_the_cores(monkeypatch, threads, expected):
    """Pools of threads that have not a core each spin against each other."""
    found = []

    class Physics(BatchedMujoco):
        def __init__(self, model, num_envs, device, backend, num_threads, **sizes):
            found.append(num_threads)
            super().__init__(model, num_envs, device, backend, 1, **sizes)

    monkeypatch.setattr("common.envs.aloha.BatchedMujoco", Physics)
    monkeypatch.setattr("common.distributed.num_cores", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    AlohaEnv(1, obs_type="state", threads=threads).close()
    assert found == [expected]
