"""Pick-and-place by SAC, PPO and DDPG: success of the deterministic policies on fresh seeds, in steps and in minutes.

    python benchmark/real2sim.py --algorithms sac --seeds 1 2 3
    python benchmark/real2sim.py --algorithms ppo ddpg --seeds 1
    python benchmark/real2sim.py --algorithms sac_compact --seeds 1            # without the joints' state
    python benchmark/real2sim.py --algorithms sac_scans --seeds 1 --resume runs/.../sac_1 --total-timesteps 800_000
    python benchmark/real2sim.py --algorithms ppo_scans ppo_place --seeds 1 --model-path runs/.../ppo_1
    python benchmark/real2sim.py --algorithms sac --seeds 1 --run runs/...     # a run that was trained already
    python benchmark/real2sim.py --algorithms cleanrl --cleanrl FOLDER/cleanrl/sac_continuous_action.py --minutes 15

Every run has its script's own preset and is evaluated on the way (`--eval-interval`), which costs minutes that are
counted. Unknown flags go to the scripts. Results of algorithms and seeds that were not asked for stay in the file.
Success: the object is at the goal when the episode's time is up. With --per-object the last policy also meets each of
the examples alone, those it was not trained on as well, and the box as a cloud of 20,000 noisy points. `sac_scans`
and `ppo_scans` train with three of the examples at once; with --resume or --model-path they go on from a run with the
box. `ppo_place` sets the box down elsewhere, and goes on from a run that holds it; `ppo_place_on` goes on from that.

The peer is CleanRL's own script at its own settings with 8 environments, which are one batch of our worlds;
real2sim_peer.py lists the patches. It trains for `--minutes`, and its policies are evaluated afterwards, for nothing.
`cpu_minutes` are those of the training process, imports and evaluations included: they say what a run costs on a
machine that has other work as well.
"""

import importlib
import json
import os
import resource
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import isaac_peers
import real2sim_peer
import tools
from matplotlib.figure import Figure

from common import checkpoint
from common.envs.real2sim import Real2SimConfig, Real2SimEnv
from common.envs.real2sim_eval import evaluate, plain
from common.meshes import EXAMPLES, write_examples
from common.provenance import ROOT

# What the plot compares; scans, place and compact are other tasks.
COLOURS = {"sac": "tab:blue", "sac_gamma_0.97": "lightsteelblue", "ppo": "tab:orange", "ddpg": "tab:green"}
COLOURS |= {"ddpg_gamma_0.9": "lightgreen", "cleanrl": "tab:red"}
LABELS = {"sac": "SAC", "sac_gamma_0.97": "SAC, gamma 0.97", "ppo": "PPO", "ddpg": "DDPG", "cleanrl": "CleanRL's SAC"}
LABELS |= {"ddpg_gamma_0.9": "DDPG, gamma 0.9"}
# {name: (script, flags beside its preset's)}
ALGORITHMS = {name: (f"{name}_real2sim_mjx", []) for name in ("sac", "ppo", "ddpg")}
SCANS = ["--objects", "box", "mug", "bunny"]
ALGORITHMS["sac_scans"] = ("sac_real2sim_mjx", SCANS)
ALGORITHMS["ppo_scans"] = ("ppo_real2sim_mjx", [*SCANS, "--held-out", "bottle"])
ALGORITHMS["ppo_place"] = ("ppo_real2sim_mjx", ["--task", "place", "--num-iterations", 220])
ALGORITHMS["ppo_place_on"] = ("ppo_real2sim_mjx", ["--task", "place", "--num-iterations", 60, "--learning-rate", 2e-4])
ALGORITHMS["sac_gamma_0.97"] = ("sac_real2sim_mjx", ["--gamma", 0.97])
ALGORITHMS["ddpg_gamma_0.9"] = ("ddpg_real2sim_mjx", ["--gamma", 0.9])
ALGORITHMS["ddpg_anneal"] = ("ddpg_real2sim_mjx", ["--gamma", 0.9, "--anneal-lr"])
ALGORITHMS["sac_compact"] = ("sac_real2sim_mjx", ["--observation", "compact"])
PEER = "cleanrl"
PEER_ENVS = 8
CURVE_EPISODES = 256  # of each point on the peer's curve, as in our scripts' preset
GOAL = 0.9  # success that counts as learned
KEYS = ("episodes", "success_rate", "success_ci95", "success_once_rate", "fallen_rate")  # of shorter results


def measure(run_dir, script: str, args) -> dict:
    """The last policy of a run on fresh seeds, and the success of the policies on the way to it. `best`: that of the
    policy which the run's own evaluations liked best, on the same fresh seeds.
    """
    module = importlib.import_module(script)
    state = checkpoint.load(run_dir, script)
    trained = module.Args(**{name: v for name, v in state["args"].items() if name in module.Args.__dataclass_fields__})
    envs = Real2SimEnv(1, "cpu", cfg=trained)
    agent = module.Agent(envs, trained)
    envs.close()
    agent.load_state_dict(state["agent"])
    cfg = replace(plain(trained), backend="mujoco")
    result = evaluate(agent, cfg, "cpu", args.episodes, tools.EVAL_SEED)
    say("all its objects" if len(cfg.objects) > 1 else cfg.objects[0], result)
    if args.per_object:
        result["per_object"] = measure_objects(agent, cfg, args)
    best = Path(run_dir) / "checkpoints" / "best_model.pt"
    if best.exists():
        chosen = checkpoint.load(best, script)
        agent.load_state_dict(chosen["agent"])
        found = evaluate(agent, cfg, "cpu", args.episodes, tools.EVAL_SEED)
        say("best checkpoint", found)
        result["best"] = {"steps": chosen["global_step"], "minutes": chosen["elapsed"] / 60}
        result["best"] |= {key: found[key] for key in KEYS}
    scalars = tools.read_scalars(run_dir)
    seconds = dict(scalars["charts/elapsed"])
    curve = []
    for step, success in scalars.get("eval/success_rate", []):
        near = min(seconds, key=lambda logged: abs(logged - step))
        curve.append({"steps": step, "minutes": seconds[near] * step / near / 60, "success_rate": success})
    summary = {"steps": state["global_step"], "minutes": state["elapsed"] / 60, "num_envs": trained.num_envs}
    summary |= {"ranks": len(state["ranks"]), "learned_at": learned_at(curve)}
    return {"evaluation": result, "summary": summary, "curve": curve}


def measure_objects(agent, cfg: Real2SimConfig, args) -> dict[str, dict]:
    """{object: success with it alone}, of the examples and of the box as a point cloud."""
    scans = write_examples(args.runs.resolve() / "scans")
    [cloud] = [path for path in scans if path.suffix == ".ply"]
    found = {}
    for name in (*EXAMPLES, str(cloud)):
        alone = replace(cfg, objects=(name,), held_out=())
        result = evaluate(agent, alone, "cpu", args.episodes, tools.EVAL_SEED)
        found[Path(name).stem] = {"trained": name in cfg.objects} | {key: result[key] for key in KEYS}
        say(Path(name).stem, result)
    return found


def measure_peer(run_dir: Path, args) -> dict:
    """`measure` of CleanRL's run."""
    cfg = Real2SimConfig(observation=real2sim_peer.OBSERVATION, backend="mujoco")
    policies = real2sim_peer.policies(run_dir)
    if not policies:
        raise SystemExit(f"{run_dir} holds no policy; give CleanRL more --minutes")
    curve = []
    for when, policy in policies[:-1]:
        result = evaluate(policy, cfg, "cpu", CURVE_EPISODES, tools.EVAL_SEED)
        curve.append(when | {"success_rate": result["success_rate"]})
    when, policy = policies[-1]
    result = evaluate(policy, cfg, "cpu", args.episodes, tools.EVAL_SEED)
    say("box", result)
    summary = when | {"num_envs": PEER_ENVS, "ranks": 1, "learned_at": learned_at(curve)}
    return {"evaluation": result, "summary": summary, "curve": curve}


def learned_at(curve: list[dict]) -> dict | None:
    return next((point for point in curve if point["success_rate"] >= GOAL), None)


def say(objects: str, result: dict):
    low, high = result["success_ci95"]
    words = f"success {result['success_rate']:.1%} ({low:.1%} to {high:.1%}) of {result['episodes']}"
    print(f"  {objects}: {words}", flush=True)


def peer_script(path: Path, folder: Path) -> tuple[Path, dict]:
    """(a patched copy of CleanRL's script in `folder`, with its package beside it, what to say of it)."""
    script, about = isaac_peers.cleanrl_script(path, folder, "sac_continuous_action.py", real2sim_peer.PATCHES)
    (folder / "cleanrl_utils").symlink_to(path.resolve().parents[1] / "cleanrl_utils")
    return script, about


def train_peer(script: Path, seed: int, run_dir: Path, minutes: float):
    """CleanRL's script in `run_dir` until its time is up."""
    run_dir.mkdir(parents=True)
    modules = [script.parent, ROOT / "benchmark", ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, modules)), "OMP_NUM_THREADS": "1"}
    flags = ["--seed", seed, "--num-envs", PEER_ENVS, "--no-cuda", "--total-timesteps", 10**9]
    log = run_dir.with_suffix(".log")
    process = tools.start(script, flags, log, cwd=run_dir, env=environment)
    try:
        process.wait(60 * minutes)
        raise SystemExit(f"{log} ended before its time:\n" + "\n".join(log.read_text().splitlines()[-15:]))
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.terminate()
        process.wait()


def children_minutes() -> float:
    """CPU time of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) / 60


def plot(runs: dict, path: Path):
    """Success against environment steps, and against minutes, a line per run."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, key, label, scale in zip(
        figure.subplots(1, 2, sharey=True), ("steps", "minutes"), ("million steps", "minutes"), (1e6, 1), strict=True
    ):
        for algorithm in (name for name in COLOURS if name in runs):
            for number, run in enumerate(runs[algorithm].values()):
                last = run["summary"] | {"success_rate": run["evaluation"]["success_rate"]}
                points = [{"steps": 0, "minutes": 0, "success_rate": 0.0}, *run["curve"], last]
                style = {"color": COLOURS[algorithm], "label": LABELS[algorithm] if number == 0 else None}
                axes.plot([p[key] / scale for p in points], [p["success_rate"] for p in points], **style)
        axes.axhline(GOAL, color="grey", linewidth=0.8, linestyle="--")
        axes.set(xlabel=label, ylim=(0, 1.02), xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("success, deterministic policy")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--algorithms", nargs="+", choices=[*ALGORITHMS, PEER], default=["sac", "ppo", "ddpg"])
    parser.add_argument("--episodes", type=int, default=512)
    parser.add_argument("--resume", type=Path, help="folder or checkpoint of a run to go on from")
    parser.add_argument("--per-object", action="store_true", help="also success with each of the examples alone")
    parser.add_argument("--cleanrl", type=Path, help="CleanRL's sac_continuous_action.py, in its repository")
    parser.add_argument("--minutes", type=float, default=15, help="how long CleanRL's script trains")
    parser.add_argument("--run", type=Path, help="folder of a finished or stopped run, instead of training one")
    args, flags = parser.parse_known_args()
    began, folder = time.time(), tools.new_folder(args, "real2sim")
    file = args.out / "real2sim.json"
    runs = json.loads(file.read_text())["figures"]["runs"] if file.exists() else {}
    if PEER in args.algorithms:
        if args.cleanrl is None:
            parser.error("--algorithms cleanrl needs --cleanrl FILE, CleanRL's cleanrl/sac_continuous_action.py")
        peer, about = peer_script(args.cleanrl, folder / "peer")
    for algorithm in args.algorithms:
        for seed in args.seeds:
            run_dir = args.run or folder / f"{algorithm}_{seed}"
            print(f"{algorithm}, seed {seed}", flush=True)
            before = children_minutes()
            if algorithm == PEER:
                if not args.run:
                    train_peer(peer, seed, run_dir, args.minutes)
                run = {"cleanrl": about} | measure_peer(run_dir, args)
            else:
                name, own = ALGORITHMS[algorithm]
                if not args.run:
                    log = run_dir.with_suffix(".log")
                    command = ["--seed", seed, "--log-dir", run_dir, "--no-save-video", *own, *flags]
                    command += ["--resume", args.resume.resolve()] if args.resume else []
                    tools.finish(tools.start(f"{name}.py", command, log), log)
                run = {"flags": [*own, *flags], "resumed": bool(args.resume)} | measure(run_dir, name, args)
                run["summary"]["cpu_minutes"] = None if args.run else children_minutes() - before
            runs.setdefault(algorithm, {})[str(seed)] = run
            tools.write(args, "real2sim", args.seeds, None, began, {"runs": runs})
            plot(runs, args.out / "real2sim.png")


if __name__ == "__main__":
    main()
