"""Every rule of the pick-and-place environment, on the `mujoco` backend; one test holds `warp` to it."""

import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from common import video
from common.envs import pick
from common.envs.pick import CUBE, INSTRUCTIONS, PickConfig, PickEnv, build_model
from common.envs.pick_eval import evaluate, record_video, report
from common.envs.pick_expert import Expert
from common.panda import Frames

STATE = {"observation": "state"}


@pytest.fixture(autouse=True)
def log_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo leaves a MUJOCO_LOG.TXT behind when a state is not finite


@pytest.fixture
def cameras():
    if video.find_gl() is None:
        pytest.skip(video.missing_gl_message())


def make(num_envs=2, seed=1, **config) -> PickEnv:
    env = PickEnv(num_envs, seed=seed, **({"physics_threads": 1} | STATE | config))
    env.reset()
    return env


def actions(steps, env, seed=0):
    shape = (steps, env.num_envs, env.cfg.chunk, 7)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flat(obs) -> list[torch.Tensor]:
    return list(obs.values()) if isinstance(obs, dict) else [obs]


def rollout(env, actions):
    """Everything that `step` returned, one list of tensors per step."""
    steps = []
    for action in actions:
        obs, *rest, info = env.step(action)
        steps.append([*flat(obs), *rest, *flat(info["final_obs"]), *info["episode"].values(), info["_episode"]])
    return steps


def same(a, b) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def put_cube(env, cube, place):
    """A cube of all worlds at `place` (3,) or (num_envs, 3) m, at rest, without asking the physics."""
    env.physics.qpos[:, 9 + 7 * cube : 12 + 7 * cube] = torch.as_tensor(place).double()
    env.physics.qvel[:, 9 + 6 * cube : 15 + 6 * cube] = 0
    env._read_state()


def play(env, policy):
    """(won, length, put) of the first episode of every world, each (num_envs,)."""
    won, length = torch.zeros(env.num_envs), torch.zeros(env.num_envs)
    put, left = env.put.clone(), torch.ones(env.num_envs, dtype=torch.bool)
    while left.any():
        *_, info = env.step(policy(env))
        new = left & info["_episode"]
        won = torch.where(new, info["episode"]["success"], won)
        length = torch.where(new, info["episode"]["l"].float(), length)
        left = left & ~new
    return won, length, put


# --- the protocol


@pytest.mark.parametrize("config", (STATE, {"chunk": 1, **STATE}, {}), ids=("state", "chunk 1", "images"))
def test_gymnasium(config, cameras):
    env = gym.make_vec("Pick-v0", num_envs=3, physics_threads=1, **config)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    obs, _ = env.reset(seed=1)
    assert env.single_action_space.shape == ((7,) if "chunk" in config else (8, 7))
    for _ in range(2):
        if config:
            assert obs.shape == env.observation_space.shape == (3, pick.STATE_DIM) and obs.dtype == torch.float32
        else:
            shapes = {name: tuple(value.shape) for name, value in obs.items()}
            pictures = {"front": (3, 56, 56, 3), "wrist": (3, 56, 56, 3)}
            assert shapes == pictures | {"state": (3, pick.PROPRIO_DIM), "instruction": (3,)}
            assert {n: str(v.dtype).split(".")[1] for n, v in obs.items()} == {
                n: space.dtype.name for n, space in env.single_observation_space.items()
            }
        assert all(x.float().isfinite().all() for x in flat(obs))
        obs, reward, terminated, truncated, info = env.step(torch.zeros(env.action_space.shape))
    assert reward.shape == (3,) and reward.dtype == torch.float32
    assert terminated.dtype == truncated.dtype == torch.bool and terminated.shape == truncated.shape == (3,)
    assert info["episode"].keys() == {"r", "l", *env.unwrapped.metric_names}
    env.close()


def test_time_limit_and_the_true_last_observation():
    """10 control steps are two and a half chunks: the third stops in its middle, where a twin's chunk of two ends."""
    env, twin = make(3, chunk=4, max_episode_steps=10), make(3, chunk=2)
    drawn = actions(3, env)
    for step, action in enumerate(drawn):
        obs, reward, terminated, truncated, info = env.step(action)
        assert not terminated.any() and bool(truncated.all()) == bool(info["_episode"].all()) == (step == 2)
    for action in drawn.transpose(1, 2).flatten(0, 1)[:10].view(5, 2, 3, 7).transpose(1, 2):
        expected, *_ = twin.step(action)
    assert torch.equal(info["final_obs"], expected) and not torch.equal(obs, expected)
    assert info["episode"]["l"].tolist() == [10, 10, 10]


def test_random_phase():
    env = make(64, max_episode_steps=32)
    env.reset(seed=1, options={"random_phase": True})
    ends = torch.stack([env.step(torch.zeros(64, 8, 7))[3] for _ in range(4)])
    assert (ends.sum(0) == 1).all() and (ends.sum(1) > 5).all()


def test_returned_tensors_and_actions_are_left_alone(cameras):
    env = make(2, max_episode_steps=20, observation="images")
    action = 2 * actions(1, env)[0]
    given = action.clone()
    first = rollout(env, [action])
    kept = [[x.clone() for x in step] for step in first]
    rollout(env, actions(5, env))
    assert same(first, kept) and torch.equal(action, given)


def test_seeds():
    a, b, c = make(4, seed=3), make(4, seed=3), make(4, seed=4)
    played = [rollout(env, actions(3, env)) for env in (a, b, c)]
    assert same(played[0], played[1]) and not same(played[0], played[2])
    a.reset(seed=9), c.reset(seed=9)
    assert same(rollout(a, actions(3, a)), rollout(c, actions(3, c)))


@pytest.mark.parametrize("config", ({"reward": "dense"}, {"observation": "images"}), ids=("state", "images"))
def test_state_dict_goes_on_bit_for_bit(config, cameras):
    env, other = make(4, max_episode_steps=30, **config), make(4, seed=8, max_episode_steps=30, **config)
    env.reset(options={"random_phase": True})
    rollout(env, actions(3, env))
    state = env.state_dict()
    expected = rollout(env, actions(5, env, seed=1))
    for target in (env, other):
        target.load_state_dict(state)
        assert same(rollout(target, actions(5, env, seed=1)), expected)


def test_a_state_that_is_not_finite_is_reset(cameras):
    env, clean = make(3, observation="images"), make(3, observation="images")
    env.physics.qvel[1, 3] = math.nan
    obs, reward, terminated, truncated, info = env.step(torch.zeros(3, 8, 7))
    other, *_ = clean.step(torch.zeros(3, 8, 7))
    assert terminated.tolist() == [False, True, False] and not truncated.any() and info["nan_resets"] == 1
    assert reward[1] == 0 and all(x.float().isfinite().all() for x in (*flat(obs), *flat(info["final_obs"]), reward))
    assert all(torch.equal(x[[0, 2]], y[[0, 2]]) for x, y in zip(flat(obs), flat(other), strict=True))
    assert env.step(torch.zeros(3, 8, 7))[4]["nan_resets"] == 1 and env.tcp.isfinite().all()


def test_an_action_that_is_not_finite_costs_its_own_episode():
    env = make(2)
    action = torch.zeros(2, 8, 7)
    action[0, 3, 2] = math.nan
    _, _, terminated, _, info = env.step(action)
    assert terminated.tolist() == [True, False] and info["episode"]["l"].tolist() == [4, 8]


@pytest.mark.parametrize(
    ("config", "words"),
    (
        ({"difficulty": 1.5}, "--difficulty takes a number from 0 to 1, got 1.5"),
        ({"difficulty": math.nan}, "--difficulty"),
        ({"substeps": 0}, "--substeps takes 1 or more, got 0"),
        ({"chunk": 0}, "--chunk takes 1 or more, got 0"),
        ({"observation": "pixels"}, "--observation takes one of images, state, got 'pixels'"),
        ({"cameras": ("top",)}, "--cameras takes one or more of front, wrist"),
        ({"cameras": ()}, "--cameras"),
        ({"reward": "shaped"}, "--reward takes one of sparse, dense"),
        ({"reward_gamma": 0.0}, "--reward-gamma"),
        ({"backend": "gpu"}, "--backend"),
        ({"colour": 1}, "no setting colour"),
        ({"num_envs": 0}, "--num-envs takes 1 or more, got 0"),
    ),
    ids=str,
)
def test_bad_settings_are_one_sentence(config, words):
    with pytest.raises(ValueError, match=words) as error:
        PickEnv(**config)
    assert "\n" not in str(error.value)


def test_actions_of_another_shape_are_one_sentence():
    env = make(2, chunk=4)
    for shape in ((2, 7), (2, 8, 7), (4, 2, 7)):
        with pytest.raises(ValueError, match=r"the environment's is \(2, 4, 7\)"):
            env.step(torch.zeros(shape))


# --- chunks


def test_a_chunk_is_its_actions_one_after_the_other():
    """Until an episode ends, eight steps of one action are one step of eight, and rewards add up."""
    whole, single = make(4, reward="dense"), make(4, reward="dense", chunk=1)
    for action in actions(3, whole):
        obs, reward, *_ = whole.step(action)
        returned = [single.step(action[:, k]) for k in range(8)]
        assert torch.equal(obs, returned[-1][0])
        torch.testing.assert_close(reward, sum(step[1] for step in returned))


def test_a_world_stops_where_its_episode_ends():
    """Success within a chunk: the rest of its actions moves nothing, and is worth nothing."""
    env, twin = make(2, difficulty=0.0), make(2, difficulty=0.0, chunk=1)
    expert, terminated = Expert(), torch.zeros(2)
    while not terminated[0]:
        action = expert(env)
        action[1] = 0  # the other world does nothing
        for k in range(8):
            *_, terminated, _, info = twin.step(action[:, k])
            if terminated[0]:
                break
        obs, reward, terminated, truncated, last = env.step(action)
    assert 0 < k < 7 and action[0, k + 1 :].any()
    assert terminated.tolist() == [True, False] and reward.tolist() == [1, 0] and not truncated.any()
    assert torch.equal(last["final_obs"][0], info["final_obs"][0])
    assert last["episode"]["l"][0] == info["episode"]["l"][0] == last["episode"]["l"][1] - 7 + k
    assert last["episode"]["r"][0] == 1 and env.episode_length.tolist() == [0, last["episode"]["l"][1]]


def test_pictures_are_drawn_at_the_end_of_a_chunk_only(cameras):
    env = make(3, observation="images", max_episode_steps=16)
    drawn = []
    render = env.renderer.render
    env.renderer.render = lambda qpos, rows=None: drawn.append(rows) or render(qpos, rows)
    env.episode_length[1] = 8  # it ends one step before the others
    obs, *_, info = env.step(torch.zeros(3, 8, 7))
    assert drawn[0] is None and drawn[1].tolist() == [False, True, False] and len(drawn) == 2
    changed = [not torch.equal(obs["front"][i], info["final_obs"]["front"][i]) for i in range(3)]
    assert changed == [False, True, False]
    env.close()


# --- control


def test_the_hand_goes_where_it_is_sent():
    """Ten actions of a half along y and a turn: so many steps, to a millimetre, and the hand stays upright."""
    env = make(2, chunk=10, difficulty=0.0)
    before = env.tcp.clone()
    action = torch.zeros(2, 10, 7)
    action[..., 1], action[..., 5], action[..., 6] = 0.5, 0.3, 1.0
    env.step(action)
    env.step(torch.zeros(2, 10, 7))
    moved = env.tcp - before
    torch.testing.assert_close(moved[:, 1], torch.full((2,), 5 * pick.POSITION_STEP), atol=1e-3, rtol=0)
    assert moved[:, [0, 2]].abs().max() < 2e-3
    torch.testing.assert_close(env.yaw - env.target[:, 3], torch.zeros(2), atol=0.01, rtol=0)
    assert Frames(env.q).rotation[:, 2, 2].max() < -0.9999


def test_the_target_stays_in_its_box_and_near_the_hand():
    env = make(6)
    axis, sign = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1.0, -1, 1, -1, 1, -1])
    action = torch.zeros(6, 8, 7)
    action[torch.arange(6), :, axis] = sign[:, None]
    low, high = torch.tensor(pick.TARGET_LOW), torch.tensor(pick.TARGET_HIGH)
    for _ in range(6):
        env.step(action)
        assert ((env.target[:, :3] >= low) & (env.target[:, :3] <= high)).all()
        assert (env.target[:, :3] - env.tcp).abs().max() < 2 * pick.LEASH
    edge = torch.where(sign > 0, high[axis], low[axis])
    assert (env.tcp[torch.arange(6), axis] - edge).abs().max() < 3e-3


def test_gripper():
    """1 is open, -1 closed, and what lies between is between."""
    env = make(3)
    action = torch.zeros(3, 8, 7)
    action[..., 6] = torch.tensor([1.0, 0.0, -1.0])[:, None]
    for _ in range(2):
        env.step(action)
    torch.testing.assert_close(env.width, torch.tensor([0.08, 0.04, 0.0]), atol=1e-3, rtol=0)


def test_rough_handling():
    """Random full actions over and on the cubes: nothing diverges, nothing leaves the table."""
    env = make(32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(15):
        action = torch.randn(32, 8, 7, generator=generator)
        action[..., 2] -= 0.5
        *_, info = env.step(action)
    assert info["nan_resets"] == 0
    there = env.cube_colour >= 0
    assert env.cubes[..., 2][there].min() > 0.01 and env.cubes[..., 2][there].max() < 0.4


# --- task and reward


def test_the_table_of_instructions():
    assert len(INSTRUCTIONS) == len(set(INSTRUCTIONS)) == 20
    env = make(400)
    assert env.instructions == [INSTRUCTIONS[i] for i in env.instruction]
    assert len(set(env.instructions)) == 20
    names = list(pick.COLOURS)
    for sentence, cubes, pads in zip(env.instructions, env.cube_colour.tolist(), env.pad_colour.tolist(), strict=True):
        expected = f"pick up the {names[cubes[0]]} cube"
        if sentence.startswith("put"):
            expected = f"put the {names[cubes[0]]} cube on the {names[pads[0]]} pad"
        assert sentence == expected
        seen = [colour for colour in cubes if colour >= 0]
        assert len(seen) == len(set(seen)) in (2, 3) and len(set(pads)) == 2


def test_scenes():
    """Nothing overlaps; at difficulty 0 there is one cube near the middle, and half way between every second time."""
    env = make(500)
    there = torch.cat((env.cube_colour >= 0, env.pad_colour >= 0), 1)
    place = torch.cat((env.cubes[..., :2], env.pads), 1)
    apart = torch.cdist(place, place) + torch.eye(5) + (~there[:, None] | ~there[:, :, None])
    assert apart.min() > 0.08 - 1e-5
    assert env.cubes[..., :2][there[:, :3]].sub(torch.tensor([0.5, 0])).abs().amax(0).tolist() == pytest.approx(
        [0.08, 0.16], abs=2e-3
    )
    easy, half = make(500, difficulty=0.0), make(500, difficulty=0.5)
    assert not easy.put.any() and (easy.pad_colour < 0).all() and (easy.cube_colour[:, 1:] < 0).all()
    spread = (easy.cubes[:, 0, :2] - torch.tensor(pick.CENTRE)).abs().amax(0)
    torch.testing.assert_close(spread, torch.tensor(pick.RANGE_EASY), atol=1e-3, rtol=0)
    assert not easy.cube_yaw.any() and env.cube_yaw[:, 0].abs().max() == pytest.approx(math.pi / 4, abs=0.02)
    assert 0.4 < (half.cube_colour[:, 1] >= 0).float().mean() < 0.6


def test_picking_up_succeeds_when_the_right_cube_is_up_in_the_hand():
    env = make(40)
    held = env.tcp + torch.tensor([0.0, 0, 0.005])
    put_cube(env, 0, held)
    assert torch.equal(env.succeeded, ~env.put)
    put_cube(env, 0, held + torch.tensor([0.04, 0, 0]))
    assert not env.succeeded.any()  # up, but not in the hand
    put_cube(env, 0, torch.tensor([0.5, 0.0, CUBE / 2]))
    put_cube(env, 1, held)
    assert not env.succeeded.any() and env.lifts_wrong_cube.all()


@pytest.mark.parametrize(
    ("offset", "width", "succeeds"),
    (
        ((0.0, 0.0, 0.0), 0.08, True),
        ((0.029, -0.029, 0.005), 0.08, True),
        ((0.031, 0.0, 0.0), 0.08, False),
        ((0.0, 0.0, 0.02), 0.08, False),
        ((0.0, 0.0, 0.0), 0.044, False),
    ),
    ids=("in the middle", "at the edge", "beside it", "above it", "not let go"),
)
def test_putting_down_succeeds_when_the_cube_lies_on_its_pad(offset, width, succeeds):
    env = make(40)
    env.physics.qpos[:, 7:9] = width / 2
    place = torch.cat((env.pads[:, 0], torch.full((40, 1), CUBE / 2)), 1)
    put_cube(env, 0, place + torch.tensor(offset))
    assert torch.equal(env.succeeded, env.put & succeeds)
    other = torch.cat((env.pads[:, 1], torch.full((40, 1), CUBE / 2)), 1)
    put_cube(env, 0, other)
    assert not env.succeeded.any()


@pytest.mark.parametrize("gamma", (1.0, 0.9))
def test_dense_reward_adds_up(gamma):
    """Without discount its terms telescope: over an episode it is success plus the last potential minus the first."""
    env = make(16, chunk=1, reward="dense", reward_gamma=gamma)
    first, expert = env.potential.clone(), Expert()
    returns, ended, last = torch.zeros(16), torch.zeros(16, dtype=torch.bool), torch.zeros(16)
    previous, highest = first, first
    for _ in range(128):
        _, reward, terminated, truncated, info = env.step(expert(env))
        now = torch.where(terminated, 1.0, env.potential)
        expected = terminated + gamma * now - previous
        running = ~ended & ~truncated
        torch.testing.assert_close(reward[running], expected[running])
        returns, last = returns + reward * ~ended, torch.where(ended, last, terminated.float())
        ended, previous = ended | terminated | truncated, env.potential.clone()
        highest = torch.maximum(highest, now)
    assert last.sum() >= 15 and (highest <= 1).all() and (first < 0.5).all()
    if gamma == 1:
        torch.testing.assert_close(returns[last > 0], (2 - first)[last > 0], atol=1e-4, rtol=0)


def test_the_potential_rises_along_the_way():
    """At the cube, in the grip, lifted, over the pad, on it: each is worth more than the one before."""
    env = make(60, difficulty=1.0)
    far = env._potential()
    table = env.cubes[:, 0].clone()
    pads = torch.cat((env.pads[:, 0], torch.full((60, 1), CUBE / 2)), 1)
    values = [far]
    for place, width in ((env.tcp, 0.08), (env.tcp, 0.04)):
        env.physics.qpos[:, 7:9] = width / 2
        put_cube(env, 0, torch.cat((place[:, :2], table[:, 2:]), 1))
        env.tcp = env.cubes[:, 0]  # as if the hand had come
        env.grasped = env.width < CUBE + 0.002
        values.append(env._potential())
    env.cubes = env.cubes + torch.tensor([0, 0, 0.06])
    env.tcp = env.cubes[:, 0]
    values.append(env._potential())
    for height in (0.06, 0.0):
        env.cubes = torch.cat(((pads + torch.tensor([0, 0, height]))[:, None], env.cubes[:, 1:]), 1)
        env.tcp = env.cubes[:, 0]
        values.append(torch.where(env.put, env._potential(), values[-1] + 1))
    rises = torch.stack(values).diff(dim=0)
    assert (rises > 0.02).all(), rises.amin(1)


# --- observation


def test_state_observation():
    env = make(50)
    obs = env.step(actions(1, env)[0])[0]
    assert torch.equal(obs[:, :20], env.proprioception())
    assert torch.equal(obs[:, 7:14], env.physics.qvel[:, :7].float()) and torch.equal(obs[:, 14:17], env.tcp)
    assert torch.equal(obs[:, 23:26], env.cubes[:, 0])
    torch.testing.assert_close(obs[:, 28:31], env.cubes[:, 0] - env.tcp)
    third = env.cube_colour[:, 2] >= 0
    assert 0 < third.sum() < 50 and torch.equal(obs[:, 38] > 0, third)
    assert not obs[~third, 34:37].any()
    torch.testing.assert_close(obs[:, 39:41], env.pads[:, 0] - env.cubes[:, 0, :2])
    names = list(pick.COLOURS)
    for sentence, (put, *words) in zip(env.instructions, obs[:, 45:].tolist(), strict=True):
        cube, pad = words[:4], words[4:]
        assert sum(cube) == 1 and sum(pad) == put
        expected = f"the {names[cube.index(1)]} cube" + (f" on the {names[pad.index(1)]} pad" if put else "")
        assert sentence in (f"put {expected}", f"pick up {expected}")


def test_pictures(cameras):
    """Same state, same picture, whichever worlds are drawn with it; they show cubes, pads and hand in their colours."""
    env = make(4, observation="images")
    first, _ = env.reset(seed=2)
    again, _ = env.reset(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(again), strict=True))
    assert all(first[name].float().std() > 20 for name in ("front", "wrist"))
    alone = env._pictures(torch.tensor([False, False, True, False]), first)
    assert all(torch.equal(alone[name], first[name]) for name in alone)
    for name, move in (("front", (0, 0.05)), ("wrist", (9, 0.05)), ("wrist", (6, 0.3))):
        moved = env.physics.qpos.clone()
        env.physics.qpos[0, move[0]] += move[1]
        assert not torch.equal(env._observe()[name][0], first[name][0]), (name, move)
        env.physics.qpos.copy_(moved)
    env.pads[0, 0] += 0.05
    env.paint(env.renderer)
    assert not torch.equal(env._observe()["front"][0], first["front"][0])
    env.close()


def test_a_picture_shows_the_colour_of_the_cube(cameras):
    env = make(24, observation="images", cameras=("wrist",), difficulty=0.0, image_size=40)
    obs, _ = env.reset(seed=3)
    pictures = obs["wrist"].float().flatten(1, 2)
    grey = (pictures.amax(2) - pictures.amin(2)) < 60
    for i, colour in enumerate(env.cube_colour[:, 0]):
        seen = pictures[i][~grey[i]].mean(0)
        palette = torch.tensor(tuple(pick.COLOURS.values()))
        similarity = torch.nn.functional.cosine_similarity(palette, seen[None])
        assert similarity.argmax() == colour
    env.close()


def test_what_is_not_observed_is_not_computed():
    env = make(1)
    assert env.renderer is None and make(1, difficulty=0.0).model.nq == 9 + 7


def test_without_asking_which_episodes_ended(cameras):
    """What a GPU computes: all worlds of everything. Until an episode begins anew it is the same to the bit."""
    asks, does_not = (make(6, observation="images", max_episode_steps=20) for _ in range(2))
    does_not._asks = False
    state = asks.state_dict()
    does_not.load_state_dict(state)
    for action in actions(2, asks):
        asks.step(action), does_not.step(action)
    asks.episode_length[:3] -= 8  # the others end in the middle of this chunk
    does_not.episode_length[:3] -= 8
    action = actions(1, asks, seed=2)[0]
    (obs, *rest, info), (other_obs, *other_rest, other_info) = asks.step(action), does_not.step(action)
    assert rest[2].tolist() == [False] * 3 + [True] * 3
    assert all(torch.equal(a, b) for a, b in zip(rest, other_rest, strict=True))
    for name, value in info["final_obs"].items():
        assert torch.equal(value, other_info["final_obs"][name])
        assert torch.equal(obs[name][:3], other_obs[name][:3])
    assert (does_not.tcp[3:] - does_not.target[3:, :3]).abs().max() < 1e-6 and not does_not.episode_length[3:].any()


# --- the expert


@pytest.mark.parametrize(("difficulty", "chunk"), ((0.0, 8), (1.0, 8), (0.0, 1), (1.0, 1)))
def test_the_expert_succeeds(difficulty, chunk):
    """From fresh starts, in at least 95%, within half of the time limit on average; both kinds of instruction."""
    env = make(128, seed=77, difficulty=difficulty, chunk=chunk)
    expert = Expert()
    won, length, put = play(env, expert)
    assert won.mean() >= 0.95 and length.mean() < 64
    assert won[~put].mean() >= 0.95 and (difficulty == 0 or won[put].mean() >= 0.95)
    assert not env.wrong_cube.any()


def test_the_expert_looks_where_the_cube_is():
    """Pushed about and disturbed by noise it still succeeds: it is a function of the state."""
    env = make(64, seed=5)
    expert, generator = Expert(), torch.Generator().manual_seed(0)
    before = expert(env)
    assert torch.equal(before, expert(env)) and before.abs().max() <= 1

    def policy(env):
        pushed = torch.rand(64, 1, generator=generator) < 0.05
        env.physics.qvel[:, 9:11] += pushed * 0.3 * torch.randn(64, 2, generator=generator).double()
        return expert(env) + 0.3 * torch.randn(64, 8, 7, generator=generator)

    won, _, _ = play(env, policy)
    assert won.mean() >= 0.85


# --- evaluation


def test_evaluation_and_film(cameras, tmp_path, capsys, monkeypatch):
    cfg = PickConfig(difficulty=0.0, max_episode_steps=48, image_size=24)
    still = lambda obs: torch.zeros(len(obs["state"]), 8, 7)  # noqa: E731
    result = evaluate(still, cfg, "cpu", 6, threads=1)
    assert result["episodes"] == 6 == result["pick_episodes"] and "put_rate" not in result
    assert result["success_rate"] == result["grasped_rate"] == 0 and result["mean_length"] == 48
    assert result["success_ci95"][0] == 0 and 0.3 < result["success_ci95"][1] < 0.5
    assert evaluate(still, cfg, "cpu", 6, threads=1) == result
    report(still, cfg, result, tmp_path, "final", save_video=False)
    assert json.loads((tmp_path / "eval" / "final.json").read_text()) == result
    assert "success 0.0% (0.0% to 39.0%) of 6 episodes" in capsys.readouterr().out
    frames = []
    monkeypatch.setattr(video, "write_mp4", lambda path, made, fps: frames.extend(made) or path)
    assert record_video(still, cfg, tmp_path / "film.mp4", episodes=1) == tmp_path / "film.mp4"
    assert len(frames) == 48 and frames[0].shape == (384, 576, 3) and frames[0].dtype == np.uint8
    assert (frames[0][:40, :300] == 255).sum() > 100  # letters


def test_evaluation_counts_successes(monkeypatch):
    """The expert's, through the policy's interface."""
    made = []
    original = PickEnv.reset
    monkeypatch.setattr(PickEnv, "reset", lambda self, **kwargs: made.append(self) or original(self, **kwargs))
    expert = Expert()
    cfg = PickConfig(observation="state")
    result = evaluate(lambda obs: expert(made[-1]), cfg, "cpu", 40, threads=1)
    assert result["success_rate"] >= 0.95 and result["pick_episodes"] + result["put_episodes"] == 40
    assert result["mean_return"] == pytest.approx(result["success_rate"]) and result["mean_length"] < 64


# --- engines


def test_warp_agrees():
    """The same starts; after three control steps in free space the same hands and cubes, to a tenth of a millimetre."""
    pytest.importorskip("mujoco_warp")
    env, warp = make(2, chunk=3, difficulty=0.0), make(2, chunk=3, difficulty=0.0, backend="warp")
    assert warp.physics.backend == "warp"
    action = torch.zeros(2, 3, 7)
    action[..., 0], action[..., 6] = 0.5, 1.0
    env.step(action), warp.step(action)
    torch.testing.assert_close(env.tcp, warp.tcp, atol=1e-4, rtol=0)
    torch.testing.assert_close(env.cubes, warp.cubes, atol=1e-4, rtol=0)


def test_figures_of_the_model():
    model = build_model(PickConfig())
    assert model.opt.timestep == pytest.approx(pick.CONTROL_DT / 5) and model.nq == 9 + 7 * 3
    for i in range(3):
        assert model.body(f"cube{i}").mass[0] == pytest.approx(pick.CUBE_MASS)
        np.testing.assert_allclose(model.body(f"cube{i}").inertia, pick.CUBE_MASS * CUBE**2 / 6)
        np.testing.assert_allclose(model.body(f"cube{i}").ipos, 0)
