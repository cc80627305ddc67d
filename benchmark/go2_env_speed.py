"""What the Go2 environment costs on top of the simulator: Go2Env.step against mujoco.batch alone.

    python benchmark/go2_env_speed.py

Both sides step the same model from the same state with the same joint targets, segment by segment in turn, so their
robots go through the same motions: where the environment begins an episode, the raw side's robot is put there too, off
the clock. `standing`: noise of standard deviation 0.3 around the default pose, no episode ends. `mixed ages`: as in
training, some robot reaches its time limit or gets a new command at nearly every step. `policy` (with --model-path):
the same with a trained policy's actions. Two processes of one thread each is how training with two ranks uses it.
"""

import time

import mujoco.batch
import tools
import torch
import torch.multiprocessing as multiprocessing

from common.distributed import num_cores
from common.envs.go2 import Go2Env

WARM_UP = 60  # steps before the first segment: the robots have landed


def record(env: Go2Env, obs: torch.Tensor, num_steps: int, policy) -> dict:
    """Plays `num_steps` from the present state; what is needed to play them again on either side."""
    tape = {"start": env.state_dict(), "actions": [], "targets": [], "restarts": []}
    for _ in range(num_steps):
        tape["actions"].append(policy(obs))
        obs, _, terminated, truncated, _ = env.step(tape["actions"][-1])
        tape["targets"].append(env.physics.ctrl.clone())
        rows = (terminated | truncated).nonzero().flatten()
        tape["restarts"].append((rows, env.physics.qpos[rows].clone(), env.physics.qvel[rows].clone()))
    return tape | {"end": env.physics.qpos.clone()}


def time_env(env: Go2Env, tape: dict) -> float:
    """Control steps of one robot per second."""
    env.load_state_dict(tape["start"])
    began = time.perf_counter()
    for action in tape["actions"]:
        env.step(action)
    seconds = time.perf_counter() - began
    assert torch.equal(env.physics.qpos, tape["end"])
    return env.num_envs * len(tape["actions"]) / seconds


class Raw:
    """The same worlds without an environment."""

    def __init__(self, env: Go2Env, threads: int):
        self.batch = mujoco.batch.Batch(env.physics.model, env.num_envs, threads)
        self.state = {name: torch.from_numpy(self.batch.bind(name)) for name in ("qpos", "qvel", "qacc_warmstart")}
        self.ctrl, self.substeps = torch.from_numpy(self.batch.bind("ctrl")), env.cfg.substeps

    def time(self, tape: dict) -> float:
        for name, value in self.state.items():
            value.copy_(tape["start"]["physics"][name])
        seconds = 0.0
        for target, (rows, qpos, qvel) in zip(tape["targets"], tape["restarts"], strict=True):
            began = time.perf_counter()
            self.ctrl.copy_(target)
            self.batch.step(None, self.substeps)
            seconds += time.perf_counter() - began
            self.state["qpos"][rows], self.state["qvel"][rows] = qpos, qvel
            self.state["qacc_warmstart"][rows] = 0.0
        # Both sides went through the same states, or the comparison is none.
        assert torch.allclose(self.state["qpos"], tape["end"], atol=1e-3)
        return len(self.ctrl) * len(tape["targets"]) / seconds


def measure(case: dict, pairs: int, env_steps: int, model_path: str, wait=lambda: None) -> list[tuple[float, float]]:
    """[(environment's, raw rate)], alternating; `wait` is called before each timed segment."""
    torch.manual_seed(0)
    torch.set_num_threads(case["threads"])
    cfg = None
    policy = lambda obs: 0.3 * torch.randn(len(obs), 12)  # noqa: E731
    if case["scenario"] == "policy":
        agent, cfg, _ = tools.load_policy(model_path)
        policy = torch.no_grad()(agent.forward)
    env = Go2Env(case["num_envs"], cfg=cfg, physics_threads=case["threads"], rewards=case["rewards"])
    obs, _ = env.reset(seed=1, options={"random_phase": case["scenario"] != "standing"})
    for _ in range(WARM_UP):
        obs = env.step(policy(obs))[0]
    tape = record(env, obs, max(10, env_steps // case["num_envs"]), policy)
    raw = Raw(env, case["threads"])
    rates = []
    for _ in range(pairs + 1):
        wait()
        ours = time_env(env, tape)
        wait()
        rates.append((ours, raw.time(tape)))
    return rates[1:]  # the first pair warms both up


def _in_process(queue, barrier, *arguments):
    queue.put(measure(*arguments, wait=barrier.wait))


def measure_processes(processes: int, *arguments) -> list[tuple[float, float]]:
    """`measure` in several processes at once; their rates are added up."""
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.Queue(), context.Barrier(processes)
    workers = [context.Process(target=_in_process, args=(queue, barrier, *arguments)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    results = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    return [tuple(map(sum, zip(*pair, strict=True))) for pair in zip(*results, strict=True)]


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--num-envs", type=int, nargs="+", default=[256, 512, 4096])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--env-steps", type=int, default=60_000, help="environment steps of a segment")
    parser.add_argument("--model-path", default="", help="checkpoint for the scenario `policy`")
    args = parser.parse_args()
    began, cores = time.time(), num_cores()
    scenarios = ["standing", "mixed ages", *(["policy"] if args.model_path else [])]
    layouts = dict.fromkeys([(1, 1), (1, cores), (cores, 1)])  # (processes, threads each)

    cases = []
    for processes, threads in layouts:
        for rewards in ("reference", "natural"):
            for scenario in scenarios:
                for num_envs in args.num_envs:
                    case = {"num_envs": num_envs // processes, "threads": threads}
                    case |= {"rewards": rewards, "scenario": scenario}
                    arguments = (case, args.pairs, args.env_steps // processes, args.model_path)
                    rates = measure(*arguments) if processes == 1 else measure_processes(processes, *arguments)
                    ratios = [env / raw for env, raw in rates]
                    case |= {"num_envs": num_envs, "processes": processes}
                    case |= {"env_steps_per_second": tools.spread([env for env, _ in rates])}
                    case |= {"raw_steps_per_second": tools.spread([raw for _, raw in rates])}
                    cases.append(case | {"ratio": tools.spread(ratios)})
                    print(
                        f"{processes} x {threads} threads, {num_envs:5d} robots, {rewards:9s}, {scenario:10s}: "
                        f"{tools.median(e for e, _ in rates):9,.0f} of {tools.median(r for _, r in rates):9,.0f} "
                        f"steps/s, {tools.median(ratios):.3f}",
                        flush=True,
                    )
    lowest = min(case["ratio"]["median"] for case in cases)
    figures = {"lowest_median_ratio": lowest, "goal": 0.8, "cases": cases}
    tools.write(args, "go2_env_speed", [0, 1], args.num_envs, began, figures)


if __name__ == "__main__":
    main()
