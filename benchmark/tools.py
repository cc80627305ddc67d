"""What the benchmark scripts share: flags, training as a subprocess, checkpoints, the result file."""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are run as files

import ppo_go2_mujoco as ppo
from common import checkpoint
from common.envs.go2 import Go2Config, Go2Env
from common.envs.go2_eval import evaluate
from common.files import write_json
from common.provenance import ROOT, run_info

WALK = {"command_vx": (0.3, 1.0), "command_vy": (0.0, 0.0), "command_yaw": (0.0, 0.0)}
WALK_ERROR = 0.15  # m/s; walking: not one fall in 128 episodes of 20 s and a mean velocity error below this
EVAL_SEED = 50_000  # no training run has it, nor one near it


def parser(doc: str) -> argparse.ArgumentParser:
    """Flags that every benchmark has. No abbreviations, as some scripts hand unknown flags to the training script."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results", help="folder of the JSON and plots")
    made.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmark", help="folder of the training runs")
    return made


def new_folder(args, name: str) -> Path:
    folder = args.runs.resolve() / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    return folder


def start(script: str, flags: list, log: Path, **popen) -> subprocess.Popen:
    """Starts `python script flags`, from the repository's root, with its output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    with open(log, "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **{"cwd": ROOT} | popen)


def finish(process: subprocess.Popen, log: Path):
    """Waits for `process`, and ends this one with the last lines of `log` if it failed."""
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code:
        raise SystemExit(f"{log} ended with code {code}:\n" + "\n".join(log.read_text().splitlines()[-15:]))


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """[(iteration, file)], oldest first."""
    found = (run_dir / "checkpoints").glob("model_*.pt")
    return sorted((int(path.stem.split("_")[1]), path) for path in found)


def logged_rate(folder: Path, warm_up_steps: int) -> float:
    """Steps per second between the TensorBoard entries of step `warm_up_steps` and of the last one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload().Scalars("charts/SPS")
    first, last = next(e for e in events if e.step >= warm_up_steps), events[-1]
    return (last.step - first.step) / (last.wall_time - first.wall_time)


def load_policy(path: Path) -> tuple[torch.nn.Module, ppo.Args, dict]:
    """(deterministic policy, the settings of its run, the whole checkpoint)."""
    state = checkpoint.load(path, ppo.SCRIPT, "cpu")
    args = ppo.Args(**{k: v for k, v in state["args"].items() if k in ppo.Args.__dataclass_fields__})
    agent = ppo.Agent(Go2Env(1, cfg=args, physics_threads=1), args)
    agent.load_state_dict(state["agent"])
    return agent, args, state


def evaluate_walk(policy, cfg: Go2Config, device: str = "cpu", episodes: int = 128, seed: int = EVAL_SEED) -> dict:
    """Eight forward velocities, and whether that counts as walking."""
    result = evaluate(policy, replace(cfg, **WALK), device, episodes, seed, counts=(8, 1, 1))
    result = shorten(result)
    result["walks"] = result["falls"] == 0 and result["lin_vel_error"] < WALK_ERROR
    return result


def evaluate_grid(policy, cfg: Go2Config, device: str = "cpu", episodes: int = 128, seed: int = EVAL_SEED) -> dict:
    """The whole grid of trained commands."""
    return shorten(evaluate(policy, cfg, device, episodes, seed))


def shorten(result: dict) -> dict:
    """`evaluate`'s result with, of the figures per episode, only the commands at which a robot fell."""
    grid = result.pop("grid")
    result["fallen_commands"] = [c for c, fell in zip(grid["command"], grid["fallen"], strict=True) if fell]
    if result["falls"] == result["episodes"]:  # then the errors are of the moments before the fall
        result["lin_vel_error"] = result["yaw_rate_error"] = float("nan")
    return result


def read_scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value)]} of the TensorBoard files of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def median(values) -> float | None:
    """None, and not a number (a seed that never got there, a policy that fell everywhere) count as the worst."""
    middle = statistics.median(math.inf if v is None or math.isnan(v) else v for v in values)
    return None if math.isinf(middle) else middle


def spread(values) -> dict:
    values = list(values)
    return {"median": median(values), "values": values}


def former(args, name: str, key: str) -> dict:
    """What `{name}.json` holds as `key`, and which command, date and commit that is from; {} without the file."""
    path = args.out / f"{name}.json"
    if not path.exists():
        return {}
    document = json.loads(path.read_text())
    found = document["figures"].get(key, {})
    if "rows" in found:
        return found
    return {"rows": found, "from": {name: document[name] for name in ("command", "date", "commit")}}


def write(args, name: str, seeds: list[int], num_envs, began: float, figures: dict, versions: dict | None = None):
    """Writes `{name}.json`: how it was measured, and `figures`."""
    words = sys.argv[1:]
    for flag in ("--out", "--runs", "--run"):  # they change no figure
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    for flag in ("--cleanrl", "--sb3", "--resume"):  # where these lie is of no interest
        if flag in words:
            words[words.index(flag) + 1] = Path(words[words.index(flag) + 1]).name
    info = run_info()
    info["versions"] |= versions or {}
    head = {"benchmark": name, "command": shlex.join(["python", f"benchmark/{name}.py", *words])}
    head |= {"date": time.strftime("%Y-%m-%d"), "minutes": (time.time() - began) / 60}
    write_json(args.out / f"{name}.json", head | info | {"seeds": seeds, "num_envs": num_envs, "figures": figures})
    print(f"wrote {args.out / f'{name}.json'}")
