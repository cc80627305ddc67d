"""Demonstrations: whole successful episodes of the expert, what it would do and not the noise, and their ranges."""

import pytest
import torch

from common import demos


class Counting:
    """Environments that observe (episode, step) and end after 3 steps; every second episode of each fails."""

    num_envs = 2

    def __init__(self):
        self.executed = []

    def _obs(self):
        return {"state": torch.stack((self.episode, self.clock), 1).float()}

    def reset(self):
        self.episode, self.clock = torch.tensor([0, 100]), torch.tensor([0, 1])
        return self._obs(), {}

    def step(self, actions):
        self.executed.append(actions)
        self.clock = self.clock + 1
        done = self.clock == 3
        success = (self.episode % 2 == 0).float()
        self.episode = self.episode + done.long()
        self.clock = torch.where(done, 0, self.clock)
        return self._obs(), None, None, None, {"_episode": done, "episode": {"success": success}}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def expert(envs):
    return torch.stack((envs.clock, envs.episode), 1)[:, None].float().expand(-1, 4, -1) / 10


def test_whole_successful_episodes_are_kept_with_the_experts_own_actions():
    envs = Counting()
    found = demos.collect(envs, expert, 4, noise=0.5)
    # The second environment's first episode began before the first reset is seen: it has two steps.
    assert found["obs"]["state"].tolist() == (
        [[100, 1], [100, 2], [0, 0], [0, 1], [0, 2]] + [[102, i] for i in range(3)] + [[2, i] for i in range(3)]
    )
    state = found["obs"]["state"]
    torch.testing.assert_close(found["actions"], (state.flip(1) / 10)[:, None].expand(-1, 4, -1))
    executed = torch.cat(envs.executed)
    noise = executed - executed[:, :1]  # within a chunk it does not change
    assert noise.abs().max() < 1e-5


def test_noise_has_its_standard_deviation():
    class Still(Counting):
        num_envs = 500

        def reset(self):
            self.episode, self.clock = torch.zeros(500), torch.zeros(500)
            return self._obs(), {}

    envs = Still()
    demos.collect(envs, lambda envs: torch.zeros(500, 2, 3), 1, noise=0.4)
    assert torch.stack(envs.executed).std() == pytest.approx(0.4, rel=0.05)


def test_without_chunks_each_component_has_a_noise_of_its_own():
    envs = Counting()
    demos.collect(envs, lambda envs: torch.zeros(2, 3), 4, noise=0.5)
    executed = torch.cat(envs.executed)
    assert (executed[:, :1] - executed[:, 1:]).abs().min() > 1e-4


def test_an_expert_that_never_succeeds_costs_one_sentence(capsys):
    envs = Counting()
    with pytest.raises(SystemExit) as end:
        demos.collect(envs, lambda envs: setattr(envs, "episode", envs.episode | 1) or expert(envs), 1)
    assert end.value.code == 2 and "--demos" in capsys.readouterr().err


def test_ranges_are_the_extremes_or_for_what_hardly_moves_the_whole_range():
    actions = torch.tensor([[[0.5, 0.01], [-0.25, 0.0]], [[0.1, 0.02], [0.0, 0.03]]])
    found = demos.ranges({"obs": {"state": torch.tensor([[1.0, 5.0], [3.0, 4.0]])}, "actions": actions})
    assert found["state"].tolist() == [[1, 4], [3, 5]]
    torch.testing.assert_close(found["action"], torch.tensor([[-0.25, -1.0], [0.5, 1.0]]))
