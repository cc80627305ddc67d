"""Whole runs of ppo_gr00t.py with a tiny GR00T: what they leave, exact resume through every stage, their beginnings."""

import json

import pytest
from harness import SCRIPTS
from helpers import ALWAYS, check_sentence, differences, learned, run

from common import checkpoint

SCRIPT = SCRIPTS["ppo_gr00t"]
SIZE = ["--num-envs", 4, "--num-steps", 2, "--num-minibatches", 2, "--update-epochs", 1, "--max-episode-steps", 24]
SIZE += ["--eval-episodes", 2, "--log-interval", 1, "--device", "cpu", *ALWAYS]
WARM_START = ["--demos", 3, "--bc-steps", 2, "--bc-batch", 4, "--max-episode-steps", 64]
# Parts begin to learn before, at and after the checkpoint that is resumed.
STAGES = ["--unfreeze-schedule", "critic:0", "lora:1", "projector:2", "dit:3", "adapter:4", "llm:5"]
POLICIES = {"one": ["--sde-steps", "one"], "all": ["--sde-steps", "all", "--micro-batch-size", 2], "stages": STAGES}
POLICIES |= {"residual": ["--policy", "gaussian-residual"]}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a short run with a warm start."""
    folder = tmp_path_factory.mktemp("gr00t") / "run"
    code = run(SCRIPT, *SIZE, *WARM_START, "--num-iterations", 2, "--tune", "lora", "--log-dir", folder)
    assert code == 0
    return folder


@pytest.mark.parametrize("name", POLICIES)
def test_a_resumed_run_equals_an_uninterrupted_one(name, first, tmp_path):
    flags = [*SIZE, "--model-path", first / "warm_start", "--num-iterations", 6, "--checkpoint-interval", 3]
    flags += ["--eval-interval", 3]  # an evaluation between the two leaves no trace
    assert run(SCRIPT, *flags, *POLICIES[name], "--log-dir", tmp_path / "a") == 0
    begin = tmp_path / "a" / "checkpoints" / "model_3.pt"
    assert run(SCRIPT, "--resume", begin, "--log-dir", tmp_path / "b", *ALWAYS) == 0
    end, again = (learned(SCRIPT, tmp_path / part / "checkpoints" / "model_6.pt") for part in "ab")
    assert differences(end, again) == []
    before = checkpoint.load(begin, SCRIPT.name)["agent"]
    moved = {key for key, value in checkpoint.load(tmp_path / "a", SCRIPT.name)["agent"].items() if key in before}
    moved = {key for key in moved if not before[key].equal(end["agent"][key])}
    assert any("critic" in key for key in moved)
    learns = "actor" if name == "residual" else "action_head"
    assert any(learns in key for key in moved)
    if name == "stages":  # the language model has begun after the checkpoint
        assert any("lora_" in key for key in moved) and any("language_model" in key for key in moved)


def test_what_a_run_leaves(first, tmp_path, capsys):
    result = json.loads((first / "eval" / "model_0.json").read_text())  # after the warm start
    assert result["demos"] == 3 and result["bc_steps"] == 2 and "success_rate" in result
    assert {"policy.onnx"}.isdisjoint(path.name for path in first.iterdir())
    for folder in ("warm_start", "gr00t"):
        assert json.loads((first / folder / "statistics.json").read_text())["task"] == "Pick-v0"
        assert (first / folder / "model.safetensors").stat().st_size > 1e6
    final = first / "checkpoints" / "final_model.pt"
    flags = ["--eval-only", "--model-path", final, "--log-dir", tmp_path, "--eval-episodes", 3, *ALWAYS]
    assert run(SCRIPT, *flags) == 0
    evaluated = (tmp_path / "eval" / "final_model.json").read_text()
    assert run(SCRIPT, *flags) == 0  # from the same noise
    assert (tmp_path / "eval" / "final_model.json").read_text() == evaluated


def test_a_model_that_knows_the_task_needs_no_warm_start(first, tmp_path, capsys):
    flags = [*SIZE, *WARM_START, "--model-path", first / "gr00t", "--num-iterations", 1, "--log-dir", tmp_path / "a"]
    assert run(SCRIPT, *flags) == 0
    assert "has learned Pick-v0 already" in capsys.readouterr().out
    assert not (tmp_path / "a" / "warm_start").exists()


def test_without_statistics_or_demonstrations_one_sentence_says_what_to_give(tmp_path, capfd):
    code = run(SCRIPT, *SIZE, "--demos", 0, "--num-iterations", 1, "--log-dir", tmp_path)
    check_sentence(code, capfd.readouterr().err, ["--model", "tiny", "--demos"])


def test_a_full_gpu_costs_one_sentence(tmp_path, capfd, monkeypatch):
    import torch

    from common import distributed

    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(distributed, "launch", full)
    code = run(SCRIPT, *SIZE, "--log-dir", tmp_path)
    check_sentence(code, capfd.readouterr().err, ["--micro-batch-size", "--tune lora"])
