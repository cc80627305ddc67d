"""Ranks: what becomes of a run when one of them dies, and what they average.

Run as a program, this file is two ranks.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common import distributed
from common.flat_adam import FlatAdam

ROOT = Path(__file__).parent.parent


def dies_before_it_joins():
    if rank() == 1:
        os._exit(3)
    distributed.init("cpu")


def raises_before_it_joins():
    if rank() == 1:
        raise ValueError("no such thing")
    distributed.init("cpu")


def is_killed_at_work():
    distributed.init("cpu")
    distributed.total(torch.ones(1))
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # as in an evaluation, in which nothing tells it of the others


def is_killed_while_awaited():
    distributed.init("cpu")
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    distributed.total(torch.ones(1))


def rank_0_raises():
    distributed.init("cpu")
    if rank() == 0:
        raise ValueError("no such thing")
    distributed.total(torch.ones(1))


def rank_0_makes_a_mistake():
    distributed.init("cpu")
    if rank() == 0:
        raise SystemExit(2)
    distributed.total(torch.ones(1))


def all_make_a_mistake():
    raise SystemExit(2)


def means():
    """Of gradients and of the scalars beside them, once with and once without."""
    distributed.init("cpu")
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = FlatAdam([weight], torch.tensor(0.1))
    optimizer.compute_gradients((weight * torch.tensor([1.0, 2.0, 4.0]) * (1 + 2 * rank())).sum())
    kl, other = optimizer.all_reduce(torch.tensor(0.25 + rank()), torch.tensor(10.0 * rank()))
    assert (kl.item(), other.item()) == (0.75, 5.0)
    assert optimizer.grad.tolist() == [2.0, 4.0, 8.0]  # the mean of factors 1 and 3
    optimizer.compute_gradients((weight * rank()).sum())
    assert optimizer.all_reduce() == () and optimizer.grad.tolist() == [0.5] * 3
    optimizer.step()
    assert torch.equal(distributed.mean(weight.detach()), weight.detach())  # both went the same way
    states = distributed.gather({"rank": rank(), "large": torch.tensor(2**63 + 5, dtype=torch.uint64)})
    assert [state["rank"] for state in states] == ([] if rank() else [0, 1])
    assert all(state["large"].item() == 2**63 + 5 for state in states)
    assert distributed.any_rank(rank() == 1, "cpu") and not distributed.any_rank(False, "cpu")
    distributed.leave()
    assert not dist.is_initialized()


def rank() -> int:
    return int(os.environ["RANK"])


def start(name: str) -> tuple[int, str, float]:
    """Exit code, stderr, and how long it took from the first rank's start."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, name]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()  # the imports are done
    began = time.time()
    _, err = process.communicate(timeout=60)
    return process.returncode, err, time.time() - began


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("dies_before_it_joins", "ended with exit code 3"),
        ("raises_before_it_joins", "ended with exit code 1"),
        ("is_killed_at_work", "was killed by signal 9"),
    ],
)
def test_a_rank_that_dies_ends_the_run_within_seconds_with_one_sentence(name, how):
    code, err, seconds = start(name)
    sentence = f"error: rank 1 {how}, so all ranks end; what was saved is whole"
    assert code == 1 and seconds < 15
    assert err.splitlines()[-1] == sentence and err.count("error: ") == 1
    assert ("Traceback" in err) == (name == "raises_before_it_joins")  # which says why


def test_a_rank_that_dies_while_it_is_awaited_ends_the_run_within_seconds():
    code, err, seconds = start("is_killed_while_awaited")
    assert code == 1 and seconds < 15 and "error: rank 1 was killed by signal 9" in err


@pytest.mark.parametrize(("name", "expected"), [("rank_0_makes_a_mistake", 2), ("all_make_a_mistake", 2)])
def test_a_users_mistake_keeps_its_exit_code(name, expected):
    code, err, seconds = start(name)
    assert code == expected and err == "" and seconds < 15


def test_an_error_of_rank_0_is_told_by_its_own_traceback():
    code, err, seconds = start("rank_0_raises")
    assert code == 1 and seconds < 15
    assert "ValueError: no such thing" in err and "error: rank" not in err


@pytest.mark.parametrize(
    ("cores", "number", "ranks"), [(2, 512, 2), (6, 512, 4), (12, 512, 8), (12, 96, 12), (7, 10, 5), (4, 1, 1)]
)
def test_as_many_ranks_as_share_evenly(monkeypatch, cores, number, ranks):
    monkeypatch.setattr(distributed, "num_cores", lambda: cores)
    assert distributed.even_ranks(number) == ranks


def test_means_over_two_ranks():
    assert start("means")[:2] == (0, "")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    distributed.launch(lambda name: globals()[name](), sys.argv[1], 2)
