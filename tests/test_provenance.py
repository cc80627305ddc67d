"""Results say where they come from."""

import re

import torch

from common import provenance


def test_run_info():
    info = provenance.run_info()
    assert info["versions"]["torch"] == torch.__version__ and info["hardware"]["cores"] >= 1
    assert set(info["versions"]) == {"python", "torch", "mujoco", "warp", "gymnasium", "numpy"}
    assert info["commit"] == "unknown" or re.fullmatch("[0-9a-f]{40}(-dirty)?", info["commit"])


def test_commit_is_unknown_outside_git(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.git_commit() == "unknown"


def test_a_package_that_is_missing_has_no_version(monkeypatch):
    monkeypatch.setitem(provenance.PACKAGES, "absent", "no-such-package")
    assert provenance.versions()["absent"] == "none"


def test_peak_memory():
    assert 20 < provenance.peak_memory_mb() < 100_000
