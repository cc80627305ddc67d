"""Metrics to the terminal, TensorBoard and Weights & Biases under the same names; what a run leaves on the disk."""

import dataclasses
import json
import math
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from common.cli import RUN_INFO, fail, require
from common.files import tolerant, write_text
from common.provenance import run_info


class Logger:
    """One set of metrics for all readers. What the disk refuses costs a sentence, and is tried again the next time.

    run_dir: where the TensorBoard file goes.
    args: the script's settings; reads `track`, `wandb_project`, `wandb_entity` and `wandb_group`.
    total: the step at which training ends, in the unit of `log(step=...)`; `initial` is the step it starts from.
    enabled: False on every rank but 0, where all methods do nothing.
    """

    def __init__(self, run_dir: Path, args, total: int, initial: int = 0, enabled: bool = True):
        self.enabled = enabled
        self.wandb = self.bar = None
        if not enabled:
            return
        self.run_dir = Path(run_dir)
        self.events = self.run_dir / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        if args.track:
            self.wandb = _start_wandb(run_dir, args)
        else:
            # In a file or a pipe, where a line cannot be overwritten, twice a minute is enough.
            interval = 0.2 if sys.stderr.isatty() else 30.0
            bar_format = "{percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} {unit}, {elapsed} gone, {remaining} left"
            self.bar = tqdm(
                total=total, initial=initial, unit="steps", unit_scale=True, mininterval=interval, bar_format=bar_format
            )

    def progress(self, step: int) -> None:
        """Move the progress line to `step`."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def log(self, metrics: dict, step: int) -> None:
        """Send {name: number or tensor with one element} to every reader; all tensors cross from the device at once."""
        if not self.enabled:
            return
        metrics = to_numbers(metrics)
        with tolerant("TensorBoard's events", self.run_dir):
            append_events(self.events, metrics, step)
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)
        if self.bar is not None:
            self.progress(step)
            tqdm.write(format_table(metrics, step, shutil.get_terminal_size().columns), file=sys.stdout)
            sys.stdout.flush()

    def video(self, name: str, path: Path | None, step: int) -> None:
        """Send an mp4 (None: there is none) to Weights & Biases, if it is on; the file stays in the run's folder."""
        if self.wandb is not None and path is not None:
            import wandb

            with tolerant("a video for Weights & Biases", self.run_dir):
                self.wandb.log({name: wandb.Video(str(path), format="mp4")}, step=step)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()
        self.enabled = False
        self.wandb = self.bar = None


def _start_wandb(run_dir: Path, args):
    wandb = require("wandb", "wandb")
    try:
        run = wandb.init(
            project=args.wandb_project,
            entity=args.wandb_entity or None,
            group=args.wandb_group or None,
            name=os.environ.get("WANDB_NAME") or Path(run_dir).name,
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


def append_events(path: Path, metrics: dict[str, float], step: int) -> None:
    """Append one step to a file of TensorBoard, or leave the file as it was and raise OSError.

    The writer of torch does so in a thread, which a full disk kills with a traceback.
    """
    from tensorboard.compat.proto.event_pb2 import Event  # slow to import
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
    events = [Event(wall_time=time.time(), step=step, summary=Summary(value=values))]
    path.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size if path.exists() else 0
    if size == 0:
        events.insert(0, Event(wall_time=time.time(), file_version="brain.Event:2"))
    try:
        with open(path, "ab") as file:
            for event in events:
                RecordWriter(file).write(event.SerializeToString())
    except OSError:
        if path.exists():
            os.truncate(path, size)  # half a record would hide those after it
        raise


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
    """Create `--log-dir`, or `runs/{exp_name}/{env}__{seed}__{time}`, and write `args.yaml` into it. A folder with the
    checkpoints of another run, of which some would outlive this one's, is refused unless that is to be resumed.
    """
    if args.log_dir:
        run_dir = Path(args.log_dir)
        if not args.resume and any(run_dir.glob("checkpoints/[!.]*.pt")):
            fail(
                f"--log-dir got {args.log_dir!r}, which holds another run; it takes a new folder, and --resume that run"
            )
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


def drop_run_dir(run_dir: str | Path) -> None:
    """Removes the folder of a run that could not begin, in which nothing but its settings was written."""
    run_dir = Path(run_dir)
    if os.environ.get("RANK", "0") == "0" and [path.name for path in run_dir.glob("*")] == ["args.yaml"]:
        shutil.rmtree(run_dir)


def write_args(run_dir: Path, args) -> None:
    """Write every flag of the dataclass `args` to `run_dir/args.yaml`, with commit, versions and hardware.

    The file is itself valid for `--config`.
    """
    flags = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}
    settings = json.loads(json.dumps(flags, default=str))  # tuples become lists, paths text
    text = yaml.safe_dump(settings | {RUN_INFO: run_info()}, sort_keys=False)
    write_text(Path(run_dir) / "args.yaml", text)
