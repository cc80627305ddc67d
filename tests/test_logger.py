"""Metrics reach every reader under the same names; what a run's folder is called and says of itself."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import yaml
from full_disk import fill, small_disk

from common import logger


@dataclass
class Args:
    exp_name: str = "test"
    seed: int = 3
    log_dir: str | None = None
    resume: str = ""
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


def test_terminal_and_tensorboard(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)  # another test may have imported it
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
from test_logger import Args, METRICS
log = Logger(sys.argv[1], Args(track=True), total=10)
log.log(METRICS, 1)
log.close()
"""
    root = os.path.dirname(os.path.dirname(__file__))
    env = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": f"{root}{os.pathsep}{root}/tests"}
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


def test_a_run_dir_is_not_shared(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".model_3.77.pt").touch()  # of a run that was killed before it had saved anything
    assert logger.make_run_dir(Args(log_dir=str(tmp_path)), "Go2-v0") == tmp_path
    (tmp_path / "args.yaml").unlink()
    (tmp_path / "checkpoints" / "best_model.pt").touch()  # which a run that is worse would leave as it is
    with pytest.raises(SystemExit) as stop:
        logger.make_run_dir(Args(log_dir=str(tmp_path)), "Go2-v0")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "--log-dir" in err and "--resume" in err
    assert not (tmp_path / "args.yaml").exists()
    assert logger.make_run_dir(Args(log_dir=str(tmp_path), resume=str(tmp_path)), "Go2-v0") == tmp_path


def test_run_dir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        logger.make_run_dir(Args(log_dir=str(tmp_path / "file" / "x")), "Go2-v0")
    assert stop.value.code == 2 and "--log-dir" in capsys.readouterr().err


def test_events_are_those_of_torchs_own_writer(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from torch.utils.tensorboard import SummaryWriter

    logger.append_events(tmp_path / "ours" / "events.out.tfevents.1", logger.to_numbers(METRICS), 7)
    with SummaryWriter(tmp_path / "torch") as writer:
        for name, value in METRICS.items():
            writer.add_scalar(name, value, 7)
    assert scalars(tmp_path / "ours") == scalars(tmp_path / "torch")
    [first, _] = EventFileLoader(str(tmp_path / "ours" / "events.out.tfevents.1")).Load()
    assert first.file_version == "brain.Event:2"


def test_half_a_record_does_not_hide_the_next(tmp_path, capsys, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def half(self, data):
        self._writer.write(data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = logger.Logger(tmp_path, Args(), total=10)
    log.log(METRICS, 1)
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", half)
        log.log(METRICS, 2)
        log.log(METRICS, 3)
    log.log(METRICS, 4)
    log.close()
    out, err = capsys.readouterr()
    warnings = [line for line in err.splitlines() if "warning" in line]
    assert len(warnings) == 2 and all(f"in {tmp_path} (No space left on device)" in line for line in warnings)
    assert [step for step, _ in scalars(tmp_path)["charts/SPS"]] == [1, 4] and "step 3" in out


def test_a_full_disk(tmp_path, capfd):
    with small_disk(tmp_path / "disk") as disk:
        log = logger.Logger(disk, Args(), total=500)
        log.log(METRICS, 1)
        filler = fill(disk)
        for step in range(2, 100):  # what is left of the last page takes some
            log.log(METRICS, step)
        filler.unlink()
        log.log(METRICS, 100)
        log.close()
        steps = [step for step, _ in scalars(disk)["charts/SPS"]]
        assert steps[0] == 1 and steps[-1] == 100 and 2 <= len(steps) < 60
    err = capfd.readouterr().err
    assert err.count("warning: TensorBoard's events cannot be written") == 100 - len(steps) and "Traceback" not in err
