"""Files that appear whole or not at all, and what a full disk may cost."""

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path`, of the same suffix, to write to; what is written there becomes `path` at the end.

    A crash, even of the machine, leaves the old `path` or the new one; an exception leaves no other file behind. Makes
    the folder. OSError where the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)  # only then does the new name outlive a loss of power
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def tolerant(what: str, folder: str | Path, then: str = "training goes on") -> Iterator[None]:
    """Where the disk refuses what the block writes, one sentence on stderr, ending with `then`, and the run goes on.

    `what` names the file and `folder` where it should be. Errors that are not the disk's pass through.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save into an open file hides the disk's error behind one of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or cause
        tqdm.write(f"warning: {what} cannot be written in {folder} ({reason}); {then}", file=sys.stderr)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | Path, obj) -> None:
    """Write `obj` whole or not at all; tensors and arrays become lists, and numbers that are not finite null."""
    write_text(path, json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n")


def _plain(obj):
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = dataclasses.asdict(obj)
    if hasattr(obj, "tolist"):
        obj = obj.tolist()
    if isinstance(obj, dict):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return str(obj) if isinstance(obj, Path) else obj
