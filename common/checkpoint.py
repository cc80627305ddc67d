"""Checkpoints that survive a crash at any moment, random-number state, clean interruption, ONNX export."""

import os
import random
import re
import signal
import threading
import warnings
from pathlib import Path

import numpy as np
import torch

from common.cli import check, fail, parse_args

# Settings of a run that its checkpoint does not pass on.
NOT_SAVED = ("device", "ranks", "resume", "eval_only", "model_path", "config", "batch_size", "minibatch_size")


def save(path: str | Path, state: dict) -> None:
    """Write `state` (tensors, numbers, text, containers of them) so that `path` is always a whole file, old or new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load(path: str | Path, script: str, device: str | torch.device = "cpu", flag: str = "--model-path") -> dict:
    """The state saved by `script` (`state["script"]`), on `device`; anything else ends with one sentence, exit code 2.

    path: a checkpoint, or a folder whose `latest` checkpoint is meant. `flag` is the one named in the sentence.
    """
    path = latest(path, flag) if Path(path).is_dir() else Path(path)
    check(path.is_file(), f"{flag} got {str(path)!r}, which is no file; it takes a checkpoint such as model_100.pt")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # torch raises a dozen types for a damaged file
        fail(f"{flag} got {str(path)!r}, which is damaged or no checkpoint; it takes a file that {script} saved")
    owner = state.get("script") if isinstance(state, dict) else None
    check(
        owner == script,
        f"{flag} got {str(path)!r}, a checkpoint of {owner or 'another program'}; it takes one of {script}",
    )
    return state


def parse_run_args(Args, script: str, presets: dict, default_preset, not_saved=(), unknown: list[str] | None = None):
    """`cli.parse_args` for a training script; `device` and, under torchrun, `ranks` come back as they will be.

    With --resume or --eval-only the checkpoint's settings stand in for the preset, except those of NOT_SAVED and
    `not_saved`; `args.resume` or `args.model_path` is then the checkpoint's file.
    """
    args = parse_args(Args, presets, default_preset, unknown=unknown)
    if args.resume or args.eval_only:
        check(args.resume or args.model_path, "--eval-only needs --model-path, a checkpoint or a run's folder")
        flag = "--resume" if args.resume else "--model-path"
        path = str(latest(args.resume or args.model_path, flag))
        saved = load(path, script, "cpu", flag)["args"]
        if Path(path).parent.name == "checkpoints":  # a run goes on where it is, even if it was moved
            saved["log_dir"] = str(Path(path).parent.parent)
        if unknown is not None:
            unknown.clear()
        saved = {k: v for k, v in saved.items() if k not in (*NOT_SAVED, *not_saved)}
        args = parse_args(Args, saved=saved, unknown=unknown)
        args.resume, args.model_path = (path, "") if args.resume else ("", path)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if "WORLD_SIZE" in os.environ:  # torchrun
        args.ranks = int(os.environ["WORLD_SIZE"])
    return args


def load_agent(agent: torch.nn.Module, state: dict, flag: str) -> None:
    """`agent.load_state_dict(state["agent"])`; one of other shapes ends with one sentence."""
    try:
        agent.load_state_dict(state["agent"])
    except RuntimeError:
        what = "a policy for another task, other observations or networks, such as --hidden"
        fail(f"{flag} got {what}; leave those flags as in training")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, flag: str = "--resume") -> None:
    """`optimizer.load_state_dict(state)`; one of other parameters, as older versions saved, ends with one sentence."""
    try:
        optimizer.load_state_dict(state)
    except ValueError:
        fail(f"{flag} got a checkpoint of an older version; it takes one of this version")


def latest(path: str | Path, flag: str = "--resume") -> Path:
    """The checkpoint to resume from: `path` itself if a file, else the newest readable `model_{iteration}.pt` of a run.

    path: a checkpoint, a folder of checkpoints, or a run's folder (which holds them in `checkpoints/`).
    """
    path = Path(path)
    if path.is_file():
        return path
    check(path.is_dir(), f"{flag} got {str(path)!r}, which does not exist; it takes a checkpoint or a run's folder")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    numbered = [(int(m[1]), file) for file in folder.iterdir() if (m := re.fullmatch(r"model_(\d+)\.pt", file.name))]
    for _, file in sorted(numbered, reverse=True):
        try:
            torch.load(file, map_location="cpu", weights_only=True)
            return file
        except Exception:
            print(f"warning: {file} is damaged and is passed over", flush=True)
    takes = "a checkpoint or a run's folder"
    fail(f"{flag} got {str(path)!r}, which holds no readable model_{{iteration}}.pt; it takes {takes}")


def rng_state() -> dict:
    """The state of the generators of Python, NumPy, torch and every CUDA device, loadable with `weights_only=True`."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """Restore `rng_state()`; CUDA states are skipped where the number of devices differs."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


class Interrupt:
    """True after SIGINT or SIGTERM, so that a loop can finish its iteration, save and leave; a second SIGINT raises.

    with Interrupt() as interrupt:
        for iteration in ...:
            ...
            if interrupt:
                break
    """

    def __init__(self):
        self.received = False

    def __bool__(self) -> bool:
        return self.received

    def __enter__(self) -> "Interrupt":
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        # os.write, because print is not safe inside a signal handler.
        os.write(2, b"\nstopping: this iteration is finished and saved first; Ctrl-C again stops at once\n")


def export_onnx(
    module: torch.nn.Module, example: torch.Tensor | tuple, path: str | Path, inputs=("obs",), outputs=("actions",)
) -> None:
    """Write `module` as ONNX with a free batch size: by default a map from "obs" (batch, n) to "actions" (batch, m).

    With more inputs and outputs, those whose names end in "state" have their batch in dimension 1, as an LSTM's.
    The module is left as it was, in its mode and on its device.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    training = module.training
    try:
        # The TorchScript exporter takes .2 s for an MLP and prints nothing; the one on torch.export takes 3 s.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(),
                example if isinstance(example, tuple) else (example,),
                str(temporary),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes={name: {int(name.endswith("state")): "batch"} for name in (*inputs, *outputs)},
                dynamo=False,
            )
        os.replace(temporary, path)
    finally:
        module.train(training)
        temporary.unlink(missing_ok=True)
