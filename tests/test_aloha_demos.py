"""The reverse curriculum: starts on the way of scripted demonstrations, and when they move back."""

import pytest
import torch

from common.envs.aloha import AlohaConfig, AlohaEnv
from common.envs.aloha_demos import Curriculum
from common.envs.aloha_expert import Expert

CONFIG = AlohaConfig(obs_type="state", threads=1, episode_steps=20)


@pytest.fixture(scope="module")
def made():
    Curriculum.DEMOS = 3
    training = AlohaEnv(4, obs_type="state", threads=1)
    made = Curriculum(CONFIG, training, 5)
    assert training.start_states == made.starts
    training.close()
    return made


@pytest.fixture
def curriculum(made):
    made.load_state_dict({"frontier": 5, "back": torch.zeros(4, dtype=torch.long), "counts": torch.zeros(2)})
    return made


@pytest.mark.parametrize("back", [1, 12])
def test_the_expert_goes_on_to_success_from_every_start(curriculum, back):
    env, expert = AlohaEnv(4, obs_type="state", threads=1), Expert(CONFIG)
    env.start_states = lambda rows: curriculum.states_before(torch.full_like(rows, back))
    env.reset(seed=1)
    for step in range(1, back + 1):
        _, _, terminated, _, info = env.step(expert(env))
        assert terminated.all() == (step == back)
    assert info["episode"]["success"].all()
    env.close()


def test_no_start_is_before_a_demonstration(curriculum):
    start = curriculum.states_before(torch.full((50,), 10_000))
    assert not start["qvel"].any()
    assert set(start["qpos"][:, 16].tolist()) == set(curriculum.states["qpos"][0, :, 16].tolist())


def test_starts_are_within_the_frontier_and_remembered(curriculum):
    curriculum.frontier, rows, seen = 7, torch.tensor([1, 3]), set()
    for _ in range(100):
        curriculum.starts(rows)
        seen |= set(curriculum.back[rows].tolist())
    assert seen == set(range(1, 8)) and not curriculum.back[[0, 2]].any()


def ended(success):
    return {"_episode": torch.tensor([True, True, True, False]), "episode": {"success": success.float()}}


@pytest.mark.parametrize("succeeded, frontier", [(79, 20), (80, 25)])
def test_the_frontier_moves_when_starts_near_it_succeed(curriculum, succeeded, frontier):
    curriculum.frontier = 20
    curriculum.back_before = torch.tensor([10, 11, 20, 20])  # the first start is too near to success to tell
    for i in range(50):
        curriculum.learn(ended(i < torch.tensor([50, succeeded - 40, 40, 0])))
        curriculum.advance()
        assert curriculum.frontier == (20 if i < 49 else frontier)
    assert not curriculum.counts.any()  # counting begins anew


def test_episodes_count_for_where_they_began_and_not_for_where_the_next_ones_do(curriculum):
    curriculum.frontier, curriculum.back = 20, torch.full((4,), 19)
    curriculum.starts(torch.tensor([0, 1, 2]))
    curriculum.back[:] = 0
    curriculum.learn(ended(torch.ones(4)))
    assert curriculum.counts.tolist() == [3, 3]


def test_the_frontier_ends_with_the_longest_demonstration(curriculum):
    curriculum.frontier = longest = int(curriculum.length.max())
    curriculum.counts += 100
    curriculum.advance()
    assert curriculum.frontier == longest > 50


def test_an_expert_that_never_succeeds_costs_one_sentence(monkeypatch, capsys):
    """Its hands hardly move; without a limit the search for demonstrations would go on for ever."""
    monkeypatch.setattr("common.envs.aloha_demos.ATTEMPTS", 1)
    monkeypatch.setattr("common.envs.aloha_demos.DEMO_STEPS", 5)
    monkeypatch.setattr(Curriculum, "DEMOS", 2)
    training = AlohaEnv(1, obs_type="state", threads=1)
    with pytest.raises(SystemExit) as end:
        Curriculum(AlohaConfig(obs_type="state", threads=1, joint_step=1e-6), training, 5)
    assert end.value.code == 2 and "--demo-resets" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["back", "counts"])
def test_what_is_restored_is_on_the_device_of_the_environments(curriculum, name):
    """A checkpoint is read on the CPU, wherever the training is."""
    curriculum.counts = torch.zeros(2, device="meta")
    state = {"frontier": 5, "back": torch.zeros(4, dtype=torch.long), "counts": torch.zeros(2)}
    curriculum.load_state_dict(state)
    assert getattr(curriculum, name).device.type == "meta"
    curriculum.counts = torch.zeros(2)


def test_a_policy_is_measured_from_before_to_beyond_the_frontier(curriculum, monkeypatch):
    starts = []

    def evaluate(policy, cfg, device, episodes, start_states):
        starts.append(start_states(torch.arange(2)))
        return {"success_rate": len(starts) / 10}

    monkeypatch.setattr("common.envs.aloha_demos.evaluate", evaluate)
    curriculum.frontier = 30
    assert curriculum.measure(None, CONFIG, 8, "cpu") == {"25": 0.1, "50": 0.2, "75": 0.3}
    assert not torch.equal(starts[0]["qpos"], starts[1]["qpos"])
