"""ALOHA from pixels: how often the deterministic policy succeeds after the warm start and after PPO, on fresh starts.

    python benchmark/aloha.py --tasks AlohaTransferCube-v0 --seeds 1
    python benchmark/aloha.py --tasks AlohaInsertion-v0 --seeds 1 --run runs/...     # a run that was trained already
    python benchmark/aloha.py --tasks AlohaInsertion-v0 --seeds 1 --demo-resets --obs-type state --bc-coef 0

Both policies are evaluated in the fast environment, with and without shadows and soft edges, the last one also in the
package's own, with its pictures. With --demo-resets there is no warm start, and what is measured is how far the reverse
curriculum gets. Unknown flags go to ppo_aloha_cnn.py. Beside the figures: aloha.png, and with --keep-policy the weights
of the last seed's policy, for --eval-only. Results of tasks and seeds that were not asked for stay in the file.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import tools
import torch
from matplotlib.figure import Figure

import ppo_aloha_cnn as ppo
from common import checkpoint
from common.envs.aloha import TASKS, AlohaEnv
from common.envs.aloha_demos import Curriculum
from common.envs.aloha_eval import evaluate, plain

PATHS = ("log_dir", "resume", "model_path", "config")  # settings that say nothing of a run
CURVES = ("env/success", "env/highest_level", "charts/episodic_return", "losses/bc_loss", "charts/SPS")
CURVES += ("charts/frontier",)
STAGES = {"warm start": "model_0.pt", "PPO": "final_model.pt"}
# {name in the figures: (environment, settings that differ from the training's)}
PICTURES = {
    "fast": ("fast", {"samples": 0, "supersample": 1, "shadows": False}),
    "fast with shadows": ("fast", {"samples": 4, "supersample": 1, "shadows": True, "mesh_detail": 0.006}),
    "gym-aloha": ("gym-aloha", {}),
}


def load_policy(path: Path) -> tuple[ppo.Agent, ppo.Args, dict]:
    """(deterministic policy, the settings of its run, the whole checkpoint)."""
    state = checkpoint.load(path, ppo.SCRIPT)
    fields = ppo.Args.__dataclass_fields__
    args = ppo.Args(**{name: value for name, value in state["args"].items() if name in fields})
    envs = AlohaEnv(1, "cpu", **plain(args))
    agent = ppo.Agent(envs, args)
    envs.close()
    agent.load_state_dict(state["agent"])
    return agent, args, state


def measure(run_dir: Path, episodes: dict[str, int], before: dict) -> dict:
    """Both policies of a run in `episodes` fresh episodes with each of the PICTURES, and the curves of its training. Of
    those with no episodes, the result `before` stays.
    """
    found = {}
    for stage, name in STAGES.items():
        path = run_dir / "checkpoints" / name
        agent, args, state = load_policy(path if path.exists() else checkpoint.latest(run_dir))
        found[stage] = dict(before.get(stage, {}))
        for kind, count in episodes.items():
            if not count or (kind == "gym-aloha" and stage != "PPO"):  # a step of the package's takes 80 ms
                continue
            backend, settings = PICTURES[kind]
            result = evaluate(agent, replace(args, **settings), "cpu", count, backend, tools.EVAL_SEED)
            low, high = result["success_ci95"]
            print(f"  {stage}, {kind}: {result['success_rate']:.1%} ({low:.1%} to {high:.1%})", flush=True)
            found[stage][kind] = result
    scalars = tools.read_scalars(run_dir)
    summary = json.loads((run_dir / "eval" / "model_0.json").read_text())
    kept = {name: value for name, value in summary.items() if name.startswith("warm_start")}
    kept |= {"global_step": state["global_step"], "iterations": state["iteration"], "wall_seconds": state["elapsed"]}
    return found | {"settings": settings_of(state), "summary": kept, "curves": curves_of(scalars)}


def measure_curriculum(run_dir: Path, episodes: int) -> dict:
    """The curves of a run with --demo-resets, and its last policy's success by the steps before success that it starts,
    and from fresh starts.
    """
    agent, args, state = load_policy(checkpoint.latest(run_dir))
    envs = AlohaEnv(1, "cpu", **plain(args) | {"obs_type": "state"})
    curriculum = Curriculum(args, envs, args.seed + 1)  # other demonstrations than those of the training
    envs.close()
    curriculum.frontier = state["ranks"][0]["frontier"]
    rates = curriculum.measure(agent, args, episodes, "cpu")
    result = evaluate(agent, replace(args, episode_steps=300), "cpu", episodes, "fast", tools.EVAL_SEED)
    low, high = result["success_ci95"]
    print(f"  frontier {curriculum.frontier}: {rates}, fresh {result['success_rate']:.1%} ({low:.1%} to {high:.1%})")
    kept = {"global_step": state["global_step"], "iterations": state["iteration"], "wall_seconds": state["elapsed"]}
    kept |= {"frontier": curriculum.frontier, "success_by_steps_before": rates, "episodes": episodes}
    kept["demonstration_steps"] = curriculum.length.double().mean().item()
    curves = curves_of(tools.read_scalars(run_dir))
    return {"fresh starts": result, "settings": settings_of(state), "summary": kept, "curves": curves}


def settings_of(state: dict) -> dict:
    """Of a run's checkpoint; of the policy that it began with, the name alone."""
    settings = {name: value for name, value in state["args"].items() if name not in PATHS}
    began_with = Path(state["args"]["model_path"]).name
    return settings | ({"began_with": began_with} if began_with else {})


def curves_of(scalars: dict) -> dict:
    return {name: scalars[name] for name in CURVES if name in scalars}


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
                result = run[stage].get("fast with shadows") or run[stage]["fast"]
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
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--episodes", type=int, default=256, help="in the fast environment; 0: none")
    parser.add_argument("--shadow-episodes", type=int, default=128, help="in the fast one with shadows; 0: none")
    parser.add_argument("--package-episodes", type=int, default=104, help="in the package's own; 0: none")
    parser.add_argument("--run", type=Path, help="folder of a finished or stopped run, instead of training one")
    parser.add_argument("--name", default="", help="in the file, if not the seed: 1, then shadows")
    parser.add_argument("--demo-resets", action="store_true", help="the reverse curriculum, in place of the warm start")
    parser.add_argument("--keep-policy", action="store_true", help="write the weights beside the figures")
    args, flags = parser.parse_known_args()
    began, folder = time.time(), tools.new_folder(args, "aloha")
    file = args.out / "aloha.json"
    figures = json.loads(file.read_text())["figures"] if file.exists() else {}
    runs = figures.setdefault("demo_resets" if args.demo_resets else "runs", {})
    episodes = {"fast": args.episodes, "fast with shadows": args.shadow_episodes, "gym-aloha": args.package_episodes}
    way = "--demo-resets" if args.demo_resets else "--bc-init"
    for task in args.tasks:
        for seed in args.seeds:
            run_dir = args.run or folder / f"{task}_{seed}"
            command = ["--env-id", task, "--seed", seed, "--log-dir", run_dir, way, *flags]
            print(f"{task}, seed {seed}", flush=True)
            if not args.run:
                log = run_dir.with_suffix(".log")
                tools.finish(tools.start("ppo_aloha_cnn.py", command, log), log)
            seeds = runs.setdefault(task, {})
            name = args.name or str(seed)
            if args.demo_resets:
                seeds[name] = measure_curriculum(run_dir, args.episodes)
            else:
                seeds[name] = measure(run_dir, episodes, seeds.get(name, {}) if args.run else {})
            tools.write(args, "aloha", args.seeds, None, began, figures)
            plot(figures["runs"], args.out / "aloha.png")
            if args.keep_policy:
                keep_policy(run_dir, args.out / f"aloha_{TASKS[task]}.pt")


if __name__ == "__main__":
    main()
