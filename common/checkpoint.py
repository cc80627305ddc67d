"""Checkpoints that survive a crash at any moment, exact resume, clean interruption, ONNX export."""

import copy
import math
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from common import distributed
from common.cli import check, check_flag, fail, parse_args
from common.files import atomic, tolerant
from common.logger import drop_run_dir
from common.provenance import peak_memory_mb

# Settings of a run that its checkpoint does not pass on.
NOT_SAVED = ("device", "ranks", "resume", "eval_only", "model_path", "config")
# Settings that change what networks compute, but not the shapes of their weights, by which others are found out.
SHAPELESS = ("activation", "layer_norm", "log_std_min", "log_std_max", "v_min", "v_max")


def save(path: str | Path, state: dict) -> None:
    """Write `state` (tensors, numbers, text, containers of them) so that `path` is always a whole file, old or new."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


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
        check_networks(args, saved, flag)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        distributed.check_device(args.device)
    except ValueError as error:
        fail(str(error))
    if "WORLD_SIZE" in os.environ:  # torchrun
        args.ranks = int(os.environ["WORLD_SIZE"])
    return args


def check_networks(args, saved: dict, flag: str) -> None:
    """One sentence if the SHAPELESS settings of `args` are not the `saved` ones of the checkpoint that `flag` names."""
    for name in SHAPELESS:
        if name in saved and hasattr(args, name):
            takes = f"{saved[name]}, with which the policy of {flag} was trained"
            check_flag(args, getattr(args, name) == saved[name], name, takes)


def load_agent(agent: torch.nn.Module, state: dict, flag: str) -> None:
    """`agent.load_state_dict(state["agent"])`; one of other shapes ends with one sentence."""
    try:
        agent.load_state_dict(state["agent"])
    except RuntimeError:
        what = "a policy for another task, other observations or networks, such as --hidden"
        fail(f"{flag} got {what}; leave those flags as in training")


def begin_with(agent: torch.nn.Module, args, script: str) -> None:
    """A training's --model-path, a checkpoint or a run's folder: its networks and normalisers, nothing else of it."""
    if args.model_path and not args.resume:
        try:
            state = load(args.model_path, script)
            load_agent(agent, state, "--model-path")
            check_networks(args, state["args"], "--model-path")
        except SystemExit:
            drop_run_dir(args.log_dir)
            raise


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


class Run:
    """How far a training is, its folder of checkpoints, and what `--resume` continues.

    iteration, global_step: iterations and environment steps done, over all resumed parts.
    own: what this rank gave to `save` when the resumed checkpoint was written; None where the episodes begin anew: in a
        fresh run, and, with a warning, where the ranks or the environment's settings are others, or `exact` is False.
    """

    def __init__(self, script: str, args, learned: dict, settings: tuple[str, ...] = (), exact: bool = True):
        """learned: {name: object with `state_dict` and `load_state_dict`}, the same on every rank; "agent" is one.
        settings: names of the environment's flags. exact: whether the environment can restore its state.
        """
        self.script, self.args, self.learned = script, args, learned
        self.dir = Path(args.log_dir)
        self.newest = args.resume or "none"  # the last checkpoint that was written whole
        self.rank = int(os.environ.get("RANK", 0))
        self.iteration, self.global_step, self.elapsed, self.own = 0, 0, 0.0, None
        if args.resume:
            self._resume(load(args.resume, script, "cpu", "--resume"), settings, exact)
        self.start_time = time.time() - self.elapsed
        self.start_step = self.global_step
        self.log_time, self.log_step = time.time(), self.global_step

    def _resume(self, state: dict, settings: tuple[str, ...], exact: bool):
        lacks = ", ".join(sorted({*self.learned, "ranks"} - state.keys()))
        other = "--model-path evaluates its policy, or begins a training with it"
        check(not lacks, f"--resume got {self.args.resume!r}, which lacks {lacks} to go on with; {other}")
        for name, part in self.learned.items():
            if name == "agent":
                load_agent(part, state, "--resume")
            else:
                part.load_state_dict(state[name])
        if self.rank == 0:
            for unfinished in (self.dir / "checkpoints").glob(".model_*.pt"):  # of a process that was killed
                unfinished.unlink()
        self.iteration, self.global_step = state["iteration"], state["global_step"]
        self.elapsed, saved = state["elapsed"], state["args"]
        names = [n for n in ("num_envs", *settings) if n in saved and saved[n] != getattr(self.args, n)]
        changed = [f"--{name.replace('_', '-')}" for name in names]
        if len(state["ranks"]) != int(os.environ.get("WORLD_SIZE", 1)):
            changed.append("--ranks")
        if exact and not changed:
            self.own = state["ranks"][self.rank]
            set_rng_state(self.own["rng"])
        elif self.rank == 0:
            why = f"was written with other {', '.join(changed)}" if changed else "cannot hold the simulator's state"
            print(f"warning: the checkpoint {why}, so the episodes begin anew")

    def save(self, own: dict, *names: str):
        """Writes the checkpoints `names`; all ranks call it. `own`: this rank's environment and so on.

        One that the disk refuses costs a sentence, the final one ends the process with exit code 1.
        """
        ranks = distributed.gather(own | {"rng": rng_state()})
        if self.rank:
            return
        state = {"script": self.script, "args": asdict(self.args), "ranks": ranks}
        state |= {"iteration": self.iteration, "global_step": self.global_step}
        state |= {"elapsed": time.time() - self.start_time}
        state |= {name: part.state_dict() for name, part in self.learned.items()}
        for name in names:
            self._write(name, state)

    def keep_best(self, score: float, name: str):
        """Copies the checkpoint `name` to best_model.pt if its score is the highest so far, resumed parts included."""
        best = self.dir / "checkpoints" / "best_model.pt"
        if best.exists() and torch.load(best, mmap=True, weights_only=True).get("score", -math.inf) >= score:
            return
        if (best.parent / name).exists():
            self._write(best.name, load(best.parent / name, self.script) | {"score": score})

    def _write(self, name: str, state: dict):
        folder = self.dir / "checkpoints"
        with tolerant(name, folder, f"the newest whole checkpoint is {self.newest}"):
            save(folder / name, state)
            self.newest = name
            return
        if name == "final_model.pt":
            print(f"error: the final model is not saved; make room and --resume {self.dir}", file=sys.stderr)
            raise SystemExit(1)

    def steps_per_second(self) -> float:
        """Since the last call."""
        now, steps = time.time(), self.global_step - self.log_step
        rate = steps / (now - self.log_time)
        self.log_time, self.log_step = now, self.global_step
        return rate

    def summary(self, device) -> dict:
        wall = time.time() - self.start_time
        rate = (self.global_step - self.start_step) / (wall - self.elapsed)
        counts = {"iterations": self.iteration, "global_step": self.global_step}
        return counts | {"wall_seconds": wall, "SPS": rate, "peak_memory_mb": peak_memory_mb(device)}


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

    interrupt = Interrupt()
    for iteration in ...:
        ...
        if interrupt:
            break
    interrupt.restore()
    """

    def __init__(self):
        self.received, self.previous = False, {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def __bool__(self) -> bool:
        return self.received

    def restore(self) -> None:
        """The signals do again what they did before: after the loop nothing is left to save."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        # os.write, because print is not safe inside a signal handler.
        os.write(2, b"\nstopping: this iteration is finished and saved first; Ctrl-C again stops at once\n")


class _Named(torch.nn.Module):
    """`module`, which takes a dict, with one argument for each entry."""

    def __init__(self, module: torch.nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *tensors):
        return self.module(dict(zip(self.names, tensors, strict=True)))


def export_onnx(
    module: torch.nn.Module,
    example: torch.Tensor | tuple | dict,
    path: str | Path,
    inputs=("obs",),
    outputs=("actions",),
) -> None:
    """Write `module` as ONNX with a free batch size: by default a map from "obs" (batch, n) to "actions" (batch, m).

    A dict of observations becomes inputs of its keys' names. Of several `inputs` and `outputs`, those whose names end
    in "state" have their batch in dimension 1, as an LSTM's.
    The module is left as it was, in its mode and on its device.
    """
    module = copy.deepcopy(module).cpu().eval()
    has_memory = isinstance(example, tuple)
    if isinstance(example, dict):
        inputs = tuple(example)
        example = tuple(example.values())
        module = _Named(module, inputs)
    # The TorchScript exporter takes .2 s for an MLP and prints nothing; the one on torch.export takes 3 s.
    with atomic(path) as temporary, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            example if isinstance(example, tuple) else (example,),
            str(temporary),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: {int(has_memory and name.endswith("state")): "batch"} for name in (*inputs, *outputs)},
            dynamo=False,
        )
