"""ALOHA from pixels: how often the deterministic policy succeeds after the warm start and after PPO, on fresh starts.

    python benchmark/aloha.py --tasks AlohaTransferCube-v0 --seeds 1
    python benchmark/aloha.py --tasks AlohaInsertion-v0 --seeds 1 --run runs/...     # a run that was trained already

Both policies are evaluated in the fast environment, the last one also in the package's own, with its pictures. Unknown
flags go to ppo_aloha_cnn.py. Beside the figures: aloha.png, and with --keep-policy the weights of the last seed's
policy, for --eval-only. Results of tasks and seeds that were not asked for stay in the file.
"""

import json
import time
from pathlib import Path

import tools
import torch
from matplotlib.figure import Figure

import ppo_aloha_cnn as ppo
from common import checkpoint
from common.envs.aloha import AlohaEnv
from common.envs.aloha_eval import evaluate, plain

FLAGS = ["--bc-init"]
PATHS = ("log_dir", "resume", "model_path", "config")  # settings that say nothing of a run
CURVES = ("env/success", "env/highest_level", "charts/episodic_return", "losses/bc_loss", "charts/SPS")
STAGES = {"warm start": "model_0.pt", "PPO": "final_model.pt"}


def load_policy(path: Path) -> tuple[ppo.Agent, ppo.Args, dict]:
    """(deterministic policy, the settings of its run, the whole checkpoint)."""
    state = checkpoint.load(path, ppo.SCRIPT)
    fields = {name: field for name, field in ppo.Args.__dataclass_fields__.items() if field.init}
    args = ppo.Args(**{name: value for name, value in state["args"].items() if name in fields})
    args.task = ppo.TASKS[args.env_id]
    envs = AlohaEnv(1, "cpu", **plain(args))
    agent = ppo.Agent(envs, args)
    envs.close()
    agent.load_state_dict(state["agent"])
    return agent, args, state


def measure(run_dir: Path, episodes: dict[str, int], before: dict) -> dict:
    """Both policies of a run in `episodes` fresh episodes of each backend, and the curves of its training. Of a backend
    with none, the result `before` stays.
    """
    found = {}
    for stage, name in STAGES.items():
        path = run_dir / "checkpoints" / name
        agent, args, state = load_policy(path if path.exists() else checkpoint.latest(run_dir))
        found[stage] = dict(before.get(stage, {}))
        for backend, count in episodes.items():
            if not count or (backend == "gym-aloha" and stage != "PPO"):  # a step of the package's takes 80 ms
                continue
            result = evaluate(agent, args, "cpu", count, backend, tools.EVAL_SEED)
            low, high = result["success_ci95"]
            print(f"  {stage}, {backend}: {result['success_rate']:.1%} ({low:.1%} to {high:.1%})", flush=True)
            found[stage][backend] = result
    settings = {name: value for name, value in state["args"].items() if name not in PATHS}
    scalars = tools.read_scalars(run_dir)
    summary = json.loads((run_dir / "eval" / "model_0.json").read_text())
    kept = {name: value for name, value in summary.items() if name.startswith("warm_start")}
    kept |= {"global_step": state["global_step"], "iterations": state["iteration"], "wall_seconds": state["elapsed"]}
    curves = {name: scalars[name] for name in CURVES if name in scalars}
    return found | {"settings": settings, "summary": kept, "curves": curves}


def keep_policy(run_dir: Path, path: Path):
    """The settings and, in half precision, the weights of a run's last policy: what --eval-only needs."""
    state = checkpoint.load(checkpoint.latest(run_dir), ppo.SCRIPT)
    agent = {name: value.half() if value.dtype == torch.float32 else value for name, value in state["agent"].items()}
    kept = {name: state[name] for name in ("script", "args", "iteration", "global_step", "elapsed")}
    kept["args"] = {name: value for name, value in state["args"].items() if name not in PATHS}
    checkpoint.save(path, kept | {"agent": agent})
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


def plot(runs: dict, path: Path):
    """Success while training, of the sampling policy, and before and after it of the deterministic one."""
    figure = Figure(figsize=(4.5 * len(runs), 3.2), layout="constrained")
    for ax, (task, seeds) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        for seed, run in seeds.items():
            curve = run["curves"].get("env/success", [])
            line = ax.plot([step / 1000 for step, _ in curve], [value for _, value in curve], label=f"seed {seed}")
            for stage, step in (("warm start", 0), ("PPO", run["summary"]["global_step"] / 1000)):
                result = next(iter(run[stage].values()))
                low, high = result["success_ci95"]
                ax.plot([step, step], [low, high], color=line[0].get_color())
                ax.plot(step, result["success_rate"], "o", color=line[0].get_color())
        ax.set(xlabel="thousand steps of PPO after the warm start", ylim=(0, 1.02), title=task)
    figure.axes[0].set_ylabel("success; dots: deterministic policy")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--tasks", nargs="+", choices=list(ppo.TASKS), default=list(ppo.TASKS))
    parser.add_argument("--episodes", type=int, default=256, help="in the fast environment")
    parser.add_argument("--package-episodes", type=int, default=104, help="in the package's own; 0: none")
    parser.add_argument("--run", type=Path, help="folder of a finished or stopped run, instead of training one")
    parser.add_argument("--keep-policy", action="store_true", help="write the weights beside the figures")
    args, flags = parser.parse_known_args()
    began, folder = time.time(), tools.new_folder(args, "aloha")
    file = args.out / "aloha.json"
    runs = json.loads(file.read_text())["figures"]["runs"] if file.exists() else {}
    episodes = {"fast": args.episodes, "gym-aloha": args.package_episodes}
    for task in args.tasks:
        for seed in args.seeds:
            run_dir = args.run or folder / f"{task}_{seed}"
            command = ["--env-id", task, "--seed", seed, "--log-dir", run_dir, *FLAGS, *flags]
            print(f"{task}, seed {seed}", flush=True)
            if not args.run:
                log = run_dir.with_suffix(".log")
                tools.finish(tools.start("ppo_aloha_cnn.py", command, log), log)
            seeds = runs.setdefault(task, {})
            seeds[str(seed)] = measure(run_dir, episodes, seeds.get(str(seed), {}) if args.run else {})
            tools.write(args, "aloha", args.seeds, None, began, {"runs": runs})
            plot(runs, args.out / "aloha.png")
            if args.keep_policy:
                keep_policy(run_dir, args.out / f"aloha_{ppo.TASKS[task]}.pt")


if __name__ == "__main__":
    main()
