"""The adapter for Gymnasium, Isaac Lab and mjlab: Gymnasium against hand-stepped environments, the simulators against
doubles with their habits (tests/isaac_doubles.py), and the order in which Isaac Lab is launched.
"""

import io
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from isaac_doubles import DirectDouble, FactoryDouble, ManagerDouble, MjlabDouble

from common.envs.gym_loop import GymnasiumEnv
from common.envs.isaac import MJLAB_INSTALL, IsaacEnv, check_launcher_args, check_task, make_env

ROOT = Path(__file__).resolve().parent.parent
INF = float("inf")


@pytest.fixture(autouse=True)
def log_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo leaves a MUJOCO_LOG.TXT behind when a state is not finite


def actions_of(env, count, seed=0):
    env.action_space.seed(seed)
    return [torch.as_tensor(env.action_space.sample()) for _ in range(count)]


def equal(a, b):
    """Whether two results of `step` are equal to the last bit."""
    same = all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    return same and all(
        torch.equal(x, y)
        for x, y in (
            (a[4]["final_obs"], b[4]["final_obs"]),
            (a[4]["episode"]["r"], b[4]["episode"]["r"]),
            (a[4]["episode"]["l"], b[4]["episode"]["l"]),
        )
    )


class Diverging(gym.Env):
    """Observes `counter`; at step 2 an observation is NaN, at step 4 a reward is infinite."""

    observation_space, action_space = gym.spaces.Box(-INF, INF, (1,)), gym.spaces.Discrete(2, start=5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start = getattr(self, "start", 0) + 1
        self.counter, self.actions = 0, []
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.counter += 1
        self.actions.append(action)
        obs = np.full(1, math.nan if self.counter == 2 and self.start == 1 else self.counter, np.float32)
        reward = INF if self.counter == 4 and self.start == 2 else 1.0
        return obs, reward, False, False, {}


class Odd(gym.Env):
    """Any pair of spaces."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space


BOX = gym.spaces.Box(-1, 1, (2,))
gym.register("Diverging-v0", Diverging)
gym.register("OddAction-v0", Odd, kwargs={"observation_space": BOX, "action_space": gym.spaces.MultiBinary(2)})
gym.register("OddInteger-v0", Odd, kwargs={"observation_space": BOX, "action_space": gym.spaces.Box(0, 3, (1,), int)})
gym.register(
    "OddImage-v0",
    Odd,
    kwargs={
        "observation_space": gym.spaces.Dict(x=BOX, image=gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)),
        "action_space": BOX,
    },
)
gym.register("OddSequence-v0", Odd, kwargs={"observation_space": gym.spaces.Sequence(BOX), "action_space": BOX})


# --- Gymnasium


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "HalfCheetah-v4", "CartPole-v1", "Pendulum-v1"])
def test_gymnasium_equals_environments_stepped_by_hand(env_id):
    env = make_env(env_id, 2, "cpu", 7)
    reference = [gym.make(env_id) for _ in range(2)]
    obs, _ = env.reset()
    hand = np.stack([e.reset(seed=7 + i)[0] for i, e in enumerate(reference)])
    assert torch.equal(obs, torch.from_numpy(hand).float())
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP and obs.dtype == torch.float32
    returns, lengths, ended = np.zeros(2), np.zeros(2, int), 0
    for action in actions_of(env, 210):
        obs, reward, terminated, truncated, info = env.step(action)
        assert reward.dtype == torch.float32 and terminated.dtype == truncated.dtype == torch.bool
        for i, e in enumerate(reference):
            a = action[i].item() if action.dim() == 1 else action[i].numpy()
            o, r, fallen, limit, _ = e.step(a)
            returns[i], lengths[i] = returns[i] + r, lengths[i] + 1
            assert reward[i] == np.float32(r)
            assert (bool(terminated[i]), bool(truncated[i])) == (fallen, limit)
            assert bool(info["_final_obs"][i]) == bool(info["_episode"][i]) == (fallen or limit)
            if fallen or limit:
                assert torch.equal(info["final_obs"][i], torch.from_numpy(o).float())
                assert info["episode"]["l"][i] == lengths[i]
                assert info["episode"]["r"][i].item() == pytest.approx(returns[i], rel=1e-6)
                o, _ = e.reset()
                returns[i], lengths[i], ended = 0.0, 0, ended + 1
            assert torch.equal(obs[i], torch.from_numpy(o).float())
    assert ended > 0 or env_id.startswith("HalfCheetah")  # whose episodes have 1000 steps


def balance(obs):
    """A policy that keeps CartPole up."""
    return (obs[:, 2] * 3 + obs[:, 3] + 0.1 * obs[:, 0] + 0.2 * obs[:, 1] > 0).long()


def test_time_limit_is_truncation_and_a_fall_is_termination():
    env = make_env("CartPole-v1", 2)
    obs, _ = env.reset()
    for t in range(500):
        action = balance(obs)
        if t < 100:
            action[1] = 0  # falls
        obs, _, terminated, truncated, info = env.step(action)
        if t == 499:
            assert truncated.tolist()[0] and not terminated[0] and info["episode"]["l"][0] == 500
            assert info["episode"]["r"][0] == 500
        else:
            assert not terminated[0] and not truncated[0]
        if terminated[1] and t < 100:
            assert info["episode"]["l"][1] < 15 and not truncated[1]
    env = make_env("Pendulum-v1", 1)
    env.reset()
    ends = [env.step(torch.zeros(1, 1))[2:4] for _ in range(200)]
    assert [bool(limit) for _, limit in ends] == [False] * 199 + [True]
    assert not any(bool(fallen) for fallen, _ in ends)


def test_who_falls_at_the_time_limit_has_fallen():
    env = make_env("CartPole-v1", 1, max_episode_steps=9)
    lengths = set()
    for seed in range(40):
        env.reset(seed=seed)
        for _ in range(9):
            _, _, terminated, truncated, info = env.step(torch.zeros(1, dtype=torch.long))
            if terminated or truncated:
                lengths.add((int(info["episode"]["l"]), bool(terminated), bool(truncated)))
                break
    assert (9, True, False) in lengths and (9, False, True) in lengths and (9, True, True) not in lengths


def test_seeds_differ_by_environment_and_repeat():
    a, b = (make_env("HalfCheetah-v5", 3, seed=3) for _ in range(2))
    first, _ = a.reset()
    assert torch.equal(first, b.reset()[0]) and not torch.equal(first[0], first[1])
    again, _ = a.reset()
    assert not torch.equal(again, first), "without a seed the generators go on"
    assert torch.equal(a.reset(seed=3)[0], first)
    assert torch.equal(a.reset(seed=4)[0][0], first[1]), "environment i gets seed + i"


def test_actions_are_clipped_without_touching_the_callers():
    a, b = (make_env("Pendulum-v1", 2) for _ in range(2))
    a.reset(), b.reset()
    wild = torch.tensor([[100.0], [-0.5]])
    result = a.step(wild)
    assert wild.tolist() == [[100.0], [-0.5]]
    assert equal(result, b.step(torch.tensor([[2.0], [-0.5]])))


def test_results_are_never_overwritten():
    for env in (make_env("CartPole-v1", 2, history=2), IsaacEnv(DirectDouble(limit=2), history=2)):
        env.reset()
        action = torch.zeros(env.action_space.shape, dtype=torch.long)
        kept = [env.step(action)[:4] for _ in range(3)]
        info = env.step(action)[4]
        kept.append((info["final_obs"], info["episode"]["r"], info["episode"]["l"], info["_episode"]))
        copies = [[tensor.clone() for tensor in result] for result in kept]
        for _ in range(20):
            env.step(action)
        assert all(torch.equal(x, y) for a, b in zip(kept, copies, strict=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "env_id, settings",
    [("HalfCheetah-v5", {"max_episode_steps": 40}), ("CartPole-v1", {}), ("Pendulum-v1", {"max_episode_steps": 40})]
    + [("Humanoid-v5", {})],
)
def test_resume_is_exact_through_the_next_reset(env_id, settings):
    env, before = make_env(env_id, 2, seed=1, history=2, **settings), 30
    env.reset()
    actions = actions_of(env, before + 20)
    for action in actions[:before]:
        env.step(action)
    assert env.exact_resume
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    file.seek(0)
    resumed = make_env(env_id, 2, seed=99, history=2, **settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    ended = 0
    for action in actions[before:]:
        expected = env.step(action)
        ended += int(expected[4]["_episode"].sum())
        assert equal(expected, resumed.step(action))
    assert ended > 0


def test_resume_is_not_promised_where_the_state_cannot_be_read():
    class Opaque(Diverging):
        def __init__(self):
            self.world = object()

    gym.register("Opaque-v0", Opaque)
    assert not GymnasiumEnv("Opaque-v0", 1).exact_resume
    assert GymnasiumEnv("CartPoleMultiDiscrete-v0", 1).exact_resume
    assert not IsaacEnv(DirectDouble()).exact_resume and IsaacEnv(DirectDouble()).state_dict() == {}


def test_history_is_stacked_newest_last():
    env, plain = make_env("CartPole-v1", 2, history=3), make_env("CartPole-v1", 2)
    stacked, frame = env.reset()[0], plain.reset()[0]
    assert env.policy_dim == env.critic_dim == 12 and stacked.shape == (2, 12)
    frames = [[frame[i]] * 3 for i in range(2)]
    ended = 0
    for action in actions_of(env, 60):
        stacked, _, _, _, info = env.step(action)
        frame, _, _, _, plain_info = plain.step(action)
        for i in range(2):
            frames[i] = [*frames[i][1:], plain_info["final_obs"][i] if info["_final_obs"][i] else frame[i]]
            if info["_final_obs"][i]:
                assert torch.equal(info["final_obs"][i], torch.cat(frames[i]))
                frames[i], ended = [frame[i]] * 3, ended + 1
            assert torch.equal(stacked[i], torch.cat(frames[i]))
    assert ended > 0


@pytest.mark.filterwarnings("ignore:overflow")
def test_non_finite_numbers_never_reach_the_learner():
    env = make_env("Diverging-v0", 1)
    env.reset()
    results = [env.step(torch.zeros(1, dtype=torch.long)) for _ in range(6)]
    assert all(torch.isfinite(t).all() for r in results for t in (r[0], r[1], r[4]["final_obs"], r[4]["episode"]["r"]))
    assert [bool(r[2]) for r in results] == [False, True, False, False, False, True]
    assert [float(r[1]) for r in results] == [1, 0, 1, 1, 1, 0]
    assert results[1][4]["final_obs"].tolist() == [[0.0]] and results[1][0].tolist() == [[0.0]]
    assert results[-1][4]["nan_resets"] == env.nan_resets == 2 and results[0][4]["nan_resets"] == 0
    huge = make_env("Diverging-v0", 1)
    huge.reset()
    huge.envs[0].unwrapped.counter = 1e25  # whose square is no float32
    assert not huge.step(torch.zeros(1, dtype=torch.long))[2] and huge.nan_resets == 0


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Pendulum-v1"])
def test_nan_actions_end_the_episode(env_id):
    env = make_env(env_id, 2)
    env.reset()
    action = torch.zeros(env.action_space.shape)
    action[1] = math.nan
    obs, reward, terminated, _, info = env.step(action)
    assert terminated.tolist() == [False, True] and torch.isfinite(obs).all() and reward[1] == 0
    assert torch.isfinite(info["final_obs"]).all() and info["nan_resets"] == 1
    assert torch.isfinite(env.step(torch.zeros(env.action_space.shape))[0]).all()


def test_discrete_actions_start_where_the_space_does():
    env = make_env("Diverging-v0", 2)
    env.reset()
    env.step(torch.tensor([0, 1]))
    assert [e.unwrapped.actions for e in env.envs] == [[5], [6]]


def test_multi_discrete_steers_two_carts():
    env = make_env("CartPoleMultiDiscrete-v0", 2)
    obs, _ = env.reset()
    assert obs.shape == (2, 8) and env.single_action_space == gym.spaces.MultiDiscrete([2, 2])
    pushed = env.step(torch.tensor([[0, 1], [1, 1]]))[0]
    assert torch.equal((pushed[:, [1, 5]] - obs[:, [1, 5]]) > 0, torch.tensor([[False, True], [True, True]]))
    cart = gym.make("CartPole-v1").unwrapped
    cart.reset()
    cart.state = env.envs[0].unwrapped.states[1].copy()
    env_obs = env.step(torch.tensor([[1, 0], [1, 1]]))[0]
    assert torch.equal(env_obs[0, 4:], torch.from_numpy(cart.step(0)[0]))
    obs, _ = env.reset()
    for t in range(500):
        action = torch.stack((balance(obs[:, :4]), balance(obs[:, 4:])), 1)
        if t < 20:
            action[1] = torch.tensor([0, int(action[1, 1])])  # one cart falls, and with it the pair
        obs, _, terminated, truncated, info = env.step(action)
        if t < 20 and terminated[1]:
            fell = int(info["episode"]["l"][1])
    assert fell < 15 and truncated[0] and info["episode"]["r"][0] == 500


def test_masked_cartpole_hides_the_velocities():
    env, whole = make_env("CartPoleMasked-v0", 1), make_env("CartPole-v1", 1)
    assert torch.equal(env.reset()[0], whole.reset()[0][:, [0, 2]])
    for action in actions_of(env, 50):
        a, b = env.step(action), whole.step(action)
        assert torch.equal(a[0], b[0][:, [0, 2]]) and torch.equal(a[4]["final_obs"], b[4]["final_obs"][:, [0, 2]])
    assert gym.spec("CartPoleMasked-v0").reward_threshold == 475 and env.single_observation_space.shape == (2,)


def test_observations_are_flattened():
    env = make_env("Blackjack-v1", 3)
    obs, _ = env.reset()
    assert obs.shape == (3, env.policy_dim) and torch.equal(obs.sum(1), torch.full((3,), 3.0))  # three one-hot parts


@pytest.mark.parametrize(
    "env_id, words",
    [
        ("HalfCheetah-v55", "nearest is HalfCheetah-v5"),
        ("nonsense", "the nearest is"),
        ("module_that_is_not_here:Env-v0", "module_that_is_not_here"),
        ("OddAction-v0", "MultiBinary"),
        ("OddInteger-v0", "Box of floats"),
        ("OddImage-v0", "no CNN"),
        ("OddSequence-v0", "no vector of numbers"),
        ("Isaac-Cartpole-Direct-v0", "install it as https://isaac-sim.github.io"),
        ("Mjlab-Cartpole-Balance", ".venv-mjlab/bin/pip install -r requirements-mjlab.txt"),
    ],
)
def test_mistakes_are_told_in_one_sentence(env_id, words, monkeypatch):
    for module in ("isaaclab", "isaaclab.app", "mjlab", "mjlab.tasks"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=".") as error:
        make_env(env_id, 1)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_nothing_on_the_way_to_a_simulator_needs_mujoco(tmp_path):
    program = """if True:
        import sys
        sys.modules["mujoco"] = None  # so that importing it fails
        import torch
        from common.envs import gym_loop, isaac, isaac_eval
        import common.video
        env = isaac.make_env("CartPole-v1", 2)
        env.reset()
        env.load_state_dict(env.state_dict())
        assert env.step(torch.zeros(2, dtype=torch.long))[0].shape == (2, 4) and env.exact_resume
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_dependency_keeps_gymnasiums_own_hint(monkeypatch):
    def maker(**kwargs):
        raise gym.error.DependencyNotInstalled("Box2D is not installed,\n run `pip install gymnasium[box2d]`")

    gym.register("Needy-v0", maker)
    with pytest.raises(ValueError, match=r"Needy-v0: Box2D is not installed, run `pip install gymnasium\[box2d\]`$"):
        make_env("Needy-v0", 1)
    with pytest.raises(ValueError, match="cannot be made: .*unexpected keyword argument 'colour'"):
        make_env("CartPole-v1", 1, colour="red")


def test_frames_are_drawn_only_on_request():
    assert make_env("CartPole-v1", 1).render_frame() is None
    assert make_env("CartPole-v1", 1).metadata["render_fps"] == 50
    double = DirectDouble()
    assert IsaacEnv(double).render_frame() is None
    double.render_mode, double.render = "rgb_array", lambda: np.zeros((4, 6, 3), np.uint8)
    assert IsaacEnv(double).render_frame().shape == (4, 6, 3)


# --- the simulators' habits

SIMULATORS = [
    lambda **kw: DirectDouble(**kw),
    lambda **kw: DirectDouble(final_obs=True, **kw),
    lambda **kw: ManagerDouble(**kw),
    lambda **kw: MjlabDouble(**kw),
]
each_simulator = pytest.mark.parametrize("make", SIMULATORS, ids=["direct", "final_obs", "manager", "mjlab"])
ACTION = torch.tensor([[0.5], [0.5], [0.5]])


@each_simulator
def test_terminal_observation_is_the_true_last_one(make):
    env = IsaacEnv(make(limit=5, falls={1: 2}))
    assert env.reset()[0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 2, 0]]
    for t in range(1, 7):
        obs, reward, terminated, truncated, info = env.step(ACTION)
        clock = [t if t < 5 else t - 5, t % 2 if t != 5 else 1, t if t < 5 else t - 5]
        last = [0.5 * (c > 0) for c in clock]
        assert obs.tolist() == [[clock[i], i, last[i]] for i in range(3)]
        assert terminated.tolist() == [False, t in (2, 4, 6), False]
        assert truncated.tolist() == [t == 5, False, t == 5]
        assert torch.equal(info["_final_obs"], terminated | truncated)
        if t in (2, 4, 6):
            assert info["final_obs"][1].tolist() == [2, 1, 0.5]
        if t == 5:
            assert info["final_obs"][[0, 2]].tolist() == [[5, 0, 0.5], [5, 2, 0.5]]
            assert info["episode"]["r"][0] == 15 and info["episode"]["l"].tolist()[0] == 5
    assert reward.dtype == torch.float32 and obs.dtype == torch.float32


def test_without_final_observations_the_one_before_stands_in():
    env = IsaacEnv(DirectDouble(limit=3), compute_final_obs=False)
    env.reset()
    for _ in range(3):
        info = env.step(ACTION)[4]
    assert info["final_obs"].tolist() == [[2, i, 0.5] for i in range(3)]


@each_simulator
def test_buffers_changed_in_place_are_copied(make):
    sim = make(limit=2)
    env = IsaacEnv(sim)
    env.reset()
    env.step(ACTION)
    obs, reward, terminated, truncated, _ = env.step(ACTION)
    for buffer in (sim.reward_buf, sim.reset_terminated, sim.reset_time_outs, sim.clock):
        buffer.fill_(1)
    assert reward.tolist() == [2, 2, 2] and truncated.all() and not terminated.any() and (obs[:, 0] == 0).all()


@each_simulator
def test_log_is_forwarded_only_when_written(make):
    sim = make(limit=3)
    env = IsaacEnv(sim)
    env.reset()
    env.step(ACTION)  # drops what the reset wrote
    logs = [env.step(ACTION)[4]["log"] for _ in range(6)]
    assert [bool(log) for log in logs] == [False, True, False, False, True, False]
    assert logs[1].keys() == {"Episode_Reward/track"}, "scalars only"
    assert float(logs[1]["Episode_Reward/track"]) == 3


def test_log_that_a_task_adds_to_in_place_stays_usable():
    sim = DirectDouble(limit=9)
    env = IsaacEnv(sim)
    env.reset()
    sim.extras["log"]["distance"] = torch.tensor([1.5])
    assert float(env.step(ACTION)[4]["log"]["distance"]) == 1.5
    sim.extras["log"]["distance"] = 2.5  # KeyError if the adapter had removed the dict
    assert env.step(ACTION)[4]["log"] == {"distance": 2.5}


def test_factory_reports_its_time_limit_twice():
    env = IsaacEnv(FactoryDouble(limit=3), "Isaac-Factory-PegInsert-Direct-v0")
    env.reset(options={"random_phase": True})
    ends = [env.step(ACTION)[2:4] for _ in range(3)]
    assert ends[-1][1].all() and not any(fallen.any() for fallen, _ in ends)


def test_a_fall_at_the_time_limit_is_a_fall():
    env = IsaacEnv(DirectDouble(limit=3, falls={0: 3}))
    env.reset()
    for _ in range(3):
        _, _, terminated, truncated, _ = env.step(ACTION)
    assert terminated.tolist() == [True, False, False] and truncated.tolist() == [False, True, True]


def test_finite_horizon_ends_at_the_limit():
    sim = DirectDouble(limit=1)
    sim.cfg.is_finite_horizon = True
    env = IsaacEnv(sim)
    env.reset()
    _, _, terminated, truncated, _ = env.step(ACTION)
    assert terminated.all() and not truncated.any()


@pytest.mark.parametrize("name", ["Isaac-Ant-v0", "Isaac-Factory-GearMesh-Direct-v0", "IsaacContrib-Forge-NutThread"])
def test_random_phase_except_where_all_must_end_together(name):
    ages, lengths = [], []
    for _ in range(2):
        sim = DirectDouble(num_envs=50, limit=40)
        env = IsaacEnv(sim, name, seed=3)
        env.reset(options={"random_phase": True})
        ages.append(sim.episode_length_buf.clone())
        for t in range(1, 41):
            info = env.step(torch.zeros(50, 1))[4]
            lengths += info["episode"]["l"][info["_episode"]].tolist()
            assert (info["episode"]["l"][info["_episode"]] <= t).all()
    assert torch.equal(ages[0], ages[1]), "the same seed gives the same phases"
    if "Ant" in name:
        assert len(ages[0].unique()) > 10 and ages[0].max() < 40 and min(lengths) < 20
    else:
        assert ages[0].sum() == 0 and set(lengths) == {40}


def test_asymmetric_critic_reads_the_end_of_the_observation():
    for sim in (DirectDouble(limit=3, critic=True), MjlabDouble(limit=3, critic=True)):
        env = IsaacEnv(sim, history=2)
        obs, _ = env.reset()
        assert (env.policy_dim, env.critic_dim, obs.shape[1]) == (6, 2, 8) == (*(6, 2), env.observation_space.shape[1])
        for _ in range(3):
            obs, _, _, _, info = env.step(ACTION)
        assert obs[2, : env.policy_dim].tolist() == [0, 2, 0, 0, 2, 0]
        assert info["final_obs"][2].tolist() == [2, 2, 0.5, 3, 2, 0.5, 30, 2]
        assert obs[2, -env.critic_dim :].tolist() == [0, 2]
    symmetric = IsaacEnv(DirectDouble(), history=2)
    assert symmetric.policy_dim == symmetric.critic_dim == symmetric.reset()[0].shape[1] == 6


def test_manager_with_a_history_of_its_own():
    env, reference = IsaacEnv(ManagerDouble(length=2, limit=4, falls={1: 3})), ManagerDouble(length=2, limit=99)
    env.reset(), reference.reset()
    for t in range(1, 5):
        obs, _, _, _, info = env.step(ACTION)
        whole = reference.step(ACTION)[0]["policy"]
        if t == 3:
            assert torch.equal(info["final_obs"][1], whole[1])
            assert torch.equal(obs[[0, 2]], whole[[0, 2]]), "looking must not push a frame into the others' history"
            assert obs[1].tolist() == [0, 1, 0] * 2
        if t == 4:
            assert torch.equal(info["final_obs"][[0, 2]], whole[[0, 2]])
            assert obs[1].tolist() == [0, 1, 0, 1, 1, 0.5]


def test_observation_noise_of_direct_tasks_is_in_the_last_observation():
    sim = DirectDouble(limit=2)
    sim.cfg.observation_noise_model, sim._observation_noise_model = True, lambda obs: obs + 100
    env = IsaacEnv(sim)
    env.reset()
    env.step(ACTION)
    assert env.step(ACTION)[4]["final_obs"][:, 0].tolist() == [102] * 3


@each_simulator
def test_non_finite_states_are_reset(make):
    sim = make(limit=9)
    env = IsaacEnv(sim, history=2)
    env.reset()
    sim.poison = {1: math.nan}
    obs, reward, terminated, truncated, info = env.step(ACTION)
    assert terminated.tolist() == [False, True, False] and not truncated.any() and sim.resets[-1] == [1]
    assert reward.tolist() == [1, 0, 1] and info["nan_resets"] == env.nan_resets == 1
    assert torch.isfinite(obs).all() and torch.isfinite(info["final_obs"]).all() and info["episode"]["r"][1] == 0
    assert obs[1].tolist() == [0, 1, 0] * 2 and obs[0].tolist() == [0, 0, 0, 1, 0, 0.5]
    sim.poison = {}
    obs, reward, terminated, _, info = env.step(ACTION)
    assert not terminated.any() and obs[:, 3].tolist() == [2, 1, 2] and info["episode"]["l"].tolist() == [2, 1, 2]


@each_simulator
def test_nan_actions_reach_no_simulator(make):
    sim = make(limit=9)
    env = IsaacEnv(sim, clip_actions=1.0)
    env.reset()
    action = torch.tensor([[math.nan], [7.0], [-INF]])
    _, _, terminated, _, _ = env.step(action)
    assert terminated.tolist() == [True, False, True] and env.nan_resets == 2
    assert sim.received.tolist() == [[0], [1], [0]] and action[1] == 7


def test_actions_are_clipped_only_on_request():
    sim = DirectDouble()
    env = IsaacEnv(sim)
    env.reset()
    env.step(ACTION * 20)
    assert sim.received.tolist() == [[10]] * 3


def test_discrete_and_multi_discrete_actions_of_a_simulator():
    sim = DirectDouble(action_space=gym.spaces.Discrete(4))
    env = IsaacEnv(sim)
    env.reset()
    env.step(torch.tensor([0, 1, 3]))
    assert sim.received.tolist() == [[0], [1], [3]] and sim.received.dtype == torch.int64
    sim = DirectDouble(action_space=gym.spaces.MultiDiscrete([2, 3]))
    env = IsaacEnv(sim)
    env.reset()
    env.step(torch.tensor([[0, 1], [1, 2], [1, 0]]))
    assert sim.received.tolist() == [[0, 1], [1, 2], [1, 0]]


def test_mjlab_spaces_become_gymnasiums():
    env = IsaacEnv(MjlabDouble())
    assert env.single_action_space == gym.spaces.Box(-INF, INF, (1,)) and env.policy_dim == 3


def test_terms_that_are_not_concatenated_and_images():
    class Terms(DirectDouble):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            box = gym.spaces.Box(-INF, INF, (3,))
            self.single_observation_space = gym.spaces.Dict(policy=gym.spaces.Dict(a=box, b=box))

        def _get_observations(self):
            policy = super()._get_observations()["policy"]
            return {"policy": {"a": policy, "b": -policy}}

    env = IsaacEnv(Terms())
    assert env.reset()[0][2].tolist() == [0, 2, 0, 0, -2, 0]
    camera = DirectDouble()
    camera.single_observation_space["policy"] = gym.spaces.Box(0, 1, (64, 64, 3))
    with pytest.raises(ValueError, match="no CNN"):
        IsaacEnv(camera, "Isaac-Cartpole-RGB")
    camera.single_observation_space = gym.spaces.Dict(student=BOX)
    with pytest.raises(ValueError, match="no policy group"):
        IsaacEnv(camera)
    camera.possible_agents = ["left", "right"]
    with pytest.raises(ValueError, match="several agents"):
        IsaacEnv(camera)


def test_seed_is_passed_on_and_close_closes_in_order():
    sim, order = DirectDouble(), []
    sim.close = lambda: order.append("env")
    env = IsaacEnv(sim, on_close=lambda: order.append("app"))
    env.reset(seed=5)
    env.reset()
    env.close()
    env.close()
    assert sim.seeds == [5, None] and order == ["env", "app"]


# --- launching Isaac Lab and mjlab: packages that write down what is done to them

COMMON = {
    "isaaclab/__init__.py": "events = []",
    "isaaclab_tasks/__init__.py": """
        import gymnasium as gym
        from isaaclab import events
        from isaac_doubles import DirectDouble
        events.append("tasks imported")

        def make(cfg, render_mode=None):
            import sys
            events.append(("made", cfg, render_mode, sys.argv[1:]))
            env = DirectDouble(num_envs=cfg.scene.num_envs)
            env.cfg, env.close, env.render_mode = cfg, lambda: events.append("env closed"), render_mode
            return env

        for name in ("Isaac-Cartpole-v0", "Isaac-Ant-v0"):
            gym.register(name, make, disable_env_checker=True, order_enforce=False)
    """,
    "isaaclab_tasks/utils/__init__.py": "",
    "isaaclab_tasks/utils/parse_cfg.py": """
        from types import SimpleNamespace as Space

        def load_cfg_from_registry(task, key):
            assert key == "env_cfg_entry_point"
            sim = Space(device="cuda:0", physics={"default": "physx", "newton_mjwarp": "newton"})
            return Space(sim=sim, scene=Space(num_envs=4096), seed=None, is_finite_horizon=False, **FIELDS)
    """,
}
ADD_ARGS = """
        def add_launcher_args(parser):
            parser.add_argument("--device", default="cuda:0")
            parser.add_argument("--headless", action="store_true")
            parser.add_argument("--enable_cameras", action="store_true")
            parser.add_argument("--kit_args", default="")
"""
LAUNCH = """
        import contextlib
        from isaaclab import events
        @contextlib.contextmanager
        def launch_simulation(cfg, args):
            events.append(("launched", cfg.sim.physics, args.headless, args.device))
            yield
            events.append("app closed")
"""
HYDRA = """
        def collect_presets(cfg):
            return {"sim.physics": cfg.sim.physics} if isinstance(cfg.sim.physics, dict) else {}

        def resolve_presets(cfg, selected):
            names = [name for name in selected if name in cfg.sim.physics] or ["default"]
            cfg.sim.physics = cfg.sim.physics[names[0]]
            return cfg
"""
NEWER = {"isaaclab/app.py": LAUNCH + ADD_ARGS, "isaaclab_tasks/utils/hydra.py": HYDRA}
NEWER["isaaclab/envs/utils/video_recorder_cfg.py"] = "class VideoRecorderCfg: output_dir = None"
BETA = {
    "isaaclab/app.py": "class AppLauncher: pass",
    "isaaclab_tasks/utils/sim_launcher.py": LAUNCH + ADD_ARGS,
    "isaaclab_tasks/utils/hydra.py": HYDRA,
}
OLD = {
    "isaaclab/app.py": """
        from types import SimpleNamespace
        from isaaclab import events
"""
    + ADD_ARGS
    + """
        class AppLauncher:
            add_app_launcher_args = staticmethod(add_launcher_args)

            def __init__(self, args):
                events.append(("launched", args.headless, args.device, args.enable_cameras))
                self.app = SimpleNamespace(close=lambda: events.append("app closed"))
"""
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Writes packages and gives their list of events; all traces of them go afterwards."""
    modules, registered = set(sys.modules), set(gym.registry)

    def write(files, fields=""):
        for name, text in (COMMON | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text).replace("**FIELDS", fields))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["ppo.py", "--env-id", "Isaac-Cartpole-v0"])
        import isaaclab

        return isaaclab.events

    yield write
    for name in set(sys.modules) - modules:
        if name.startswith(("isaaclab", "mjlab")):
            del sys.modules[name]
    for name in set(gym.registry) - registered:
        del gym.registry[name]


@pytest.mark.parametrize("version", [NEWER, BETA], ids=["3.0", "3.0-beta"])
def test_isaac_lab_3_resolves_the_preset_before_it_launches(install, version):
    events = install(version, "compute_final_obs=False")
    env = make_env("Isaac-Cartpole-v0", 6, "cpu", 11, launcher_args=("--headless",))
    assert events[:2] == ["tasks imported", ("launched", "newton", True, "cpu")]
    made, cfg, render_mode, argv = events[2]
    assert made == "made" and (cfg.sim.device, cfg.scene.num_envs, cfg.seed) == ("cpu", 6, 11)
    assert cfg.compute_final_obs and render_mode is None and argv == []
    assert sys.argv[1:] == ["--env-id", "Isaac-Cartpole-v0"], "our own flags are back"
    assert env.num_envs == 6 and env.reset()[0].shape == (6, 3)
    env.close()
    assert events[3:] == ["env closed", "app closed"]


def test_isaac_lab_2_launches_before_tasks_are_imported(install):
    events = install(OLD)
    env = make_env("Isaac-Cartpole-v0", 2, "cuda", 11, launcher_args=("--headless",))
    assert events[:2] == [("launched", True, "cuda:0", False), "tasks imported"]
    _, cfg, _, _ = events[2]
    assert cfg.sim.device == "cuda:0" and cfg.sim.physics["default"] == "physx" and cfg.seed == 11
    env.close()
    assert events[3:] == ["env closed", "app closed"]


def test_video_of_both_generations(install, tmp_path):
    events = install(OLD)
    env = make_env("Isaac-Cartpole-v0", 2, video_dir=str(tmp_path / "videos"))
    assert events[0] == ("launched", False, "cpu", True), "cameras are enabled before Kit starts"
    assert events[2][2] == "rgb_array" and isinstance(env.env, gym.wrappers.RecordVideo)


def test_video_of_isaac_lab_3(install):
    (_, cfg, render_mode, _) = _recorded(install(NEWER, "video_recorders=[]"))
    assert cfg.video_recorders[0].output_dir == "videos" and render_mode is None


def test_a_package_that_the_task_misses_costs_one_sentence(install):
    recorder = "def VideoRecorderCfg():\n    raise ImportError('moviepy is required.\\nInstall it')"
    install(NEWER | {"isaaclab/envs/utils/video_recorder_cfg.py": recorder}, "video_recorders=[]")
    with pytest.raises(ValueError, match="^--env-id Isaac-Cartpole-v0 lacks a package: moviepy is required. Install"):
        make_env("Isaac-Cartpole-v0", 2, video_dir="videos")
    assert sys.argv[1:] == ["--env-id", "Isaac-Cartpole-v0"]


UNREACHABLE = ["FileNotFoundError('Unable to find the file:\\n https://server/Robots/cart.usd')"]
UNREACHABLE += ["RuntimeError(\"Unable to copy file: 'https://server/Robots/cart.usd'\")"]


@pytest.mark.parametrize("error", UNREACHABLE)
@pytest.mark.parametrize("version", [NEWER, OLD], ids=["3.0", "2.3"])
def test_a_robot_that_cannot_be_fetched_costs_one_sentence(install, version, error):
    install(version | _failing(error))
    with pytest.raises(ValueError, match="^--env-id Isaac-Cartpole-v0 needs a file") as caught:
        make_env("Isaac-Cartpole-v0", 2)
    sentence = str(caught.value)
    assert "https://server/Robots/cart.usd" in sentence and "'Robots without a network'" in sentence
    assert "\n" not in sentence and "\n### Robots without a network\n" in (ROOT / "docs" / "isaac.md").read_text()


def test_other_failures_of_a_simulator_are_not_taken_for_a_missing_robot(install):
    install(NEWER | _failing("RuntimeError('out of memory')"))
    with pytest.raises(RuntimeError, match="out of memory"):
        make_env("Isaac-Cartpole-v0", 2)


def _failing(error):
    """The packages, with tasks that end in `error` when they are made."""
    text = COMMON["isaaclab_tasks/__init__.py"]
    return {"isaaclab_tasks/__init__.py": text.replace("import sys", f"raise {error}")}


@pytest.mark.parametrize("version", [NEWER, BETA, OLD], ids=["3.0", "3.0-beta", "2.3"])
def test_a_task_of_several_agents_is_refused_before_it_exists(install, version):
    events = install(version, "possible_agents=['cart', 'pole']")
    with pytest.raises(ValueError, match="^--env-id Isaac-Cartpole-v0 is a task of several agents; this script trains"):
        make_env("Isaac-Cartpole-v0", 2)
    assert not any(event[0] == "made" for event in events)
    if version is not OLD:  # where nothing is known before Kit runs
        assert events == ["tasks imported"]
        with pytest.raises(ValueError, match="several agents"):
            check_task("Isaac-Cartpole-v0")


OURS = ("num_envs", "env_id", "save_video", "learning_rate")


@pytest.mark.parametrize("env_id", ["Mjlab-Cartpole-Balance", "CartPole-v1"])
@pytest.mark.parametrize("words", [("--num-env", "16"), ("--num_env=16",), ("--num-env",)])
def test_a_mistyped_flag_is_refused_where_there_is_no_launcher(env_id, words):
    flag = words[0].partition("=")[0]
    with pytest.raises(ValueError, match=f"^{flag} is unknown; the nearest flag is --num-envs, and --help lists"):
        check_launcher_args(env_id, words, OURS)


@pytest.mark.parametrize("version", [NEWER, BETA, OLD], ids=["3.0", "3.0-beta", "2.3"])
def test_flags_are_the_scripts_the_launchers_or_refused(install, version):
    events = install(version)
    check_launcher_args("Isaac-Cartpole-v0", ["--headless", "--device=cpu"], OURS)
    check_launcher_args("Isaac-Cartpole-v0", ["--kit_args", "--enable omni.kit", "--headless"], OURS)
    for word, nearest in (
        ("--num-env", "--num-envs"),
        ("--headles", "--headless"),
        ("--learning-rat", "--learning-rate"),
    ):
        with pytest.raises(ValueError, match=f"^{word} is unknown to .* launcher; the nearest flag is {nearest}, and"):
            check_launcher_args("IsaacContrib-Cartpole-v0", ["--headless", word, "3"], OURS)
    with pytest.raises(ValueError, match="^--quux is unknown to this script and to Isaac Lab's launcher; --help lists"):
        check_launcher_args("Isaac-Cartpole-v0", ["--quux"], OURS)
    assert not any(event[0] == "launched" for event in events)


def test_the_sentence_for_a_missing_mjlab_is_what_the_page_says():
    page = (ROOT / "docs" / "isaac.md").read_text()
    assert all(command in page for command in MJLAB_INSTALL.split(" && "))


def _recorded(events):
    make_env("Isaac-Cartpole-v0", 2, video_dir="videos")
    return next(event for event in events if event[0] == "made")


@pytest.mark.parametrize(
    "version, settings, words",
    [
        (NEWER, {"env_id": "Isaac-Cartpol-v0"}, "nearest is Isaac-Cartpole-v0"),
        (NEWER, {"physics": "bullet"}, "--physics bullet is no preset of Isaac-Cartpole-v0, which has newton_mjwarp"),
        (NEWER, {"launcher_args": ("--num-env", "3")}, "--num-env 3"),
        (OLD, {"env_id": "Isaac-Cartpol-v0"}, "nearest is Isaac-Cartpole-v0"),
    ],
)
def test_mistakes_with_isaac_lab(install, version, settings, words):
    events = install(version)
    with pytest.raises(ValueError, match=".") as error:
        make_env(**({"env_id": "Isaac-Cartpole-v0", "num_envs": 2} | settings))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert "app closed" not in events, "closing Kit ends the process before the sentence is read"


IMAGES = [
    ("observation_space=[3, 96, 96]", "observes images of shape (3, 96, 96)"),
    ("observation_space={'policy': {'camera': [96, 96, 3]}}", "observes images of shape (96, 96, 3)"),
    ("observations=Space(policy=Space(seen=Space(func='isaaclab.envs.mdp:image_rgb')))", "images in its group policy"),
]


@pytest.mark.parametrize("fields, words", IMAGES)
@pytest.mark.parametrize("version", [NEWER, BETA], ids=["3.0", "3.0-beta"])
def test_images_are_refused_before_a_simulator_starts(install, version, fields, words):
    events = install(version, fields)
    for refuse in (lambda: check_task("Isaac-Cartpole-v0"), lambda: make_env("Isaac-Cartpole-v0", 2)):
        with pytest.raises(ValueError, match=".") as error:
            refuse()
        assert words in str(error.value) and "\n" not in str(error.value)
    assert events == ["tasks imported"]


@pytest.mark.parametrize(
    "fields",
    ["", "observation_space=4", "observation_space=[{2}, {3}]", "observations=Space(policy=Space(s=Space(func=len)))"],
)
def test_a_task_that_will_do_is_not_refused(install, fields):
    events = install(NEWER, fields)
    check_task("Isaac-Cartpole-v0")
    assert events == ["tasks imported"]


def test_isaac_lab_2_is_not_asked_about_its_tasks_before_it_runs(install):
    events = install(OLD)
    check_task("Isaac-Cartpol-v0")
    assert events == []


@pytest.mark.parametrize("physics, chosen", [("", "physx"), ("warp_renderer, newton_mjwarp", "newton")])
def test_presets_are_none_or_several(install, physics, chosen):
    hydra = HYDRA.replace("return {", 'return {"renderer": {"default": 1, "warp_renderer": 2}} | {')
    events = install(NEWER | {"isaaclab_tasks/utils/hydra.py": hydra})
    make_env("Isaac-Cartpole-v0", 2, physics=physics)
    assert events[1][1] == chosen


def test_mjlab_is_told_not_to_reset(install):
    install(
        {
            "mjlab/__init__.py": "",
            "mjlab/tasks/__init__.py": "",
            "mjlab/envs.py": """
                from isaac_doubles import MjlabDouble
                def ManagerBasedRlEnv(cfg, device, render_mode=None):
                    env = MjlabDouble(num_envs=cfg.scene.num_envs)
                    env.cfg, env.device, env.render_mode, cfg.is_finite_horizon = cfg, device, render_mode, False
                    return env
            """,
            "mjlab/tasks/registry.py": """
                from types import SimpleNamespace
                def list_tasks():
                    return ["Mjlab-Cartpole-Balance"]
                def load_env_cfg(task):
                    return SimpleNamespace(scene=SimpleNamespace(num_envs=1), seed=None, auto_reset=True)
            """,
        }
    )
    env = make_env("Mjlab-Cartpole-Balance", 4, "cpu", 2, render_mode="rgb_array")
    assert (env.num_envs, env.sim.cfg.seed, env.sim.cfg.auto_reset, env.render_mode) == (4, 2, False, "rgb_array")
    env.reset()
    for _ in range(5):
        info = env.step(torch.zeros(4, 1))[4]
    assert info["final_obs"][:, 0].tolist() == [5] * 4
    with pytest.raises(ValueError, match="nearest is Mjlab-Cartpole-Balance"):
        make_env("Mjlab-Cartpole", 4)
