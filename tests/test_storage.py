"""Storage, selection and chunks of observations that are tensors or dicts; means of a Meter; captured graphs."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from common.cuda_graph import CudaGraph
from common.meter import FOLD, Meter, episode_metrics
from common.storage import FinalObs, in_chunks, put, take, zeros

SPACE = gym.spaces.Dict(
    image=gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), state=gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
)


def observation(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (n, 4, 4, 3), generator=generator, dtype=torch.uint8)
    return {"image": image, "state": torch.randn(n, 5, generator=generator)}


def test_storage_of_a_dict_of_images_and_vectors():
    storage = zeros(SPACE, (3, 2), "cpu")
    assert storage["image"].shape == (3, 2, 4, 4, 3) and storage["image"].dtype == torch.uint8
    assert storage["state"].shape == (3, 2, 5) and storage["state"].dtype == torch.float32
    pointer = storage["image"].data_ptr()
    put(storage, 1, observation(2))
    assert storage["image"].data_ptr() == pointer and not storage["image"][0].any()
    for name, tensor in take(storage, 1).items():
        assert torch.equal(tensor, observation(2)[name])
    rows = take(storage, (1, torch.tensor([1, 0, 1])))
    assert torch.equal(rows["state"], observation(2)["state"][[1, 0, 1]])
    discrete = zeros(gym.spaces.MultiDiscrete([2, 3]), (4,), "cpu")
    assert discrete.shape == (4, 2) and discrete.dtype == torch.int64


def test_chunks_are_as_large_as_said_and_their_results_one():
    seen = []

    def function(obs, scale):
        seen.append(len(scale))
        return obs["state"] * scale[:, None], {"mean": obs["image"].float().mean((1, 2, 3))}, None

    obs, scale = observation(10), torch.arange(10.0)
    product, means, nothing = in_chunks(function, 4, obs, scale)
    assert seen == [4, 4, 2] and nothing is None
    assert torch.equal(product, obs["state"] * scale[:, None]) and means["mean"].shape == (10,)
    in_chunks(function, 10, obs, scale)
    assert seen == [4, 4, 2, 10]


@pytest.mark.parametrize("as_dict", [False, True])
def test_final_observations_are_kept_where_a_time_limit_ended_an_episode(as_dict):
    final_obs, generator = FinalObs(), torch.Generator().manual_seed(0)
    for rollout in range(2):
        truncations = torch.rand(40, 3, generator=generator) < (0.1 if rollout == 0 else 0.0)
        everything = [observation(3, seed=t) if as_dict else observation(3, seed=t)["state"] for t in range(40)]
        for t in range(40):
            final_obs.add(truncations[t], everything[t])
            assert len(final_obs.pending) < 16  # what is kept whole is bounded
        rows = final_obs.take_all()
        states = torch.stack([obs["state"] if as_dict else obs for obs in everything])
        expected = states[truncations.nonzero(as_tuple=True)]
        assert (len(expected) > 5) == (rollout == 0)
        assert torch.equal(rows["state"] if as_dict else rows, expected)


def test_a_meter_averages_what_counts():
    meter, returns, masks, losses = Meter(), [], [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(FOLD + 10):
        returns.append(torch.randn(6, generator=generator))
        masks.append(torch.rand(6, generator=generator) < 0.2)
        meter.add({"a": returns[-1], "b": torch.arange(6)}, masks[-1])
        losses.append(torch.randn((), generator=generator))
        meter.add({"loss": losses[-1], "number": 2.0})
    found = meter.means()
    mask = torch.stack(masks)
    assert found["a"] == pytest.approx(torch.stack(returns)[mask].mean().item(), abs=1e-6)
    assert found["b"] == pytest.approx(torch.arange(6.0).expand(len(masks), 6)[mask].mean().item())
    assert found["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-6) and found["number"] == 2
    meter.add({"a": torch.ones(6)}, torch.zeros(6, dtype=torch.bool))
    assert meter.means() == {}  # it began anew, and nothing counted


def test_what_is_logged_of_episodes():
    info = {"episode": {"r": torch.ones(2), "l": torch.ones(2), "success": torch.zeros(2)}}
    assert list(episode_metrics(info)) == ["charts/episodic_return", "charts/episodic_length", "env/success"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_captured_graph_runs_every_call_once():
    counter = torch.zeros((), device="cuda")

    def function(x):
        counter.add_(1)
        return {"sum": x["a"] + counter}

    graph = CudaGraph(function)
    outputs = [graph({"a": torch.full((), float(i), device="cuda")})["sum"].item() for i in range(6)]
    assert outputs == [i + i + 1 for i in range(6)] and counter == 6
