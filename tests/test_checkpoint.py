"""Checkpoints: whole or not there, readable without pickle, and one sentence for what cannot be loaded."""

import dataclasses
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from full_disk import fill, small_disk

from common import checkpoint, cli
from common.files import tolerant
from common.flat_adam import FlatAdam


def refusal(capsys, call) -> str:
    with pytest.raises(SystemExit) as stop:
        call()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_round_trip(tmp_path):
    state = {"script": "a.py", "iteration": 3, "agent": {"w": torch.randn(3)}, "rng": checkpoint.rng_state()}
    checkpoint.save(tmp_path / "checkpoints" / "model_3.pt", state)
    loaded = checkpoint.load(tmp_path / "checkpoints" / "model_3.pt", "a.py")
    assert loaded["iteration"] == 3 and torch.equal(loaded["agent"]["w"], state["agent"]["w"])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["model_3.pt"]


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "model_1.pt"
    checkpoint.save(path, {"script": "a.py", "x": 1})

    def crash(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr({"torch": torch, "os": os}[moment.split(".")[0]], moment.split(".")[1], crash)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"script": "a.py", "x": 2})
    monkeypatch.undo()
    assert checkpoint.load(path, "a.py")["x"] == 1 and len(list(tmp_path.iterdir())) == 1


def test_killed_before_the_rename_leaves_the_old_file(tmp_path):
    code = """
import os, signal, sys
from common import checkpoint
from common.flat_adam import FlatAdam
path = sys.argv[1] + "/model_1.pt"
checkpoint.save(path, {"script": "a.py", "x": 1})
os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(path, {"script": "a.py", "x": 2})
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=os.path.dirname(os.path.dirname(__file__)))
    assert run.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 2
    assert checkpoint.load(checkpoint.latest(tmp_path), "a.py")["x"] == 1


def test_data_reaches_the_disk_before_the_rename(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("sync"))
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), rename(a, b)))
    checkpoint.save(tmp_path / "a.pt", {})
    assert calls == ["sync", "rename", "sync"]


def test_what_cannot_be_loaded(tmp_path, capsys):
    good, bad = tmp_path / "model_1.pt", tmp_path / "model_2.pt"
    checkpoint.save(good, {"script": "a.py", "w": torch.randn(1000)})
    assert "is no file" in refusal(capsys, lambda: checkpoint.load(tmp_path / "absent.pt", "a.py"))
    message = refusal(capsys, lambda: checkpoint.load(good, "b.py", flag="--resume"))
    assert "--resume" in message and "a.py" in message and "b.py" in message
    for damage in (b"", b"not a checkpoint", good.read_bytes()[:2000]):
        bad.write_bytes(damage)
        assert "--model-path" in refusal(capsys, lambda: checkpoint.load(bad, "a.py"))
    torch.save({"script": "a.py", "f": subprocess.Popen}, bad)  # a pickle that could run code
    assert "damaged or no checkpoint" in refusal(capsys, lambda: checkpoint.load(bad, "a.py"))
    torch.save([1, 2], bad)
    assert "another program" in refusal(capsys, lambda: checkpoint.load(bad, "a.py"))


def test_latest(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    for i in (9, 10, 100):
        checkpoint.save(folder / f"model_{i}.pt", {"script": "a.py", "i": i})
    (folder / ".model_300.pt.1.tmp").write_bytes(b"half")
    (folder / "best_model.pt").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) == checkpoint.latest(folder) == folder / "model_100.pt"
    (folder / "model_100.pt").write_bytes((folder / "model_100.pt").read_bytes()[:300])
    assert checkpoint.latest(tmp_path) == folder / "model_10.pt"
    assert checkpoint.load(tmp_path, "a.py")["i"] == 10
    assert checkpoint.latest(folder / "model_9.pt") == folder / "model_9.pt"
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    assert "--resume" in refusal(capsys, lambda: checkpoint.latest(tmp_path / "empty"))
    assert "does not exist" in refusal(capsys, lambda: checkpoint.latest(tmp_path / "absent"))


def test_rng_state(tmp_path):
    def draw():
        return [random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.randn(3).tolist()]

    random.gauss(0, 1), np.random.randn()  # each now holds the second half of a pair
    checkpoint.save(tmp_path / "a.pt", {"script": "a.py", "rng": checkpoint.rng_state()})
    expected = draw()
    assert draw() != expected
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "a.pt", "a.py")["rng"])
    assert draw() == expected


def test_interrupt(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for first in (signal.SIGINT, signal.SIGTERM):
        interrupt = checkpoint.Interrupt()
        assert not interrupt
        os.kill(os.getpid(), first)
        assert interrupt
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat it; saving goes on
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        interrupt.restore()
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert "saved first" in capfd.readouterr().err


def test_export_onnx(tmp_path, capfd):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.randn(48))
            self.register_buffer("var", torch.rand(48) + 0.1)
            sizes = (48, 64, 64, 12)
            layers = [
                m for a, b in zip(sizes, sizes[1:], strict=False) for m in (torch.nn.Linear(a, b), torch.nn.ELU())
            ]
            self.net = torch.nn.Sequential(*layers[:-1])

        def forward(self, obs):
            return self.net(((obs - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)).clamp(-1, 1)

    policy, path = Policy().train(), tmp_path / "policy.onnx"
    checkpoint.export_onnx(policy, torch.zeros(1, 48), path)
    assert policy.training and [p.name for p in tmp_path.iterdir()] == ["policy.onnx"]
    assert capfd.readouterr() == ("", "")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs() + session.get_outputs()] == ["obs", "actions"]
    for batch in (1, 7):
        obs = 3 * torch.randn(batch, 48)
        (actions,) = session.run(None, {"obs": obs.numpy()})
        np.testing.assert_allclose(actions, policy(obs).detach().numpy(), atol=1e-5)


def test_export_onnx_of_a_policy_with_a_state(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = torch.nn.LSTM(5, 8), torch.nn.Linear(8, 2)

        def forward(self, obs, state):
            output, (h, c) = self.lstm(obs[None], (state[:1].contiguous(), state[1:].contiguous()))
            return self.head(output[0]), torch.cat((h, c))

    policy, path = Policy().train(), tmp_path / "policy.onnx"
    names = ("obs", "state"), ("actions", "next_state")
    checkpoint.export_onnx(policy, (torch.zeros(1, 5), torch.zeros(2, 1, 8)), path, *names)
    assert policy.training and [p.name for p in tmp_path.iterdir()] == ["policy.onnx"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["obs", "state"]
    assert [o.name for o in session.get_outputs()] == ["actions", "next_state"]
    for batch in (1, 7):
        state = torch.randn(2, batch, 8)
        memory = state.numpy()
        for _ in range(3):
            obs = torch.randn(batch, 5)
            with torch.no_grad():
                expected, state = policy(obs, state)
            actions, memory = session.run(None, {"obs": obs.numpy(), "state": memory})
            np.testing.assert_allclose(actions, expected, atol=1e-5)
            np.testing.assert_allclose(memory, state, atol=1e-5)


def test_export_onnx_of_a_policy_that_sees_and_feels(tmp_path, capfd):
    """A dict of observations: one input for each entry, in any batch size, pixels as they are."""
    onnxruntime = pytest.importorskip("onnxruntime")

    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.eye, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4 * 36 + 5, 2)

        def forward(self, obs):
            picture = self.eye(obs["rgb"].permute(0, 3, 1, 2).float() / 255).flatten(1)
            return self.head(torch.cat((picture, obs["state"]), 1))

    def draw(n):
        return {"rgb": torch.randint(256, (n, 8, 8, 3), dtype=torch.uint8), "state": torch.randn(n, 5)}

    policy, path = Policy().train(), tmp_path / "policy.onnx"
    checkpoint.export_onnx(policy, draw(1), path)
    assert policy.training and [p.name for p in tmp_path.iterdir()] == ["policy.onnx"]
    assert capfd.readouterr() == ("", "")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs() + session.get_outputs()] == ["rgb", "state", "actions"]
    assert [i.type for i in session.get_inputs()] == ["tensor(uint8)", "tensor(float)"]
    for batch in (1, 7):
        obs = draw(batch)
        (actions,) = session.run(None, {name: value.numpy() for name, value in obs.items()})
        with torch.no_grad():
            np.testing.assert_allclose(actions, policy(obs), atol=1e-5)


@dataclasses.dataclass
class RunArgs(cli.RunArgs):
    num_envs: int = 4
    """environments"""
    activation: str = "silu"
    """which no shape of a weight tells"""


@pytest.mark.parametrize("way", ["training", "--resume", "--eval-only --model-path"])
def test_a_policy_is_not_given_to_other_networks_of_the_same_shapes(tmp_path, capsys, monkeypatch, way):
    agent, path = torch.nn.Linear(3, 2), tmp_path / "model_1.pt"
    checkpoint.save(path, {"script": "a.py", "args": dataclasses.asdict(RunArgs()), "agent": agent.state_dict()})

    def use(*flags):
        if way == "training":
            args = cli.parse_args(RunArgs, argv=["--model-path", str(path), *flags])
            checkpoint.begin_with(again, args, "a.py")
        else:
            monkeypatch.setattr(sys, "argv", ["a.py", *way.split(), str(path), "--device", "cpu", *flags])
            assert checkpoint.parse_run_args(RunArgs, "a.py", {}, "").num_envs == 8

    again = torch.nn.Linear(3, 2)
    use("--num-envs", "8")
    assert torch.equal(agent.weight, again.weight) == (way == "training")
    run_dir = tmp_path / "run"  # made before a training looks at its policy
    run_dir.mkdir()
    (run_dir / "args.yaml").touch()
    message = refusal(capsys, lambda: use("--activation", "relu", "--log-dir", str(run_dir)))
    assert all(word in message for word in ("--activation got relu", "silu", way.split()[-1].replace("training", "")))
    assert run_dir.exists() == (way != "training")


@dataclasses.dataclass
class Args:
    log_dir: str
    resume: str = ""


def test_on_a_full_disk_the_next_checkpoint_tries_again(tmp_path, capsys):
    agent = torch.nn.Linear(300, 300)  # .36 MB
    with small_disk(tmp_path / "disk", 1) as disk:
        run = checkpoint.Run("a.py", Args(str(disk)), {"agent": agent})
        run.save({}, "model_1.pt")
        filler = fill(disk)
        run.save({}, "model_2.pt")
        with tolerant("policy.onnx", disk):
            checkpoint.export_onnx(agent, torch.zeros(1, 300), disk / "policy.onnx")
        run.keep_best(1.0, "model_1.pt")
        warnings = capsys.readouterr().err.splitlines()
        where = f"cannot be written in {disk / 'checkpoints'} (No space left on device)"
        assert warnings[0] == f"warning: model_2.pt {where}; the newest whole checkpoint is model_1.pt"
        assert warnings[1].startswith("warning: policy.onnx cannot be written in ")
        assert warnings[2] == f"warning: best_model.pt {where}; the newest whole checkpoint is model_1.pt"
        assert [p.name for p in (disk / "checkpoints").iterdir()] == ["model_1.pt"]
        with pytest.raises(SystemExit) as end:
            run.save({}, "final_model.pt")
        err = capsys.readouterr().err.splitlines()
        assert end.value.code == 1 and len(err) == 2 and err[1].startswith("error: the final model is not saved")
        filler.unlink()
        run.save({}, "model_3.pt")
        assert checkpoint.latest(disk).name == "model_3.pt" and capsys.readouterr().err == ""


def test_a_policy_alone_cannot_be_resumed(tmp_path, capsys):
    """As benchmark/results has one."""
    agent, path = torch.nn.Linear(3, 2), tmp_path / "model_1.pt"
    optimizer = FlatAdam(agent.parameters(), torch.tensor(0.5))
    checkpoint.save(path, {"script": "a.py", "args": {}, "agent": agent.state_dict(), "iteration": 1})
    learned = {"agent": agent, "optimizer": optimizer}
    message = refusal(capsys, lambda: checkpoint.Run("a.py", Args(str(tmp_path), str(path)), learned))
    assert "--resume" in message and "--model-path" in message


def test_the_optimizer_of_an_older_version_costs_one_sentence(capsys):
    again = FlatAdam([torch.nn.Parameter(torch.ones(3))], torch.tensor(0.5))
    older = torch.optim.Adam([torch.nn.Parameter(torch.ones(n)) for n in (1, 2)])
    with pytest.raises(SystemExit) as end:  # older versions had one entry per tensor
        again.load_state_dict(older.state_dict())
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "--resume got a checkpoint of an older version" in err
