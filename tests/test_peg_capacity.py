"""The counting behind the table of GPU memory for peg insertion."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import warp as wp
from harness import ROOT

import ppo_multimodal_peginsert as ppo

sys.path.insert(0, str(ROOT / "benchmark"))

import peg_capacity


def test_peak_of_torch():
    kept = []

    def work():
        a = torch.ones(1000)  # 4000 bytes, and below twice as many, of which half are freed
        b = torch.ones(2000)
        del b
        kept.append(a + torch.ones(500).sum())

    assert 12_000 <= peg_capacity.torch_peak(work) <= 12_300


def test_arrays_of_warp_count_once():
    one = wp.zeros(10, dtype=wp.vec3, device="cpu")
    part = SimpleNamespace(a=one, b=[one, {"c": wp.zeros(5, dtype=float, device="cpu")}], d="text")
    assert peg_capacity.warp_bytes(vars(part)) == 10 * 12 + 5 * 4
    assert peg_capacity.warp_allocations(lambda: wp.zeros(7, dtype=float, device="cpu")) == 28


def test_a_line_and_the_sum():
    assert peg_capacity.line(lambda n: 100 + 3 * n, (10, 20)) == (100, 3)
    cost = {"environment": {"simulator": 1e6, "storage": 2e6}, "sample": 1e5, "once": {"parameters": 5e8}}
    found = peg_capacity.capacity(cost, 1000, SimpleNamespace(num_steps=8, num_minibatches=4))
    assert found["parts_gb"] == {"storage": 2.0, "environments": 1.0, "update": 0.2, "once": 0.5}
    assert found["gb"] == pytest.approx(3.7) and found["samples_per_iteration"] == 8000


def test_the_update_costs_what_its_tensors_hold():
    """A state policy's saved activations by hand: both MLPs' inputs and outputs, and no less."""
    import gymnasium as gym

    args = ppo.Args(hidden=(64,))
    space = gym.spaces.Box(-1, 1, (19,))
    agent = ppo.Agent(
        SimpleNamespace(single_observation_space=space, single_action_space=gym.spaces.Box(-1, 1, (6,))), args
    )
    _, each = peg_capacity.line(peg_capacity.update_bytes, (256, 512), agent, args, space)
    least = 4 * (19 + 2 * 2 * 64 + 6)  # minibatch; before and after ELU, twice; means
    assert least < each < 3 * least


def test_the_figures_follow_from_the_measured_bytes():
    figures = json.loads((ROOT / "benchmark" / "results" / "peg_capacity.json").read_text())["figures"]
    args = SimpleNamespace(**figures["settings"])
    for name, rows in figures["per_gpu"].items():
        assert [row["num_envs"] for row in rows] == [256, 512, 1024]
        for row in rows:
            assert peg_capacity.capacity(figures["bytes"][name], row["num_envs"], args)["gb"] == pytest.approx(
                row["gb"]
            )
    # What the observations are made of does not change with the machine.
    assert {name: cost["observation_bytes"] for name, cost in figures["bytes"].items()} == {
        "state": 19 * 4,
        "tactile": 6 * 32 * 32 * 4 + 21 * 4,
        "rgb": 64 * 64 * 3 + 21 * 4,
        "all": 6 * 32 * 32 * 4 + 64 * 64 * 3 + 21 * 4,
    }
