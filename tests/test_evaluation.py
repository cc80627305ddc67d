"""common/evaluation.py: every world counts alike, and what an evaluation leaves."""

import json

import pytest
import torch

from common import evaluation, video


class Clockwork:
    """World i ends an episode every i + 1 steps, with its length as the return and the episode's number as `object`."""

    num_envs, device = 3, "cpu"

    def __init__(self):
        self.clock = 0

    def step(self, actions):
        self.clock += 1
        length = torch.arange(3) + 1
        info = {"_episode": self.clock % length == 0, "object": self.clock // length}
        info["episode"] = {"r": length, "success": length == 2}
        # What stands where no episode ends means nothing.
        info["episode"] = {name: torch.where(info["_episode"], v, 99) for name, v in info["episode"].items()}
        return {"clock": torch.full((3,), self.clock)}, torch.zeros(3), None, None, info


def test_every_world_counts_with_as_many_episodes_and_in_order():
    seen = []
    policy = lambda obs: seen.append(obs["clock"][0].item()) or torch.zeros(3, requires_grad=True) * 2  # noqa: E731
    columns = evaluation.play(policy, Clockwork(), {"clock": torch.zeros(3)}, "cpu", rounds=2, also=("object",))
    assert {name: column.tolist() for name, column in columns.items()} == {
        "r": [1, 2, 3, 1, 2, 3],
        "success": [0, 1, 0, 0, 1, 0],
        "object": [1, 1, 1, 2, 2, 2],
    }
    assert seen == [0, 1, 2, 3, 4, 5]  # no step more than the slowest world's second episode takes
    assert not columns["r"].requires_grad


def test_figures_and_what_is_left_of_them(tmp_path, capsys):
    columns = {"success": torch.tensor([1.0, 0, 0, 0]), "fallen": torch.zeros(4)}
    result = {"episodes": 4} | evaluation.rates(columns, "success", "fallen")
    result |= evaluation.mean_return(torch.tensor([1.0, 2, 3, 4]))
    assert result["success_rate"] == 0.25 and result["success_ci95"][0] < 0.25 < result["success_ci95"][1]
    assert result["fallen_rate"] == 0 and result["fallen_ci95"][0] == 0 and result["fallen_ci95"][1] > 0.3
    low, high = result["return_ci95"]
    assert result["mean_return"] == 2.5 == (low + high) / 2 and low < 2.5
    evaluation.save_and_print(result, tmp_path, "final", ", and more")
    assert json.loads((tmp_path / "eval" / "final.json").read_text()) == result
    assert capsys.readouterr().out == "final: success 25.0% (4.6% to 69.9%) of 4 episodes, and more\n"


@pytest.mark.parametrize("gl", ["egl", None])
def test_where_nothing_draws_one_sentence_says_so(monkeypatch, capsys, gl):
    monkeypatch.setattr(video, "find_gl", lambda: gl)
    assert evaluation.can_film() == (gl is not None)
    assert capsys.readouterr().out == ("" if gl else f"{video.missing_gl_message()}\n")


def test_the_device_of_a_policy():
    assert evaluation.device_of(torch.nn.Linear(1, 1, device="meta")).type == "meta"
    assert evaluation.device_of(torch.nn.Identity()) == evaluation.device_of(lambda obs: obs) == "cpu"


def test_what_an_evaluation_draws_changes_nothing_that_is_drawn_later():
    torch.manual_seed(1)
    torch.rand(3)
    expected = torch.rand(3)
    torch.manual_seed(1)
    torch.rand(3)
    with evaluation.random_state_kept(torch.device("cpu")):
        assert torch.equal(torch.rand(3), expected)  # it goes on from where it was
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)
