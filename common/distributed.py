"""Ranks: one process per GPU under torchrun, or several forked processes that share a CPU's cores."""

import ctypes
import io
import os
import signal
import socket
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist


def launch(main, args, ranks: int):
    """Runs `main(args)` in `ranks` processes, this one being rank 0. Under torchrun, or with one rank, just here."""
    if "RANK" in os.environ or ranks == 1:
        return main(args)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "RANK": "0"}
    # Forked before torch has started a thread, the ranks share the imports' memory and their time.
    parent, children = os.getpid(), []
    for rank in range(1, ranks):
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan outlives rank 0
            if os.getppid() != parent:
                os._exit(1)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            code = 1
            try:
                main(args)
                code = 0
            except SystemExit as exit_:
                code = exit_.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    try:
        main(args)
    except BaseException:
        for pid in children:  # else they would wait for this rank for ever
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        failed = [pid for pid in children if os.waitpid(pid, 0)[1]]
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    if failed:
        raise SystemExit(1)


def init(device: torch.device) -> tuple[int, int]:
    """(rank, world_size), after joining the process group where there is more than one rank."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=60))
    return rank, world_size


def gather(state: dict) -> list[dict]:
    """Every rank's `state`, on rank 0 (elsewhere an empty list)."""
    if not dist.is_initialized():
        return [state]
    # Tensors pickled without torch.save lose dtypes such as uint64.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    states = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(buffer.getvalue(), states)
    return [torch.load(io.BytesIO(state), weights_only=True) for state in states or []]


def keep_freed_memory():
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


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies matrices in bfloat16 by hardware."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open("/proc/cpuinfo") as f:
            return "avx512_bf16" in f.read()
    except OSError:
        return False
