"""What it takes to break a training run: kill -9, resume, and a simulator that goes wild.

    python benchmark/go2_reliability.py --kills 20 --minutes 10

1. One run is killed again and again at random moments, in turn the whole process group and only rank 0, and continued
   from its folder each time. Every checkpoint must be readable, the run must continue with the iteration after the
   newest one, no more than one checkpoint interval may be lost, and no process may be left behind.
2. On one core, a run resumed from its middle must end bit for bit like the uninterrupted one.
3. Training with everything randomised far beyond its defaults, while non-finite and absurdly large values are written
   into the state of random robots; then training on physics that is unstable by itself. No non-finite value may leave
   the environment, spoil an update, or be found in a parameter, and every bad state must be counted as a nan_reset.

Writes down every violation under `failures` and exits with code 1 if there is one. Linux only (reads /proc).
"""

import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import tools
import torch

from common import checkpoint
from common.envs.go2 import Go2Env

SCRIPT, NUM_ENVS, NUM_STEPS, INTERVAL = "ppo_go2_mujoco.py", 64, 24, 2
BATCH = NUM_ENVS * NUM_STEPS  # steps of an iteration
SMALL = ["--preset", "laptop", "--num-envs", NUM_ENVS, "--num-steps", NUM_STEPS, "--no-save-video"]
WILD = "--randomise --friction-range 0.1 2 --mass-range 0.5 1.5 --payload-range -3 6 --strength-range 0.5 1.5"
WILD += " --gain-range 0.5 1.5 --latency-range 0 2 --push-interval 2 --push-velocity 2 --observation-noise 3"
UNSTABLE = "--randomise --action-scale 30 --kp 4000 --substeps 1 --solver-iterations 1 --termination-degrees 180"
INJECTED = {"qvel": (math.nan, math.inf, 1e30, 1e4), "qpos": (math.nan, -math.inf, 1e30)}  # m/s, m


# --- killed and resumed


def processes_of(session: int) -> list[int]:
    """Living processes of a session, that is, of one training run and whatever it started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it has just ended
        if int(sid) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def iterations_logged(log: Path, batch: int) -> list[int]:
    """The iterations that a run with --log-interval 1 says it has finished."""
    steps = re.findall(r"step ([\d,]+)\n", log.read_text())
    return [int(step.replace(",", "")) // batch for step in steps]


def start_and_kill(script: str, flags: list, batch: int, log: Path, kind: str, wait: float):
    """Starts training, and kills it `wait` seconds after its first iteration. Returns the processes left behind."""
    process = tools.start(script, flags, log, start_new_session=True)
    while not iterations_logged(log, batch):
        if process.poll() is not None:
            raise SystemExit(f"training ended by itself:\n{log.read_text()[-2000:]}")
        time.sleep(0.02)
    time.sleep(wait)
    (os.killpg if kind == "process group" else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.time() + 5
    while processes_of(process.pid) and time.time() < deadline:
        time.sleep(0.05)
    left = processes_of(process.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def kill_and_resume(
    folder: Path, kills: int, longest_wait: float, seed: int, flags: list, script: str = SCRIPT, batch: int = BATCH
) -> tuple[dict, list[str]]:
    """flags: of a run with two ranks, whose iterations take `batch` steps."""
    run_dir, rng, trials, failures = folder / "killed", random.Random(seed), [], []
    first_flags = [*flags, "--log-dir", run_dir, "--log-interval", 1, "--checkpoint-interval", INTERVAL]
    first_flags += ["--num-iterations", 1_000_000, "--ranks", 2]
    newest = 0  # iteration of the newest checkpoint
    for trial in range(kills):
        kind, log = ("process group", "rank 0")[trial % 2], folder / f"killed_{trial}.log"
        wait = rng.uniform(0, longest_wait)
        before = newest
        again = ["--resume", run_dir, "--ranks", 2]
        left = start_and_kill(script, again if newest else first_flags, batch, log, kind, wait)
        logged, saved, unreadable = iterations_logged(log, batch), tools.checkpoints(run_dir), []
        for _, path in saved:
            try:
                torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                unreadable.append(f"{path.name}: {error}")
        newest = max([i for i, _ in saved], default=0)
        row = {"killed": kind, "seconds_after_first_iteration": wait, "resumed_from": before, "first": logged[0]}
        row |= {"last": logged[-1], "newest_checkpoint": newest, "iterations_lost": max(0, logged[-1] - newest)}
        row |= {"unreadable": unreadable, "processes_left": len(left)}
        row |= {"unfinished_files": len(list((run_dir / "checkpoints").glob(".*")))}
        trials.append(row)
        wrong = {
            "an unreadable checkpoint": bool(unreadable),
            "a process left behind": bool(left),
            "not continued from the newest checkpoint": logged[0] != before + 1,
            "more than one interval lost": row["iterations_lost"] > INTERVAL,
        }
        failures += [f"kill {trial} ({kind}): {what}" for what, happened in wrong.items() if happened]
        print(f"kill {trial}, {kind}: iterations {logged[0]} to {logged[-1]}, newest checkpoint {newest}", flush=True)
        for _, path in saved[:-2]:
            path.unlink()
    log = folder / "killed_end.log"
    tools.finish(tools.start(script, ["--resume", run_dir, "--num-iterations", newest + 4], log), log)
    if not (run_dir / "checkpoints" / "final_model.pt").is_file():
        failures.append("the run that was killed did not end")
    lost = tools.spread(row["iterations_lost"] for row in trials)
    return {"kills": kills, "checkpoint_interval": INTERVAL, "iterations_lost": lost, "trials": trials}, failures


# --- bit for bit


def differences(a, b, path="") -> list[str]:
    """Where two checkpoints differ."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        return [] if same else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [path]
        return sum((differences(a[k], b[k], f"{path}/{k}") for k in a), [])
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [path]
        return sum((differences(x, y, f"{path}/{i}") for i, (x, y) in enumerate(zip(a, b, strict=True))), [])
    return [] if a == b else [path]


def resume_exactly(folder: Path, iterations: int) -> tuple[dict, list[str]]:
    def run(name: str, flags: list) -> dict:
        log = folder / f"{name}.log"
        one_core = {"preexec_fn": lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})}
        tools.finish(tools.start(SCRIPT, ["--log-dir", folder / name, *flags], log, **one_core), log)
        state = checkpoint.load(folder / name / "checkpoints" / "final_model.pt", tools.ppo.SCRIPT)
        return {k: v for k, v in state.items() if k not in ("elapsed", "args")}  # wall time, and where the run is

    figures, failures = {}, []
    settings = {"plain": "", "everything": "--randomise --commands full --observation proprioceptive --history 3"}
    for name, flags in settings.items():
        flags = [*SMALL, "--ranks", 1, "--num-iterations", iterations, "--checkpoint-interval", iterations // 2]
        flags += [*settings[name].split(), "--episode-seconds", 1]  # episodes end and begin within the run
        whole = run(f"whole_{name}", flags)
        middle = folder / f"whole_{name}" / "checkpoints" / f"model_{iterations // 2}.pt"
        resumed = run(f"resumed_{name}", ["--resume", middle, "--ranks", 1])
        found = differences(whole, resumed)
        tensors = sum(isinstance(v, torch.Tensor) for v in whole["agent"].values())
        figures[name] = {"iterations": iterations, "resumed_after": iterations // 2, "policy_tensors": tensors}
        figures[name] |= {"bit_for_bit": not found, "differences": found}
        failures += [f"resumed run, {name}: differs in {', '.join(found[:5])}"] if found else []
        print(f"resumed run, {name}: {'bit for bit equal' if not found else found[:5]}", flush=True)
    return figures, failures


# --- hostile training


def hostile(report: str, probability: float, flags: list[str]):
    """In the training's own process: spoils each robot's state with `probability` per step, watches what comes out."""
    step = Go2Env.step
    rank_of = lambda: int(os.environ.get("RANK", 0))  # noqa: E731
    choices = [(name, value) for name, values in INJECTED.items() for value in values]
    seen = {"steps": 0, "spoilt": 0, "largest_observation": 0.0}
    generator = torch.Generator().manual_seed(7)

    def watched_step(env, actions):
        if seen["steps"] == 0:
            generator.manual_seed(7 + rank_of())
        bad = (torch.rand(env.num_envs, generator=generator) < probability).nonzero().flatten()
        for i in bad.tolist():
            name, value = choices[int(torch.randint(len(choices), (), generator=generator))]
            field = getattr(env.physics, name)
            field[i, int(torch.randint(field.shape[1], (), generator=generator))] = value
        obs, reward, terminated, truncated, info = step(env, actions)
        for name, value in {"obs": obs, "reward": reward, "final_obs": info["final_obs"]}.items():
            if not value.isfinite().all():
                rows = int((~value.isfinite()).view(env.num_envs, -1).any(1).sum())
                print(f"\nNOT FINITE: {name} of {rows} robots after {seen['steps']} steps", flush=True)
                os._exit(1)  # an exception would have to wait for the other rank
        seen["steps"] += 1
        seen["spoilt"] += len(bad)
        seen["largest_observation"] = max(seen["largest_observation"], info["final_obs"].abs().max().item())
        if seen["steps"] % 24 == 0:
            Path(f"{report}_{rank_of()}.json").write_text(json.dumps(seen))
        return obs, reward, terminated, truncated, info

    Go2Env.step = watched_step
    script = str(tools.ROOT / SCRIPT)
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


def train_hostile(folder: Path, name: str, minutes: float, probability: float, flags: list) -> tuple[dict, list[str]]:
    run_dir, log, report = folder / name, folder / f"{name}.log", folder / f"{name}_report"
    command = ["hostile", report, probability, "--preset", "laptop", "--log-dir", run_dir, "--no-save-video"]
    command += ["--num-iterations", 1_000_000, "--checkpoint-interval", 1_000_000, "--log-interval", 5, *flags]
    # MuJoCo appends its warnings to a file in the current folder.
    process = tools.start("benchmark/go2_reliability.py", command, log, cwd=folder, start_new_session=True)
    while process.poll() is None and not re.search(r"step [\d,]+\n", log.read_text()):
        time.sleep(0.2)
    deadline = time.time() + 60 * minutes
    while process.poll() is None and time.time() < deadline:
        time.sleep(0.2)
    process.terminate()  # it finishes its iteration, saves and leaves
    try:
        code, failures = process.wait(120), []
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        code, failures = "none, two minutes after SIGTERM", []
    if code:
        line = next((x for x in log.read_text().splitlines() if "NOT FINITE" in x), f"it ended with code {code}")
        print(f"{name}: {line}", flush=True)
        return {"failed": line}, [f"{name}: {line}"]
    scalars, state = tools.read_scalars(run_dir), tools.load_policy(tools.checkpoints(run_dir)[-1][1])[2]
    values = [*state["agent"].values()]
    values += [v for s in state["optimizer"]["state"].values() for v in s.values() if isinstance(v, torch.Tensor)]
    finite = all(bool(v.isfinite().all()) for v in values)
    bad_scalars = [tag for tag, points in scalars.items() if not all(math.isfinite(v) for _, v in points)]
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}_report_*.json"))]
    figures = {
        "flags": " ".join(map(str, flags)),
        "minutes": minutes,
        "steps": state["global_step"],
        "states_spoilt": sum(r["spoilt"] for r in reports),  # up to the ranks' last report
        "nan_resets": scalars["charts/nan_resets"][-1][1],
        "nan_updates": scalars["charts/nan_updates"][-1][1],
        "largest_observation": max((r["largest_observation"] for r in reports), default=None),
        "parameters_finite": finite,
        "episodic_length_at_end": scalars["charts/episodic_length"][-1][1],
        "metrics_not_finite": bad_scalars,
    }
    failures += [f"{name}: {figures['nan_updates']:.0f} updates spoilt"] if figures["nan_updates"] else []
    failures += [f"{name}: a parameter is not finite"] if not finite else []
    failures += [f"{name}: not finite: {', '.join(bad_scalars)}"] if bad_scalars else []
    failures += [f"{name}: no nan_reset, so nothing was tested"] if not figures["nan_resets"] else []
    print(f"{name}: {figures}", flush=True)
    return figures, failures


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest-wait", type=float, default=5.0, help="s between the first iteration and the kill")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    parser.add_argument("--iterations", type=int, default=40, help="of the run that is resumed exactly")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training with everything randomised")
    parser.add_argument("--unstable-minutes", type=float, default=2.0, help="of training on unstable physics")
    args, flags = parser.parse_known_args()
    began, folder, failures = time.time(), tools.new_folder(args, "go2_reliability"), []
    small = [*SMALL, *flags]
    parts = {
        "killed_and_resumed": lambda: kill_and_resume(folder, args.kills, args.longest_wait, args.seed, small),
        "resumed_bit_for_bit": lambda: resume_exactly(folder, args.iterations),
        "randomised_and_spoilt": lambda: train_hostile(folder, "wild", args.minutes, 1e-4, [*WILD.split(), *flags]),
        "unstable": lambda: train_hostile(folder, "unstable", args.unstable_minutes, 0.0, [*UNSTABLE.split(), *flags]),
    }
    figures = {}
    for name, measure in parts.items():
        figures[name], found = measure()
        failures += found
    figures = {"failures": failures} | figures
    tools.write(args, "go2_reliability", [1], NUM_ENVS, began, figures)
    if failures:
        raise SystemExit("\n".join(failures))
    shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["hostile"]:
        hostile(sys.argv[2], float(sys.argv[3]), sys.argv[4:])
    else:
        main()
