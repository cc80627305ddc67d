"""The tasks beside Pick-v0 of ppo_gr00t.py: chunks of their actions, the sparse reward, experts, and a whole run."""

import json
from types import SimpleNamespace

import pytest
import torch
from gymnasium.spaces import Box, Dict
from harness import SCRIPTS
from helpers import ALWAYS, check_sentence, run

from common import checkpoint, demos, video
from common.envs import vla
from common.envs.pick import PickConfig
from common.gr00t_network import Gr00tConfig

SCRIPT = SCRIPTS["ppo_gr00t"]
TASKS = ("PegInsert-v0", "AlohaInsertion-v0")
SIZE = ["--num-envs", 2, "--num-steps", 2, "--num-minibatches", 2, "--update-epochs", 1, "--num-iterations", 2]
SIZE += ["--eval-episodes", 2, "--max-episode-steps", 6, *ALWAYS]


class Counter:
    """Counts its steps: the episode of world i ends at step 2 + 2 i, and has succeeded from step 2 on."""

    num_envs, device, metric_names = 2, torch.device("cpu"), ("success", "success_once")
    single_observation_space = Dict({"rgb": Box(0, 9, (1,)), "arm": Box(0, 9, (1,)), "other": Box(0, 9, (1,))})
    single_action_space = Box(-1, 1, (1,))
    nan_resets = torch.zeros(())

    def reset(self, **options):
        self.count, self.actions = torch.zeros(2), []
        return self.observe(), {}

    def observe(self):
        return {name: scale * self.count[:, None] for name, scale in (("rgb", 1), ("arm", 10), ("other", 100))}

    def step(self, action):
        self.actions.append(action[:, 0].tolist())
        self.count = self.count + 1
        done = self.count >= torch.tensor([2.0, 4.0])
        once = (self.count >= 2).float()
        info = {"final_obs": self.observe(), "_episode": done}
        info["episode"] = {"r": self.count, "l": self.count, "success": once, "success_once": once}
        self.count = torch.where(done, 0.0, self.count)
        return self.observe(), torch.ones(2), done & False, done, info


def test_a_chunk_ends_with_the_episode():
    env = Counter()
    chunks = vla.Chunks(env, {"top": "rgb", "state": "arm"}, 3)
    obs, _ = chunks.reset()
    assert set(obs) == {"top", "state", "instruction"} == set(chunks.single_observation_space.spaces)
    obs, reward, terminated, truncated, info = chunks.step(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert env.actions == [[1, 4], [2, 5], [0, 6]]  # zeros after the end
    assert reward.tolist() == [2, 3] and truncated.tolist() == [True, False] == info["_episode"].tolist()
    assert not terminated.any() and info["episode"]["l"].tolist() == [2, 3]
    assert info["final_obs"]["state"].tolist() == [[20], [30]] and obs["state"].tolist() == [[10], [30]]


def test_the_first_success_of_an_episode_is_worth_one():
    chunks = vla.Chunks(Counter(), {"top": "rgb", "state": "arm"}, 1, first_success=True)
    chunks.reset()
    rewards = [chunks.step(torch.zeros(2, 1))[1].tolist() for _ in range(6)]
    assert rewards == [[0, 0], [1, 1], [0, 0], [1, 0], [0, 0], [1, 1]]


def test_every_episode_of_an_evaluation_begins_with_a_chunk(monkeypatch):
    """Those that follow another one within a chunk begin with the zeros that are left of it."""
    env, begun = Counter(), []
    reset = env.reset
    monkeypatch.setattr(env, "reset", lambda **options: (begun.append(1), reset(**options))[1])
    monkeypatch.setattr(vla, "make", lambda *args: vla.Chunks(env, {"top": "rgb", "state": "arm"}, 3))
    monkeypatch.setattr(vla.Chunks, "close", lambda self: None)
    result = vla.evaluate(lambda obs: torch.ones(2, 3), SimpleNamespace(env_id="Counter-v0"), "cpu", 5)
    assert result["episodes"] == 6 and len(begun) == 3 and result["mean_length"] == 3
    assert len(env.actions) == 6 and env.actions[:2] == [[1, 1], [1, 1]]  # two chunks a round


def settings(env_id, **more):
    values = {"observation": "state", "chunk": 5, "max_episode_steps": 300, "reward": "sparse"} | more
    return SimpleNamespace(**(vars(PickConfig()) | vars(Gr00tConfig()) | {"env_id": env_id} | values))


@pytest.mark.parametrize("env_id", TASKS)
def test_a_chunk_is_its_actions_one_after_the_other(env_id):
    one, five = (vla.make(settings(env_id, chunk=chunk), 2, "cpu", 1, 1) for chunk in (1, 5))
    actions = torch.rand(2, 5, *one.single_action_space.shape) - 0.5
    assert five.single_action_space.shape == actions.shape[1:]
    first, again = one.reset(seed=3)[0], five.reset(seed=3)[0]
    assert torch.equal(first, again)
    for k in range(5):
        obs, *_ = one.step(actions[:, k])
    state = five.state_dict()
    got, *_ = five.step(actions)
    assert torch.equal(got, obs) and not torch.equal(got, first)
    five.load_state_dict(state)
    assert torch.equal(five.step(actions)[0], obs)


def test_the_expert_of_single_steps_looks_ahead_and_succeeds():
    args = settings("AlohaTransferCube-v0")
    envs = vla.make(args, 2, "cpu", 1, 1)
    expert = vla.expert(args, "cpu")
    envs.reset(seed=1)
    before = envs.env.physics.qpos.clone()
    chunk = expert(envs)
    assert chunk.shape == (2, 5, 14) and torch.equal(envs.env.physics.qpos, before)
    found = demos.collect(envs, expert, 2)
    assert found["actions"].shape[1:] == (5, 14) and found["obs"].shape[1] == 49


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("policy", ("mlp", "gr00t"))
def test_a_run(env_id, policy, tmp_path):
    flags = [*SIZE, "--env-id", env_id, "--policy", policy, "--log-dir", tmp_path]
    if policy == "gr00t":
        if video.find_gl() is None:
            pytest.skip(video.missing_gl_message())
        few = ["--demos", 0, "--image-size", 28, "--chunk", 2]
        known = env_id == "AlohaInsertion-v0"  # its statistics come from demonstrations, which take longer
        flags += [*few, *(["--model-path", folder_of_a_robot(tmp_path, 28, 14)] if known else [])]
    assert run(SCRIPT, *flags) == 0
    result = json.loads((tmp_path / "summary.json").read_text())
    assert result["episodes"] >= 2 and 0 <= result["success_rate"] <= 1
    state = checkpoint.load(tmp_path, SCRIPT.name)
    assert state["iteration"] == 2 and state["args"]["env_id"] == env_id
    assert all(value.isfinite().all() for value in state["agent"].values())


def folder_of_a_robot(folder, state_dim, action_dim):
    """A tiny model with the statistics of a robot of that size."""
    from common import gr00t

    torch.manual_seed(0)
    ends = lambda n: torch.tensor([[-1.0], [1.0]]).expand(2, n)  # noqa: E731
    gr00t.save(gr00t.load("tiny"), folder / "model", {"state": ends(state_dim), "action": ends(action_dim)}, "another")
    return folder / "model"


def test_without_an_expert_there_are_no_demonstrations(tmp_path, capfd):
    code = run(SCRIPT, *SIZE, "--env-id", "PegInsert-v0", "--demos", 3, "--log-dir", tmp_path)
    check_sentence(code, capfd.readouterr().err, ["--demos", "PegInsert-v0"])
