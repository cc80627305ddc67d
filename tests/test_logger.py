"""Metrics reach every reader under the same names; files are whole; intervals are right."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import yaml

from common import logger


@dataclass
class Args:
    exp_name: str = "test"
    seed: int = 3
    log_dir: str | None = None
    track: bool = False
    wandb_project: str = "project"
    wandb_entity: str | None = None
    wandb_group: str | None = None
    command_vx: tuple[float, float] = (-1.0, 2.0)


METRICS = {"charts/SPS": 52310.4, "losses/policy_loss": torch.tensor(-0.5), "losses/value_loss": torch.tensor([2.0])}


def scalars(folder) -> dict:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_terminal_and_tensorboard(tmp_path, capsys):
    log = logger.Logger(tmp_path, Args(), total=1000)
    log.log(METRICS, 100)
    log.progress(500)
    log.close()
    out, err = capsys.readouterr()
    assert "52,310" in out and "policy_loss -0.5" in out and "value_loss 2" in out and "step 100" in out
    assert "left" in err and "wandb" not in sys.modules
    found = scalars(tmp_path)
    assert found["losses/policy_loss"] == [(100, -0.5)] and set(found) == set(METRICS)


def test_silent_on_other_ranks(tmp_path, capsys):
    log = logger.Logger(tmp_path, Args(track=True), total=10, enabled=False)
    log.log(METRICS, 1)
    log.progress(2)
    log.video("video", tmp_path / "a.mp4", 1)
    log.close()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


class FakeRun:
    url = None

    def __init__(self):
        self.logged = []

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        pass


def test_tracking_is_quiet_and_uses_the_same_names(tmp_path, capsys, monkeypatch):
    run = FakeRun()
    monkeypatch.setattr(logger, "_start_wandb", lambda run_dir, args: run)
    log = logger.Logger(tmp_path, Args(track=True), total=10)
    log.log(METRICS, 1)
    log.close()
    assert capsys.readouterr() == ("", "")
    assert run.logged == [(1, {"charts/SPS": 52310.4, "losses/policy_loss": -0.5, "losses/value_loss": 2.0})]
    assert set(scalars(tmp_path)) == set(METRICS)


def test_tracking_offline(tmp_path):
    pytest.importorskip("wandb")
    code = """
import sys
from common.logger import Logger
from tests.test_logger import Args, METRICS
log = Logger(sys.argv[1], Args(track=True), total=10)
log.log(METRICS, 1)
log.close()
"""
    root = os.path.dirname(os.path.dirname(__file__))
    env = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": root}
    run = subprocess.run([sys.executable, "-c", code, tmp_path], env=env, cwd=root, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb")) and set(scalars(tmp_path)) == set(METRICS)


def test_tracking_without_wandb(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as stop:
        logger.Logger(tmp_path, Args(track=True), total=10)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "pip install wandb" in err and err.count("\n") == 1


def test_importing_the_logger_is_cheap():
    code = "import sys, common.logger; print([m for m in ('wandb', 'tensorboard', 'mujoco') if m in sys.modules])"
    root = os.path.dirname(os.path.dirname(__file__))
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "[]\n"


def test_table_fits_the_terminal():
    metrics = {f"losses/a_long_name_{i}": 1e-5 * i for i in range(20)} | {"charts/SPS": 1e6}
    table = logger.format_table(metrics, 1, width=80)
    assert max(map(len, table.splitlines())) <= 80 and "SPS 1,000,000" in table
    assert all(f"a_long_name_{i} " in table for i in range(20))


def test_run_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = logger.make_run_dir(Args(), "Go2-v0"), logger.make_run_dir(Args(), "Go2-v0")
    assert first != second and first.parent == second.parent and str(first).startswith("runs/test/Go2-v0__3__")
    written = yaml.safe_load((first / "args.yaml").read_text())
    assert written["seed"] == 3 and written["command_vx"] == [-1.0, 2.0]
    info = written["run_info"]
    assert info["commit"] and info["versions"]["torch"] == torch.__version__ and info["hardware"]["cores"] >= 1
    assert set(info["versions"]) == {"python", "torch", "mujoco", "warp", "gymnasium", "numpy"}
    chosen = Args(log_dir=str(tmp_path / "here"))
    assert logger.make_run_dir(chosen, "Go2-v0") == logger.make_run_dir(chosen, "Go2-v0") == tmp_path / "here"


def test_run_dir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        logger.make_run_dir(Args(log_dir=str(tmp_path / "file" / "x")), "Go2-v0")
    assert stop.value.code == 2 and "--log-dir" in capsys.readouterr().err


def test_commit_is_unknown_outside_git(tmp_path, monkeypatch):
    monkeypatch.setattr(logger, "ROOT", tmp_path)
    assert logger.git_commit() == "unknown"


def test_write_json(tmp_path, monkeypatch):
    path = tmp_path / "eval" / "a.json"
    logger.write_json(path, {"a": torch.tensor(0.5), "b": (1, math.nan), "c": tmp_path, "d": torch.ones(2)})
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [1, None], "c": str(tmp_path), "d": [1.0, 1.0]}

    def crash(*args):
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="killed"):
        logger.write_json(path, {"a": 1})
    assert json.loads(path.read_text())["a"] == 0.5 and len(list(path.parent.iterdir())) == 1


def test_intervals():
    mean, half = logger.mean_ci95([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(1.96 * math.sqrt(5 / 3) / 2)
    assert logger.mean_ci95(torch.tensor([True, False]))[0] == 0.5
    assert logger.mean_ci95([2.0])[0] == 2.0 and math.isnan(logger.mean_ci95([2.0])[1])
    assert math.isnan(logger.mean_ci95([])[0])
    assert logger.wilson_ci95(0, 128) == pytest.approx((0.0, 0.02914), abs=1e-4)
    assert logger.wilson_ci95(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert logger.wilson_ci95(10, 10)[1] == 1.0 and logger.wilson_ci95(0, 0) == (0.0, 1.0)


def test_peak_memory():
    assert 20 < logger.peak_memory_mb() < 100_000
