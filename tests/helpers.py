"""What the tests of whole runs share: waiting for processes, and comparing what they saved."""

import ast
import os
import signal
import subprocess
import time
from pathlib import Path

import torch


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
