"""Independent agents: processes of one script, each with its own seed, environments and folder of a common run.

On GPUs all of them train at once, one GPU each in turn. On a CPU as many at once as there are cores, each confined to
its share of them, because two physics pools that spin against each other run ten times slower; the rest take turns.
"""

import collections
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import torch
import yaml

from common import checkpoint, cli, distributed
from common.files import tolerant, write_json
from common.provenance import run_info
from common.stats import mean_ci95

SHOWN = 15  # last lines of a crashed agent's stderr


def resume_all(Args: type, presets: dict, default_preset) -> None:
    """Where --resume names the folder of several agents, trains all of them further and ends the process."""
    args = cli.parse_args(Args, presets, default_preset)
    file = Path(args.resume) / "args.yaml"
    if not args.resume or not file.is_file() or "RANK" in os.environ:
        return
    if (yaml.safe_load(file.read_text()) or {}).get("num_agents", 1) > 1:
        try:
            distributed.check_device("cpu" if args.device == "auto" else args.device)
        except ValueError as error:
            cli.fail(str(error))
        train(file.parent, args.device, sys.argv[1:], resume=True)


def check(args) -> None:
    """The range of `args.num_agents`."""
    cli.check_flag(args, args.num_agents > 0, "num_agents", "a number above 0")
    cli.check_flag(args, args.num_agents == 1 or "RANK" not in os.environ, "num_agents", "1 under torchrun")


def train(run_dir: str | Path, device: str, flags: list[str] = (), resume: bool = False) -> NoReturn:
    """Trains the `num_agents` agents of `run_dir/args.yaml` and ends the process: exit code 1 if one of them crashed.

    flags: of the command line, above those of the file. resume: agents that have a checkpoint go on from it.
    SIGINT and SIGTERM reach all agents, which save and end; a second SIGINT ends them at once, with exit code 130.
    """
    run_dir = Path(run_dir)
    settings = yaml.safe_load((run_dir / "args.yaml").read_text())
    try:
        for number in range(settings["num_agents"]):
            (run_dir / f"agent_{number}").mkdir(exist_ok=True)
    except OSError as error:
        cli.fail(f"{run_dir / f'agent_{number}'} cannot be made ({error.strerror}); --log-dir takes another folder")
    gpus = _gpus(device)
    waiting, running, codes = list(range(settings["num_agents"])), [], {}
    free = [[] for _ in waiting] if gpus else _shares(len(waiting))
    began, interrupt, told = time.time(), checkpoint.Interrupt(), False
    try:
        while running or (waiting and not interrupt):
            if interrupt and not told:
                told = True
                for agent in running:
                    agent.process.terminate()
            while waiting and free and not interrupt:
                number = waiting.pop(0)
                words = [*flags, *_flags(number, run_dir, settings, "cuda" if gpus else "cpu", resume)]
                environment = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
                environment["WANDB_NAME"] = f"{settings['exp_name'].removeprefix('ppo_')}_agent_{number}"
                running.append(_Agent(run_dir / f"agent_{number}", words, environment, free.pop()))
            for agent in list(running):
                code = agent.process.poll()
                if code is not None:
                    running.remove(agent)
                    free.append(agent.cores)
                    early = told and code == -signal.SIGTERM  # before there was anything to save
                    codes[agent.folder] = 0 if early else code
                    agent.report(codes[agent.folder])
            time.sleep(0.1)
    except KeyboardInterrupt:
        print("\nstopped; what was saved is whole", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        for agent in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.process.pid, signal.SIGKILL)
    interrupt.restore()
    _summarise(run_dir, settings["num_agents"], codes, began)
    if told:
        print(f"stopped; continue with --resume {run_dir}")
    raise SystemExit(1 if any(codes.values()) else 0)


def _gpus(device: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES takes for each GPU that the agents share; none on a CPU."""
    if device == "cpu" or not torch.cuda.is_available():
        return []
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    index = None if device == "auto" else torch.device(device).index
    return names.split(",") if index is None else [names.split(",")[index]]


def _shares(num_agents: int) -> list[list[int]]:
    """The cores of each agent that trains at the same time; where the system does not say, the agents take turns."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    at_once = max(1, min(num_agents, len(cores)))
    return [cores[len(cores) * i // at_once : len(cores) * (i + 1) // at_once] for i in range(at_once)]


def _flags(number: int, run_dir: Path, settings: dict, device: str, resume: bool) -> list[str]:
    folder = run_dir / f"agent_{number}"
    begun = resume and any((folder / "checkpoints").glob("model_*.pt"))
    group = settings["wandb_group"] or run_dir.name
    flags = {"config": run_dir / "args.yaml", "num-agents": 1, "seed": settings["seed"] + number, "log-dir": folder}
    flags |= {"wandb-group": group, "device": device, "ranks": settings["ranks"], "resume": folder if begun else ""}
    return [f"--{name}={value}" for name, value in flags.items()]


class _Agent:
    """A process of this script with other flags. Its session is its own: Ctrl-C reaches it by `train` alone."""

    def __init__(self, folder: Path, flags: list[str], environment: dict, cores: list[int]):
        self.folder, self.cores = folder, cores
        self.errors = collections.deque(maxlen=SHOWN)
        libc = ctypes.CDLL(None)

        def prepare():
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan outlives this process
            if cores:
                os.sched_setaffinity(0, cores)

        self.process = subprocess.Popen(
            [sys.executable, sys.argv[0], *flags],
            env=os.environ | environment | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=prepare if sys.platform.startswith("linux") else None,
        )
        self._say(f"process {self.process.pid}", sys.stdout)
        streams = ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        self.readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in streams]
        for reader in self.readers:
            reader.start()

    def _read(self, stream, out):
        for line in filter(str.strip, stream):
            if out is sys.stderr:
                self.errors.append(line)
            self._say(line.rstrip(), out)

    def _say(self, line: str, out):
        out.write(f"{self.folder.name} | {line}\n")  # at once, as `print` does not
        out.flush()

    def report(self, code: int):
        """Says how it ended."""
        for reader in self.readers:
            reader.join(timeout=5)  # what it started itself may hold its stderr open
        if code == 0:
            return self._say("ended", sys.stdout)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        lines = "".join(f"    {line.rstrip()}\n" for line in self.errors)
        sys.stderr.write(f"error: {self.folder.name} {how}; the end of its stderr:\n{lines}")


def _summarise(run_dir: Path, num_agents: int, codes: dict[Path, int], began: float):
    """summary.json: of every figure in the summaries of the agents that finished, values, mean and 95% interval."""
    crashed = {folder.name: code for folder, code in codes.items() if code}
    found = {}
    for folder in sorted(codes.keys(), key=lambda folder: int(folder.name.removeprefix("agent_"))):
        path = folder / "summary.json"
        if not codes[folder] and path.is_file() and path.stat().st_mtime >= began:
            found[folder.name] = json.loads(path.read_text())
    figures = {}
    for name in next(iter(found.values()), {}):
        values = [summary.get(name) for summary in found.values()]
        if all(isinstance(value, float) for value in values):
            mean, half_width = mean_ci95(values)
            interval = [mean - half_width, mean + half_width]
            figures[name] = {"mean": mean, "ci95": interval, "values": dict(zip(found, values, strict=True))}
    with tolerant("summary.json", run_dir, "the agents' own summaries are whole"):
        head = {"agents": num_agents, "finished": list(found), "crashed": crashed}
        write_json(run_dir / "summary.json", head | {"figures": figures} | run_info())
    for name, figure in figures.items():
        if name.endswith("_rate"):
            print(f"{name}: {figure['mean']:.3f}, mean of {len(found)} agents")
    print(f"{len(found)} of {num_agents} agents finished, {len(crashed)} crashed; everything is in {run_dir}")
