"""What the tests of whole runs share: waiting for processes, and comparing what they saved."""

import ast
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness import ROOT, Script, process_restored

from common import checkpoint, distributed

ALWAYS = ("--no-save-video", "--device", "cpu")


def run(script: Script, *argv) -> int:
    """The script's exit code, run in this process on one thread, on one rank unless it is told otherwise."""
    words = [str(script.path), *map(str, argv), *([] if "--ranks" in argv else ["--ranks", "1"])]
    try:
        with pytest.MonkeyPatch.context() as patch, process_restored():
            patch.setattr(sys, "argv", words)
            patch.setattr(distributed, "num_cores", lambda: 1)
            runpy.run_path(str(script.path), run_name="__main__")
        return 0
    except SystemExit as stop:
        return stop.code


def start(script: Script, *argv, program=(), cwd=ROOT, environment=None) -> subprocess.Popen:
    """A run in a process group of its own, which Ctrl-C reaches even if the tests were started in the background."""
    return subprocess.Popen(
        [str(word) for word in (sys.executable, *program, script.path, *argv)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def tiny(script: Script, iterations: int) -> list:
    """Flags of a run of that length, with checkpoints and log lines at every third iteration."""
    every = ["--checkpoint-interval", 3, "--log-interval", 3]
    return [*script.flags, *script.size, *script.length(iterations), *ALWAYS, *every]


def learned(script: Script, path: Path) -> dict:
    """All of a checkpoint that a resumed run must reach again."""
    state = checkpoint.load(path, script.name)
    found = {key: value for key, value in state.items() if key not in ("script", "args", "elapsed")}
    for rank in found["ranks"]:
        rank["rng"] = rank["rng"]["torch"]
        for env in rank["envs"].get("envs", ()):
            del env["attributes"]["_np_random_seed"]  # Gymnasium's note of the first seed, which nothing reads
    return found


def finish(process, code=0, timeout=300):
    """(stdout, stderr) of a run that must end with `code`."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def alive(group: int) -> list[int]:
    """The processes of a group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def wait_for(condition, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.02)


def differences(a, b, path=""):
    """Names of the leaves in which two states differ, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [name for key in a for name in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple):
        assert len(a) == len(b), path
        return [name for i, (x, y) in enumerate(zip(a, b, strict=True)) for name in differences(x, y, f"{path}.{i}")]
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if equal else [path]


def check_sentence(code, err, words):
    """A user's mistake: exit code 2 and one line, with these words. A traceback has many."""
    lines = [line for line in err.splitlines() if not line.startswith("Warp CUDA warning")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, err)
    assert all(word in lines[0] for word in words), err


def undocumented(path: Path, cls: str) -> list[str]:
    """The fields of a dataclass that neither a comment behind them nor a docstring below them explains."""
    source = path.read_text()
    lines = source.splitlines()
    [body] = [node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == cls]
    found = []
    for field, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            comment = lines[field.end_lineno - 1].partition("  # ")[2]
            docstring = following.value.value if isinstance(following, ast.Expr) else ""
            if len(comment + docstring) <= 5:
                found.append(field.target.id)
    assert any(isinstance(node, ast.AnnAssign) for node in body)
    return found
