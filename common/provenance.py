"""Where a result comes from: commit, versions, hardware, memory."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "torch": "torch",
    "mujoco": "mujoco",
    "warp": "warp-lang",
    "gymnasium": "gymnasium",
    "numpy": "numpy",
}


def run_info() -> dict:
    """Commit, versions and hardware, as every result file states them."""
    return {"commit": git_commit(), "versions": versions(), "hardware": hardware()}


def git_commit() -> str:
    """The commit of this repository, with "-dirty" if tracked files differ from it; "unknown" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name, package in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def hardware() -> dict:
    """{"cpu": model, "cores": usable by this process, "gpus": names}."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": cores, "gpus": gpus}


def peak_memory_mb(device: str | torch.device = "cpu") -> float:
    """The most memory (MiB) this process held: resident on a CPU; on a GPU what torch allocated, simulator excluded."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
