"""Metrics to the terminal, TensorBoard and Weights & Biases under the same names; what a run leaves on the disk."""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from common.cli import RUN_INFO, fail, require

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "torch": "torch",
    "mujoco": "mujoco",
    "warp": "warp-lang",
    "gymnasium": "gymnasium",
    "numpy": "numpy",
}


class Logger:
    """One set of metrics for all readers.

    run_dir: where the TensorBoard file goes.
    args: the script's settings; reads `track`, `wandb_project`, `wandb_entity` and `wandb_group`.
    total: the step at which training ends, in the unit of `log(step=...)`; `initial` is the step it starts from.
    enabled: False on every rank but 0, where all methods do nothing.
    """

    def __init__(self, run_dir: Path, args, total: int, initial: int = 0, enabled: bool = True):
        self.writer = self.wandb = self.bar = None
        if not enabled:
            return
        if args.track:
            self.wandb = _start_wandb(run_dir, args)
        else:
            # In a file or a pipe, where a line cannot be overwritten, twice a minute is enough.
            interval = 0.2 if sys.stderr.isatty() else 30.0
            bar_format = "{percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} {unit}, {elapsed} gone, {remaining} left"
            self.bar = tqdm(
                total=total, initial=initial, unit="steps", unit_scale=True, mininterval=interval, bar_format=bar_format
            )
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.writer = SummaryWriter(run_dir)

    def progress(self, step: int) -> None:
        """Move the progress line to `step`."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def log(self, metrics: dict, step: int) -> None:
        """Send {name: number or tensor with one element} to every reader; all tensors cross from the device at once."""
        if self.writer is None:
            return
        metrics = to_numbers(metrics)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)
        if self.bar is not None:
            self.progress(step)
            tqdm.write(format_table(metrics, step, shutil.get_terminal_size().columns), file=sys.stdout)
            sys.stdout.flush()

    def video(self, name: str, path: Path, step: int) -> None:
        """Send an mp4 to Weights & Biases, if it is on; the file itself stays in the run's folder."""
        if self.wandb is not None:
            import wandb

            self.wandb.log({name: wandb.Video(str(path), format="mp4")}, step=step)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()
        self.writer = self.wandb = self.bar = None


def _start_wandb(run_dir: Path, args):
    wandb = require("wandb", "wandb")
    try:
        run = wandb.init(
            project=args.wandb_project,
            entity=args.wandb_entity or None,
            group=args.wandb_group or None,
            name=Path(run_dir).name,
            dir=str(run_dir),
            config=dataclasses.asdict(args),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (wandb.errors.Error, OSError) as error:
        reason = " ".join(str(error).split())
        fail(f"--track cannot start Weights & Biases ({reason}); run `wandb login` or set WANDB_MODE=offline")
    if not run.offline:
        print(f"tracking: {run.url}", flush=True)
    return run


def to_numbers(metrics: dict) -> dict[str, float]:
    """The same metrics as Python floats, with one transfer per device for all tensors."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, torch.Tensor)}
    numbers = {name: float(value) for name, value in metrics.items() if name not in tensors}
    for device in {value.device for value in tensors.values()}:
        names = [name for name, value in tensors.items() if value.device == device]
        dtype = torch.float32 if device.type == "mps" else torch.float64
        values = torch.stack([tensors[name].detach().reshape(()).to(dtype) for name in names])
        numbers.update(zip(names, values.tolist(), strict=True))
    return {name: numbers[name] for name in metrics}


def format_table(metrics: dict[str, float], step: int, width: int = 100) -> str:
    """A few lines of text: one paragraph per prefix, wrapped to `width` columns.

    charts     SPS 52,310   episodic_return 12.4
    losses     policy_loss -0.0123   value_loss 0.98
    """
    lines = [f"step {step:,}"]
    for prefix in dict.fromkeys(name.partition("/")[0] for name in metrics):
        line = f"  {prefix:<10}"
        for name, value in metrics.items():
            if name.partition("/")[0] != prefix:
                continue
            cell = f" {name.partition('/')[2] or name} {format_number(value)}  "
            if len(line) + len(cell.rstrip()) > max(width, 40):
                lines.append(line.rstrip())
                line = " " * 12
            line += cell
        lines.append(line.rstrip())
    return "\n".join(lines)


def format_number(value: float) -> str:
    """Thousands as 52,310, the rest with four significant digits."""
    if abs(value) >= 1000 and math.isfinite(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def make_run_dir(args, env_name: str) -> Path:
    """Create `--log-dir`, or `runs/{exp_name}/{env}__{seed}__{time}`, and write `args.yaml` into it."""
    if args.log_dir:
        run_dir = Path(args.log_dir)
    else:
        name = f"{env_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        run_dir = Path("runs", args.exp_name, name)
        copy = 1
        while run_dir.exists():
            copy += 1
            run_dir = Path("runs", args.exp_name, f"{name}-{copy}")
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.log_dir))
        write_args(run_dir, args)
    except OSError as error:
        fail(f"--log-dir got {str(run_dir)!r}, which cannot be written ({error.strerror}); it takes a folder")
    return run_dir


def write_args(run_dir: Path, args) -> None:
    """Write every setting of the dataclass `args` to `run_dir/args.yaml`, with commit, versions and hardware.

    The file is itself valid for `--config`.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(args), default=str))  # tuples become lists, paths text
    text = yaml.safe_dump(settings | {RUN_INFO: run_info()}, sort_keys=False)
    _write_text(Path(run_dir) / "args.yaml", text)


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


def mean_ci95(values) -> tuple[float, float]:
    """Mean and half width of its 95% interval (normal approximation); the width is NaN for fewer than two values."""
    values = torch.as_tensor(values).detach().double().flatten()
    if len(values) == 0:
        return math.nan, math.nan
    half_width = 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), half_width


def wilson_ci95(k: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval (lo, hi) for a rate of which `k` of `n` were seen; (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.96, k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half_width = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def write_json(path: str | Path, obj) -> None:
    """Write `obj` whole or not at all; tensors and arrays become lists, and numbers that are not finite null."""
    _write_text(Path(path), json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n")


def _plain(obj):
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = dataclasses.asdict(obj)
    if hasattr(obj, "tolist"):
        obj = obj.tolist()
    if isinstance(obj, dict):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return str(obj) if isinstance(obj, Path) else obj


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
