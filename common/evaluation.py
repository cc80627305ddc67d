"""What evaluations and films of a policy share: whole episodes, rates with their intervals, what is left of them."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from gymnasium.vector import VectorEnv

from common import video
from common.files import tolerant, write_json
from common.stats import mean_ci95, wilson_ci95
from common.storage import to

Policy = Callable[[torch.Tensor | dict], torch.Tensor]  # raw observations -> actions
SEED = 10_000  # of evaluations, far from those of training


def random_state_kept(device: torch.device) -> contextlib.AbstractContextManager:
    """Behind it torch goes on with the random numbers that it had before: a training whose policy needs some in its
    evaluations is the same without them, and resumes exactly from what it saved ahead of one.
    """
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@torch.no_grad()
def play(
    policy: Policy, envs: VectorEnv, obs, device, rounds: int = 1, also: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """{metric: (rounds * num_envs,)} of each world's first `rounds` episodes from `obs` on, on the CPU.

    The metrics are those of info["episode"] and the entries `also` of info. `policy` runs on `device`. Every world has
    as many episodes as the others, since counting those that end first would favour the short ones.
    """
    played = torch.zeros(envs.num_envs, dtype=torch.long, device=envs.device)
    columns = {}
    while (played < rounds).any():
        envs.watched = played < rounds  # what pictures an environment may leave out: AlohaEnv's take the most time
        obs, _, _, _, info = envs.step(policy(to(obs, device)).to(envs.device))
        worlds = (info["_episode"] & (played < rounds)).nonzero()[:, 0]
        for name, values in (info["episode"] | {name: info[name] for name in also}).items():
            column = columns.setdefault(name, torch.zeros(rounds, envs.num_envs, device=envs.device))
            column[played[worlds], worlds] = values[worlds].float()
        played[worlds] += 1
    return {name: column.flatten().cpu() for name, column in columns.items()}


def play_from_resets(policy: Policy, envs: VectorEnv, device, episodes: int, at_reset=lambda: {}) -> dict:
    """`play` of at least `episodes` episodes, all of which begin with a reset, and beside its columns those, by name,
    that `at_reset` reads of the worlds then.
    """
    found = []
    while len(found) * envs.num_envs < episodes:
        obs, _ = envs.reset()
        found.append(at_reset() | play(policy, envs, obs, device))
    return {name: torch.cat([columns[name] for columns in found]) for name in found[0]}


def mean_return(returns: torch.Tensor) -> dict:
    """`mean_return` and its 95% interval `return_ci95`."""
    mean, half_width = mean_ci95(returns)
    return {"mean_return": mean, "return_ci95": [mean - half_width, mean + half_width]}


def rates(columns: dict[str, torch.Tensor], *names: str) -> dict:
    """{name}_rate and Wilson's 95% interval {name}_ci95 of the columns `names`, each (episodes,) of zeros and ones."""
    result = {}
    for name in names:
        hits, count = int(columns[name].sum()), len(columns[name])
        result |= {f"{name}_rate": hits / count, f"{name}_ci95": list(wilson_ci95(hits, count))}
    return result


def save_and_print(result: dict, run_dir: Path, name: str, more: str):
    """Writes eval/{name}.json into `run_dir`, and prints the rate of success and `more`."""
    with tolerant(f"{name}.json", run_dir / "eval"):
        write_json(run_dir / "eval" / f"{name}.json", result)
    low, high = result["success_ci95"]
    success = f"success {result['success_rate']:.1%} ({low:.1%} to {high:.1%}) of {result['episodes']} episodes"
    print(f"{name}: {success}{more}", flush=True)


def can_film() -> bool:
    """Whether anything can draw here; if not, one sentence says so."""
    if video.find_gl() is None:
        print(video.missing_gl_message(), flush=True)
    return video.find_gl() is not None


def device_of(policy: Policy) -> torch.device | str:
    """Of a module's parameters; cpu for any other function."""
    return next((p.device for p in policy.parameters()), "cpu") if isinstance(policy, torch.nn.Module) else "cpu"
