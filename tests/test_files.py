"""Files are whole or absent, and a full disk costs a sentence."""

import errno
import json
import math
import os

import pytest
import torch
from full_disk import fill, small_disk

from common.files import atomic, tolerant, write_json, write_text

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_appears_whole_at_the_end(tmp_path):
    path = tmp_path / "new" / "model_1.pt"
    with atomic(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == path.parent and temporary.suffix == ".pt" and not path.exists()
        assert temporary.name.startswith(".") and str(os.getpid()) in temporary.name
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_alone(tmp_path, monkeypatch, step):
    path = tmp_path / "a.json"
    path.write_text("old")

    def crash(*args):
        raise OSError("killed")

    if step != "write":
        monkeypatch.setattr(os, step, crash)
    with pytest.raises(OSError, match="killed"), atomic(path) as temporary:
        temporary.write_text("half")
        if step == "write":
            crash()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_file_and_then_its_folder_reach_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    write_text(tmp_path / "a.txt", "text")
    assert synced == [str(tmp_path / f".a.{os.getpid()}.txt"), str(tmp_path)]


def test_write_json(tmp_path):
    path = tmp_path / "eval" / "a.json"
    write_json(path, {"a": torch.tensor(0.5), "b": (1, math.nan), "c": tmp_path, "d": torch.ones(2)})
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [1, None], "c": str(tmp_path), "d": [1.0, 1.0]}


def test_what_the_disk_refuses_costs_one_sentence(tmp_path, capsys):
    with tolerant("model_4.pt", tmp_path, "the newest whole checkpoint is model_2.pt"):
        raise FULL
    out, err = capsys.readouterr()
    sentence = f"model_4.pt cannot be written in {tmp_path} (No space left on device); the newest whole checkpoint is"
    assert out == "" and err.count("\n") == 1 and sentence in err
    with tolerant("a video", tmp_path):
        raise OSError("ffmpeg: no")
    assert capsys.readouterr().err.endswith("(ffmpeg: no); training goes on\n")


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ValueError("no"), KeyboardInterrupt()])
def test_other_errors_pass_through(tmp_path, error):
    with pytest.raises(type(error)), tolerant("a", tmp_path):
        raise error


def test_a_full_disk(tmp_path, capfd):
    with small_disk(tmp_path / "disk") as disk:
        path = disk / "checkpoints" / "model_1.pt"
        for numbers in (1000, 2_000_000, 1000):
            with tolerant("model_1.pt", disk), atomic(path) as temporary, open(temporary, "wb") as file:
                torch.save(torch.arange(numbers), file)
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and f"in {disk} (No space left on device)" in err  # by 16 MB
        assert len(torch.load(path)) == 1000 and list(path.parent.iterdir()) == [path]
        filler = fill(disk)
        for _ in range(2):
            with tolerant("a.json", disk):
                write_json(disk / "eval" / "a.json", list(range(5000)))
            filler.unlink(missing_ok=True)
        assert capfd.readouterr().err.count("\n") == 1
        assert json.loads((disk / "eval" / "a.json").read_text())[-1] == 4999
