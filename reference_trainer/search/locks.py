"""Who still works: locks on files, which the system lets go of however a process ends."""

from __future__ import annotations

import fcntl
import os
import socket
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` during the block; wait for it first.

    Raises:
        OSError: the file cannot be opened.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def signed_on(directory: Path) -> Iterator[str]:
    """Be known as a working process during the block; yields the name it goes by.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    path = directory / f"{name}.lock"
    with exclusive(path):
        try:
            yield name
        finally:
            path.unlink(missing_ok=True)


def is_gone(directory: Path, name: str) -> bool:
    """Whether the process of that name signed on in this directory and does not run any more.

    False for a process that is unknown here: it may well run on another machine.
    """
    try:
        with (directory / f"{name}.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return False
    return True
