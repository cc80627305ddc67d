"""Ranks: one process per GPU under torchrun, or several forked processes that share a CPU's cores."""

import contextlib
import ctypes
import io
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

JOIN = timedelta(minutes=2)  # for every rank to start
WAIT = timedelta(minutes=60)  # for the slowest rank: rank 0 evaluates and films while the others wait
SEEDS = 1_000_000  # between the seeds of two ranks, more than a rank has environments


def check_device(name: str) -> torch.device:
    """The device of that name. Raises ValueError, in one sentence, where it is none or not there."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device got {name!r}; it takes cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device got {name!r}, and torch finds {torch.cuda.device_count()} CUDA devices here")
    return device


def launch(main, args, ranks: int):
    """Runs `main(args)` in `ranks` processes, this one being rank 0. Under torchrun, or with one rank, just here.
    Ctrl-C outside of the training loop ends with one sentence and exit code 130.
    """
    if "RANK" in os.environ or ranks == 1:
        return _run(main, args)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "RANK": "0"}
    # Forked before torch has started a thread, the ranks share the imports' memory and their time.
    parent, children = os.getpid(), {}
    for rank in range(1, ranks):
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan outlives rank 0
            if os.getppid() != parent:
                os._exit(1)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            code = 1
            try:
                _run(main, args)
                code = 0
            except SystemExit as exit_:
                code = exit_.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children[pid] = rank
    watcher = threading.Thread(target=_watch, args=(children,), daemon=True)
    watcher.start()
    try:
        _run(main, args)
    except BaseException:
        waiting = list(children)  # for this rank, for ever
        children.clear()  # so that their end is no news to `_watch`, which would end this process first
        for pid in waiting:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    finally:
        leave()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    watcher.join()


def _run(main, args):
    try:
        return main(args)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\nstopped; what was saved is whole", file=sys.stderr)
        raise SystemExit(130) from None


def _watch(children: dict[int, int]):
    """Reaps the ranks {pid: rank}. One that fails ends this process, which might wait for it up to an hour."""
    while children:
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            rank = children.pop(pid, None)
            code = 0 if rank is None else os.waitstatus_to_exitcode(status)
            if code == 2:  # a user's mistake, of which rank 0 is about to say the same
                time.sleep(5)
            if code:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                print(f"error: rank {rank} {how}, so all ranks end; what was saved is whole", file=sys.stderr)
                sys.stderr.flush()
                for other in children:
                    os.kill(other, signal.SIGKILL)
                os._exit(1)
        time.sleep(0.05)


def init(device: str | torch.device, small: bool = False) -> tuple[torch.device, int, int]:
    """(this rank's device, rank, world_size), after joining the process group where there is more than one rank.

    small: minibatches are done before a second thread has woken up, so torch takes one thread.
    """
    device = torch.device(device)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(1 if small else cores_per_rank())
        _keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=JOIN))
        store.set_timeout(JOIN)
        group = {"store": store, "rank": rank, "world_size": world_size, "timeout": WAIT}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **group)
    return device, rank, world_size


def leave():
    """Every rank leaves the group together: a Gloo thread that outlives the interpreter's end aborts its process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank."""
    if not dist.is_initialized():
        return bool(flag)
    return total(torch.tensor(float(bool(flag)), device=device)).item() > 0


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over the ranks."""
    return total(tensor) / dist.get_world_size() if dist.is_initialized() else tensor


def gather(state: dict) -> list[dict]:
    """Every rank's `state`, on rank 0 and on the CPU (elsewhere an empty list)."""
    if not dist.is_initialized():
        return [state]
    # Tensors pickled without torch.save lose dtypes such as uint64.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    states = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(buffer.getvalue(), states)
    return [torch.load(io.BytesIO(state), map_location="cpu", weights_only=True) for state in states or []]


def _keep_freed_memory():
    """Tells glibc to keep large freed blocks: fresh pages for every minibatch cost a fifth of the update's time."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def even_ranks(number: int) -> int:
    """The most ranks, no more than there are cores, that share `number` environments or samples evenly."""
    return max(ranks for ranks in range(1, num_cores() + 1) if number % ranks == 0)


def cores_per_rank() -> int:
    return max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies matrices in bfloat16 by hardware."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open("/proc/cpuinfo") as f:
            return "avx512_bf16" in f.read()
    except OSError:
        return False
