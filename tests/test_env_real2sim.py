"""Every rule of the environment of scanned objects, on the `mujoco` backend; tests/test_real2sim_engines.py holds
the others to it."""

import math
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from common import meshes, video
from common.envs import real2sim, real2sim_eval
from common.envs.real2sim import SUCCESS_DISTANCE, TCP, TERMS, Real2SimConfig, Real2SimEnv, damping_ratio, rotate
from common.envs.real2sim_eval import evaluate, play, record_video
from common.meshes import prepare, write_examples
from common.panda import Frames, inverse_kinematics

ROOT = Path(__file__).parents[1]
OPEN, CLOSED = 1.0, -1.0
TWO = ("box", "bottle")  # one convex piece each
RANDOM = dict(mass=(0.5, 2.0), friction=(0.5, 1.5), restitution=(0.0, 0.5), damping=(0.7, 1.3), object_size=(0.9, 1.1))
BLIND = dict(pose_noise=0.002, delay=(0, 3), dropout=0.2)


@pytest.fixture(autouse=True)
def log_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo leaves a MUJOCO_LOG.TXT behind when a state is not finite


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")  # of scans alone: compiled kernels are kept where they always are
        patch.setattr(meshes, "cache_folder", lambda: folder)
        yield


@pytest.fixture
def cameras():
    if video.find_gl() is None:
        pytest.skip(video.missing_gl_message())


def make(num_envs=2, seed=1, **config) -> Real2SimEnv:
    env = Real2SimEnv(num_envs, seed=seed, **({"physics_threads": 1} | config))
    env.reset()
    return env


def actions(steps, num_envs, seed=0):
    return torch.randn(steps, num_envs, 9, generator=torch.Generator().manual_seed(seed))


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


class Expert:
    """Reaches for the object, closes, and carries it to the goal, as one who knows the robot's kinematics."""

    def __init__(self, env):
        self.env, self.step = env, 0
        x = torch.tensor([[1.0, 0, 0]]).expand(env.num_envs, 3)
        now, rest = rotate(env.object_quat, x), rotate(env._rest_quats[env.variant], x)
        self.yaw = torch.atan2(now[:, 1], now[:, 0]) - torch.atan2(rest[:, 1], rest[:, 0])

    def __call__(self) -> torch.Tensor:
        env, t = self.env, self.step
        self.step += 1
        if t < 45:
            return self.go(env.grasp_point + torch.tensor([0, 0, 0.12 if t < 30 else 0.08]), OPEN)
        if t < 80:
            return self.go(env.grasp_point, OPEN)
        return self.go(env.tcp if t < 100 else env.tcp + env.to_goal.clamp(-0.05, 0.05), CLOSED)

    def go(self, position, finger) -> torch.Tensor:
        env, zero = self.env, torch.zeros_like(self.yaw)
        cos, sin = self.yaw.cos(), self.yaw.sin()
        columns = (
            torch.stack((cos, sin, zero), 1),
            torch.stack((sin, -cos, zero), 1),
            torch.stack((zero, zero, zero - 1), 1),
        )
        q = inverse_kinematics(env.q[:, :7], position, torch.stack(columns, 2), TCP, 6)
        joints = (q - env.target[:, :7]) / real2sim.JOINT_STEP
        return torch.cat((joints, torch.full((env.num_envs, 2), finger)), 1)


def put(env, **state):
    """The world as said, without asking the physics: `object` (3,) and `q` (9,)."""
    if "object" in state:
        env.physics.qpos[:, 9:12] = torch.as_tensor(state["object"]).double()
    if "q" in state:
        env.physics.qpos[:, :9] = torch.as_tensor(state["q"]).double()
    env._read_state()


# --- the protocol


@pytest.mark.parametrize(("observation", "width"), (("compact", 25), ("full", 58)))
def test_gymnasium(observation, width):
    env = gym.make_vec("Real2Sim-v0", num_envs=3, observation=observation, objects=TWO)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    obs, _ = env.reset(seed=1)
    assert env.single_action_space.shape == (9,) and env.single_observation_space.shape == (width,)
    assert obs.shape == (3, width) == env.observation_space.shape and obs.dtype == torch.float32
    obs, reward, terminated, truncated, info = env.step(torch.zeros(3, 9))
    assert obs.isfinite().all() and reward.shape == (3,) and reward.dtype == torch.float32
    assert terminated.dtype == truncated.dtype == torch.bool and terminated.shape == truncated.shape == (3,)
    assert info["episode"].keys() == {"r", "l", *env.unwrapped.metric_names}
    assert info["object"].shape == (3,) and set(info["object"].tolist()) <= {0, 1}
    env.close()


def test_what_each_column_is():
    env = make(3, observation="full")
    obs = rollout(env, actions(5, 3))[-1][0]
    frames = Frames(env.physics.qpos[:, :7].float())
    tcp, qpos = frames.point(TCP), env.physics.qpos.float()
    near = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # noqa: E731
    near(obs[:, :3], tcp)
    turned = rotate(obs[:, 3:7], torch.tensor([[0.0, 0, 1]]).expand(3, 3))
    torch.testing.assert_close(turned, frames.rotation[:, :, 2], rtol=0, atol=1e-4)
    near(obs[:, 7:10], qpos[:, 9:12])
    near(obs[:, 10:14], qpos[:, 12:16] * qpos[:, 12:13].sign())
    near(obs[:, 14:17], qpos[:, 9:12] - tcp)  # a box is grasped at its centre
    near(obs[:, 17:20], env.goal - qpos[:, 9:12])
    near(obs[:, 20:23], env.goal)
    near(obs[:, 23], qpos[:, 7:9].sum(1))
    near(obs[:, 24], env.physics.ctrl[:, 7:].sum(1).float())
    near(obs[:, 25:34], qpos[:, :9])
    near(obs[:, 34:43], env.physics.qvel[:, :9].float())
    near(obs[:, 43:52], env.physics.ctrl.float() - qpos[:, :9])
    near(obs[:, 52:58], env.physics.qvel[:, 9:].float())
    compact = make(3)
    near(rollout(compact, actions(5, 3))[-1][0], obs[:, :25])


def test_episodes_end_in_time_and_the_last_observation_is_true():
    env, twin = make(3, max_episode_steps=5), make(3, max_episode_steps=99)
    total = 0.0
    for step, action in enumerate(actions(5, 3)):
        obs, reward, terminated, truncated, info = env.step(action)
        other, *_ = twin.step(action)
        total = total + reward
        assert not terminated.any() and bool(truncated.all()) == bool(info["_episode"].all()) == (step == 4)
    assert torch.equal(info["final_obs"], other) and not torch.equal(obs, other)
    torch.testing.assert_close(info["episode"]["r"], total)
    assert info["episode"]["l"].tolist() == [5, 5, 5]


def test_random_phase():
    env = make(64, max_episode_steps=20)
    env.reset(seed=1, options={"random_phase": True})
    ends = torch.stack([env.step(torch.zeros(64, 9))[3] for _ in range(20)])
    assert (ends.sum(0) == 1).all() and len(ends.sum(1).nonzero()) > 10


def test_returned_tensors_and_actions_are_left_alone():
    env = make(2, max_episode_steps=3, **BLIND)
    action = 2 * actions(1, 2)[0]
    given = action.clone()
    first = rollout(env, [action])
    kept = [[x.clone() for x in step] for step in first]
    rollout(env, actions(6, 2))
    assert same(first, kept) and torch.equal(action, given)


@pytest.mark.parametrize("config", ({}, RANDOM | BLIND | {"objects": TWO}), ids=("plain", "random"))
def test_seeds_and_exact_resume(config):
    a, b, c = (make(4, seed=seed, max_episode_steps=6, **config) for seed in (3, 3, 4))
    played = [rollout(env, actions(8, 4)) for env in (a, b, c)]
    assert same(played[0], played[1]) and not same(played[0], played[2])
    state = a.state_dict()
    expected = rollout(a, actions(9, 4, seed=1))
    for target in (a, c):
        target.load_state_dict(state)
        assert same(rollout(target, actions(9, 4, seed=1)), expected)


def test_a_state_that_is_not_finite_is_reset():
    env, clean = make(3), make(3)
    env.physics.qvel[1, 3] = math.nan
    obs, reward, terminated, truncated, info = env.step(torch.zeros(3, 9))
    other, *_ = clean.step(torch.zeros(3, 9))
    assert terminated.tolist() == [False, True, False] and not truncated.any() and info["nan_resets"] == 1
    assert reward[1] == 0 and all(x.isfinite().all() for x in (obs, info["final_obs"], reward))
    assert torch.equal(obs[[0, 2]], other[[0, 2]])
    action = torch.zeros(3, 9)
    action[0, 2] = math.nan
    assert env.step(action)[2].tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("config", "words"),
    (
        ({"goal_height": (0.3, 0.1)}, "--goal-height takes two rising numbers from 0 to 0.5"),
        ({"mass": (0.0, 1.0)}, "--mass takes two rising numbers"),
        ({"observation": "pixels"}, "--observation takes one of compact, full, rgb, got 'pixels'"),
        ({"objects": ()}, "--objects takes one object or more"),
        ({"objects": ("teapot",)}, "--objects got 'teapot'; it takes STL, OBJ or PLY files"),
        ({"objects": ("bunny",), "object_size": (3.0, 3.0)}, "bunny is .* cm high as it stands"),
        ({"objects": ("box",), "object_size": (2.4, 2.4)}, "box is 9.6 cm wide where the hand would grasp it"),
        ({"dropout": 1.0}, "--dropout takes a number from 0 to 0.99"),
        ({"reward_file": "notes.txt"}, "--reward-file takes a Python file, which ends in .py, got notes.txt"),
        ({"reward_file": "missing.py"}, "--reward-file missing.py gives no function `reward`: FileNotFoundError"),
        ({"backend": "gpu"}, "--backend"),
        ({"colour_of_tea": 1}, "no setting colour_of_tea"),
        ({"num_envs": 0}, "--num-envs takes 1 or more, got 0"),
    ),
    ids=str,
)
def test_bad_settings_are_one_sentence(config, words):
    with pytest.raises(ValueError, match=words) as error:
        Real2SimEnv(**config)
    assert "\n" not in str(error.value)


# --- the task can be done


@pytest.mark.parametrize("objects", (("box",), ("bottle",), ("bunny",)), ids=str)
def test_pick_and_place_is_possible(objects):
    env = make(16, seed=3, objects=objects)
    expert = Expert(env)
    for _ in range(200):
        _, reward, _, _, info = env.step(expert())
    rate = info["episode"]["success"].mean()
    # The round bunny slips out of a hand that does not look where to grasp it.
    assert rate > 0.7 if objects == ("bunny",) else rate == 1
    assert reward[info["episode"]["success"] == 1].min() > 0.9  # near the most there is, 1


def test_placing_is_possible_and_pays_more_than_holding():
    """Carried over, set down, let go: success begins once the hand is away, and no step on the way there pays less."""
    env = make(16, seed=3, task="place")
    assert (env.to_goal[:, :2].norm(dim=1) > real2sim.PLACE_DISTANCE - 1e-4).all()
    assert (env.to_goal[:, 2].abs() < 1e-6).all()
    expert = Expert(env)
    rewards = []
    up = torch.tensor([0.0, 0.0, 0.08])
    for t in range(200):
        target = env.goal - env.object
        if t >= 100:
            high = up * (t < 150)
            action = expert.go(env.tcp + (target + high).clamp(-0.04, 0.04), CLOSED if t < 165 else OPEN)
            if t >= 175:
                action = expert.go(env.tcp + up / 4, OPEN)
        else:
            action = expert()
        _, reward, _, _, info = env.step(action)
        rewards.append(reward)
        if t == 163:  # in its place and still in the hand
            in_hand = (env.goal_distance < SUCCESS_DISTANCE) & env.held
            assert in_hand.float().mean() > 0.8 and not env.at_goal.any()
    won = info["episode"]["success"] == 1
    assert won.float().mean() > 0.9 and info["episode"]["lifted"].mean() > 0.9
    assert (rewards[-1][won] > rewards[163][won] + 0.1).all() and rewards[-1][won].min() > 0.9
    discounts = 0.9 ** torch.arange(35.0)[:, None]  # as PPO's
    let_go = (discounts * torch.stack(rewards[165:])).sum(0)
    held_on = discounts.sum() * rewards[163]
    assert (let_go[won] > 1.2 * held_on[won]).all()


def test_terms_of_placing_by_hand():
    env = make(1, task="place")
    put(env, object=env.goal[0])
    env.physics.qvel[:] = 0
    env._read_state()
    far = env.to_object.norm(dim=1).item()
    assert far > real2sim.AWAY and env.at_goal.all() and env._terms()[:, 0].tolist() == pytest.approx([1, 1, 1, 1, 1])
    env.physics.qvel[:, 9] = 0.06  # still sliding
    env._read_state()
    assert not env.at_goal.any()
    for opening, told, pays in ((0.0, -1.0, 0.25), (0.0, 1.0, 0.5), (0.04, 0.0, 0.625), (0.04, 1.0, 0.75)):
        env.target[:, 7:] = opening
        env.action[:, 7:] = told
        assert env._terms()[4].item() == pytest.approx(pays)
    for tilt, share in ((math.pi / 8, 0.5), (math.pi / 3, 0.0)):
        env.object_quat[:] = torch.tensor([math.cos(tilt / 2), math.sin(tilt / 2), 0, 0])
        assert env._terms()[4].item() == pytest.approx(0.75 * share, abs=1e-5)
    env.physics.qvel[:] = 0
    env.goal[:] = env.object + torch.tensor([[0.05, 0.0, 0.0]])
    env._read_state()
    assert not env.at_goal.any() and env._terms()[1:, 0].tolist() == [0, 0, 0, 0]


def test_hovering_pays_less_than_success():
    """The most that can be had without being at the goal is what all terms but two weights give."""
    best_without = sum(TERMS.values()) - TERMS["success"] - TERMS["place"] * math.tanh(5 * SUCCESS_DISTANCE)
    least_with = TERMS["success"] + TERMS["place"] * (1 - math.tanh(5 * SUCCESS_DISTANCE))
    assert best_without < 0.7 and sum(TERMS.values()) == pytest.approx(1)
    held_at_goal = TERMS["grasp"] + TERMS["lift"] + least_with
    assert held_at_goal > best_without + 0.1


def test_a_table_holds_no_fingers():
    """Fingers pressed onto the table close as freely as in the air: else they would pass for a grasp."""
    env = make(2)
    put(env, object=(0.7, 0.3, 0.03))
    expert = Expert(env)
    for step in range(90):
        env.step(expert.go(torch.tensor([[0.45, 0.0, -0.02]]).expand(2, 3), OPEN if step < 60 else CLOSED))
        assert not env.held.any()
    assert env.tcp[:, 2].max() < 0.03 and env.q[:, 7:].max() < 0.005


# --- actions


def test_targets_move_by_the_action_and_stay_in_their_limits():
    env = make(1)
    before = env.target.clone()
    action = torch.tensor([[0.5, -1, 3, 0, 0, 0, -0.25, -1, -0.5]])
    env.step(action)
    moved = torch.tensor([[0.02, -0.04, 0.04, 0, 0, 0, -0.01, -0.004, -0.002]])
    torch.testing.assert_close(env.target, before + moved)
    for _ in range(150):
        env.step(torch.ones(1, 9))
        assert (env.target <= env._upper).all() and (env.target - env.q).abs().max() < env.cfg.lead + 0.2
    assert env.target[0, 7:].tolist() == pytest.approx([0.04, 0.04])


# --- rewards


def test_terms_by_hand():
    env = make(1)
    height = env.rest_height[0].item()
    put(env, object=env.tcp[0] + torch.tensor([0.1, 0.0, 0.0]))
    terms = dict(zip(TERMS, env._terms()[:, 0].tolist(), strict=True))
    down = -env.hand_rotation[0, 2, 2].item()
    assert terms["reach"] == pytest.approx((1 - math.tanh(0.5)) * down, abs=1e-5)
    assert terms["grasp"] == terms["lift"] == terms["place"] == terms["success"] == 0
    put(env, object=env.tcp[0])
    assert env._terms()[1].item() == 0  # near but open
    q = env.q[0].clone()
    q[7:] = 0.02
    env.target[:, 7:] = 0.0  # told to close and stopped half way: 20 N
    put(env, q=q, object=env.tcp[0])
    env.goal[:] = env.object + torch.tensor([[0.0, 0.0, 0.06]])
    env._read_state()
    terms = dict(zip(TERMS, env._terms()[:, 0].tolist(), strict=True))
    lift = min(1.0, (env.object[0, 2].item() - height) / 0.05)
    assert env.held.all() and terms["grasp"] == 1 and terms["lift"] == pytest.approx(lift)
    assert terms["place"] == pytest.approx(1 - math.tanh(0.3), abs=1e-5) and terms["success"] == 0
    env.goal[:] = env.object + torch.tensor([[0.0, 0.0, 0.024]])
    env._read_state()
    assert env._terms()[4].item() == 1
    expected = sum(w * t for w, t in zip(TERMS.values(), env._terms()[:, 0].tolist(), strict=True))
    assert env.reward(env._terms()).item() == pytest.approx(expected)


def test_an_object_that_falls_ends_the_episode_unless_that_would_pay():
    for reward, ends in (("dense", True), ("sparse", False)):
        env = make(2, reward=reward)
        env.physics.qpos[0, 9] = 0.95
        _, rewards, terminated, _, info = env.step(torch.zeros(2, 9))
        assert terminated.tolist() == [ends, False] and info["episode"]["fallen"].tolist() == [1, 0]
        if reward == "sparse":
            assert rewards.tolist() == [-1, -1]
            put(env, object=env.goal[1])
            assert env.reward(env._terms())[1] == 1


def test_a_reward_file_takes_tensors_by_name(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def reward(tcp, goal, held):\n    return -(goal - tcp).norm(dim=1) + held.float()\n"
    )
    env = make(3, reward_file=str(tmp_path / "mine.py"))
    _, reward, *_ = env.step(torch.zeros(3, 9))
    torch.testing.assert_close(reward, -(env.goal - env.tcp).norm(dim=1))
    (tmp_path / "mine.py").write_text("def reward(weather):\n    return weather\n")
    with pytest.raises(ValueError, match="asks for weather; there are action, tcp"):
        make(reward_file=str(tmp_path / "mine.py"))
    (tmp_path / "mine.py").write_text("def reward(tcp):\n    return tcp\n")
    with pytest.raises(ValueError, match=r"gave shape \(2, 3\), not \(2,\)"):
        make(reward_file=str(tmp_path / "mine.py"))


def test_a_subclass_of_three_lines():
    class High(Real2SimEnv):
        def reward(self, terms):
            return self.object[:, 2]

        def observe(self, mask=None, old=None):
            return torch.cat((super().observe(mask, old), self.q), 1)

    env = High(2, physics_threads=1)
    obs, _ = env.reset()
    assert obs.shape == (2, 34) == env.observation_space.shape
    torch.testing.assert_close(env.step(torch.zeros(2, 9))[1], torch.full((2,), 0.03), atol=1e-3, rtol=0)


# --- objects


def test_worlds_of_several_objects_are_those_of_each_alone():
    """The same state and the same actions: every world moves as in an environment of its object alone."""
    env = make(8, objects=("box", "bunny"), object_yaw=3.0)
    assert 0 < env.variant.sum() < 8
    for index, name in enumerate(("box", "bunny")):
        alone = make(8, objects=(name, name))  # two of the same: a mesh, laid out as in a mixture
        alone.variant[:] = index
        alone.load_state_dict(alone.state_dict() | {"goal": env.goal, "target": env.target})
        alone.physics.reset(alone._everyone, env.physics.qpos, env.physics.qvel)
        alone._read_state()
        mixed = env if index == 1 else make(8, objects=("box", "bunny"), object_yaw=3.0)
        drop = torch.tensor([0, 0, 0.03])
        for world in (mixed, alone):
            world.physics.qpos[:, 9:12] += drop.double()
            world._read_state()
        rows = mixed.variant == index
        for action in actions(12, 8):
            mixed.step(action), alone.step(action)
        torch.testing.assert_close(mixed.physics.qpos[rows], alone.physics.qpos[rows], rtol=0, atol=1e-3)


def test_objects_rest_where_they_are_put():
    env = make(16, objects=("box", "bunny", "bottle"), object_yaw=3.0)
    before = env.object.clone()
    for _ in range(25):
        env.step(torch.zeros(16, 9))
    assert (env.object - before).norm(dim=1).max() < 2e-3


def test_mass_and_inertia_are_the_mesh_s():
    env = make(1, objects=("bunny",), density=500.0)
    found, body = prepare("bunny"), env.model.body("object")
    assert body.mass[0] == pytest.approx(500 * found.volume)
    assert sorted(body.inertia) == pytest.approx(sorted(np.linalg.eigvalsh(500 * found.inertia)), rel=1e-5)


def test_scans_on_the_command_line(tmp_path):
    paths = {path.name: path for path in write_examples(tmp_path / "scans")}
    script = str(ROOT / "common" / "envs" / "real2sim.py")
    run = lambda *a: subprocess.run([sys.executable, script, *a], capture_output=True, text=True, cwd=tmp_path)  # noqa: E731
    shown = run("inspect", str(paths["box_points.ply"]))
    assert shown.returncode == 0, shown.stderr
    assert "point cloud of 20000 points" in shown.stdout and (tmp_path / "box_points_hulls.png").exists()
    wrong = run("inspect", "nothing.stl")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "cannot read nothing.stl" in wrong.stderr


# --- domain randomisation


def field(env, name):
    return env.physics.fields[name]


def test_ranges_are_kept_and_reach_the_physics():
    env = make(64, **RANDOM)
    plain = make(1)
    mass = field(env, "body_mass")[:, env._body] / plain.model.body("object").mass[0]
    sizes = np.array([model.geom("object0").size[0] for model in env.variants.models])[env.variant] / 0.02
    scale = mass.numpy() / sizes**3
    assert 0.5 <= scale.min() < 0.8 and 1.5 < scale.max() <= 2.0
    assert 0.9 - 1e-6 <= sizes.min() < 0.93 and 1.07 < sizes.max() <= 1.1 + 1e-6
    inverse = field(env, "body_invweight0")[:, env._body, 0] * field(env, "body_mass")[:, env._body]
    torch.testing.assert_close(inverse, inverse[:1].expand(64), rtol=1e-6, atol=0)
    friction = field(env, "pair_friction")[:, env._pairs, 0] / torch.as_tensor(plain.model.pair_friction[-4:, 0])
    assert 0.5 <= friction.min() < 0.7 and 1.3 < friction.max() <= 1.5
    torch.testing.assert_close(friction, friction[:, :1].expand(-1, 4))
    ratio = field(env, "pair_solref")[:, env._pairs[0], 1]
    assert damping_ratio(torch.tensor([0.5])).item() - 1e-6 <= ratio.min() and ratio.max() <= 1
    kv = field(env, "actuator_biasprm")[:, 0, 2] / plain.model.actuator("joint1").biasprm[2]
    assert 0.7 <= kv.min() < 0.8 and 1.2 < kv.max() <= 1.3


def dropped(steps=30, **config):
    """Heights (steps, worlds) of objects let go 5 cm above the table."""
    env = make(4, seed=2, **config)
    put(env, object=torch.tensor([0.55, 0.3, 0.08]))
    heights = []
    for _ in range(steps):
        env.step(torch.zeros(4, 9))
        heights.append(env.object[:, 2])
    return torch.stack(heights)


@pytest.mark.parametrize("objects", (("box",), TWO), ids=str)
def test_what_is_heavy_falls_no_faster(objects):
    light, heavy = (dropped(4, mass=(factor, factor), objects=objects) for factor in (0.5, 5.0))
    torch.testing.assert_close(light, heavy, rtol=0, atol=1e-6)
    assert (light[0] - light[-1]).min() > 0.02


def test_restitution_makes_it_bounce():
    dull, lively = dropped(), dropped(restitution=(0.8, 0.8))
    rise = lambda h: (h[12:].max(0).values - 0.03).max()  # noqa: E731
    assert rise(dull) < 2e-3 < 0.01 < rise(lively)


def test_friction_makes_it_stop():
    travelled = []
    for factor in (0.2, 2.0):
        env = make(1, friction=(factor, factor))
        put(env, object=(0.5, 0.3, 0.03))
        env.physics.qvel[:, 9] = 0.8
        start = env.object[0, 0].item()
        for _ in range(25):
            env.step(torch.zeros(1, 9))
        travelled.append(env.object[0, 0].item() - start)
    assert travelled[0] > 1.8 * travelled[1] > 0


def test_mass_and_damping_change_what_the_arm_does():
    moved = {}
    for name, config in {"usual": {}, "damped": {"damping": (1.8, 1.8)}, "heavy": {"mass": (15.0, 15.0)}}.items():
        env = make(4, seed=3, **config)
        env.load_state_dict(env.state_dict() | {"goal": torch.tensor([[0.5, 0.0, 0.2]]).expand(4, 3)})
        expert = Expert(env)
        for _ in range(110):
            env.step(expert())
        moved[name] = env.q.clone()
    assert (moved["damped"] - moved["usual"]).abs().max() > 1e-3
    assert (moved["heavy"] - moved["usual"]).abs().max() > 1e-3


def test_shapes_are_stretched():
    sizes = np.array([model.geom("object0").size for model in make(1, object_stretch=0.2).variants.models])
    ratio = sizes / (0.02, 0.02, 0.03)
    assert len(sizes) == real2sim.build.__globals__["VARIANTS"] and ratio.min() >= 0.8 and ratio.max() <= 1.2
    assert np.ptp(ratio, axis=1).min() > 0.01  # no two sides by the same factor


def test_noise_delay_and_dropout_are_in_the_observation_alone():
    env = make(256, pose_noise=0.005)
    obs, *_ = env.step(torch.zeros(256, 9))
    error = obs[:, 7:10] - env.object
    assert error.std().item() == pytest.approx(0.005, rel=0.15) and error.mean().abs() < 1e-3
    torch.testing.assert_close(obs[:, 17:20], env.goal - obs[:, 7:10])
    late, prompt = make(1, delay=(3, 3)), make(1)
    seen, true = [], []
    for world, column in ((late, seen), (prompt, true)):
        world.reset(seed=5)
        world.physics.qvel[:, 9] = 0.5
        for _ in range(10):
            column.append(world.step(torch.zeros(1, 9))[0][0, 7:14])
    torch.testing.assert_close(torch.stack(seen[3:]), torch.stack(true[:-3]))
    blinking = make(64, dropout=0.5)
    blinking.physics.qvel[:, 9] = 0.5
    first = blinking.step(torch.zeros(64, 9))[0]
    fresh = (first[:, 7:10] == blinking.object).all(1).float().mean()
    assert 0.3 < fresh < 0.7


# --- pictures


def test_pictures_show_the_world(cameras):
    env = make(4, observation="rgb", image_size=32, objects=TWO, max_episode_steps=4)
    obs, _ = env.reset(seed=3)
    assert obs["rgb"].shape == (4, 32, 32, 3) and obs["rgb"].dtype == torch.uint8 and obs["proprio"].shape == (4, 39)
    assert env.single_observation_space["rgb"].shape == (32, 32, 3)
    for _ in range(3):
        obs, *_ = env.step(torch.ones(4, 9))
    last, *_, info = env.step(torch.ones(4, 9))
    assert info["_episode"].all() and not torch.equal(info["final_obs"]["rgb"], last["rgb"])
    full = make(4, observation="full", objects=TWO)
    full.load_state_dict(env.state_dict())
    columns = full.observe()[:, [*range(7), *range(20, 52)]]
    torch.testing.assert_close(last["proprio"], columns)
    moved = env.observe()["rgb"].clone()
    env.physics.qpos[:, 9:12] = torch.tensor([0.5, 0.0, 0.1]).double()
    env._read_state()
    assert (env.observe()["rgb"] != moved).flatten(1).any(1).all()


def test_lamps_colours_and_cameras_vary(cameras):
    usual = make(3, observation="rgb", image_size=32)
    for config in ({"light": (0.4, 1.6)}, {"colour": 0.3}, {"camera": 0.1}):
        env = make(3, observation="rgb", image_size=32, **config)
        for world in (usual, env):
            world.physics.qpos[:] = usual.physics.qpos[:1]
            world.goal[:] = torch.tensor([0.5, 0.1, 0.2])
            world._read_state()
        base, varied = usual.observe()["rgb"], env.observe()["rgb"].float()
        assert torch.equal(base[0], base[1])
        assert (varied[0] - varied[1]).abs().mean() > 1 and (varied[1] - varied[2]).abs().mean() > 1
        assert torch.equal(env.observe()["rgb"].float(), varied)


# --- evaluation


def test_evaluation_counts_whole_episodes_of_each_object(monkeypatch):
    cfg = Real2SimConfig(objects=TWO, held_out=("bunny",), max_episode_steps=6)
    monkeypatch.setattr(real2sim_eval, "plain", lambda cfg: cfg)
    still = lambda obs: torch.zeros(len(obs), 9)  # noqa: E731
    result = evaluate(still, cfg, "cpu", 10)
    assert result["episodes"] == 10 and result["success_rate"] == 0 and result["success_ci95"][1] < 0.3
    assert result["mean_length"] == 6 and result["objects"].keys() == set(TWO)
    assert sum(found["episodes"] for found in result["objects"].values()) == 10
    assert result["held_out"]["objects"].keys() == {"bunny"}
    assert result["held_out"]["objects"]["bunny"]["episodes"] == 10
    columns = play(still, cfg, "cpu", 10, seed=3)
    assert all(len(column) == 10 for column in columns.values()) and set(columns["object"].tolist()) == {0, 1}
    assert evaluate(still, cfg, "cpu", 10) == result


def test_a_film_is_written(cameras, tmp_path):
    path = record_video(
        lambda obs: torch.zeros(len(obs), 9), Real2SimConfig(max_episode_steps=6), tmp_path / "x.mp4", episodes=2
    )
    assert path is not None and (tmp_path / "x.mp4").stat().st_size > 1000


# --- the pipeline's phases


def test_pipeline_sets_up_and_steps_an_engine(tmp_path):
    run = lambda *a: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "benchmark.real2sim_pipeline", *a], capture_output=True, text=True, cwd=ROOT
    )
    done = run("6", "box", "bottle", "--engines", "mujoco", "--num-envs", "4", "--out", str(tmp_path))
    assert done.returncode == 0 and "control steps/s in 4 worlds" in done.stdout, done.stderr
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["bottle_hulls.png", "box_hulls.png"]
    wrong = run("6", "nothing.stl")
    assert wrong.returncode == 2 and "cannot read nothing.stl" in wrong.stderr
    assert run("5").returncode == 2
