"""One process at a time in a folder: others are told, and a process that died leaves nothing in the way."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from assay.model.errors import InputError


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Makes a folder where there is none, and holds it until the end; it goes again if nothing was put into it.

    Yields whether it is new. The lock is on the folder itself and the system drops it with the process, however that ends.
    A file system without locks is trusted. Raises InputError where another process holds the folder, and for a file.
    """
    try:
        folder.mkdir(parents=True)
        fresh = True
    except FileExistsError:
        if not folder.is_dir():
            raise InputError(f"{folder} exists and is a file; choose another place") from None
        fresh = False
    with _held(folder):
        try:
            yield fresh
        finally:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def made_alone(folder: Path) -> Iterator[None]:
    """Holds a new, empty folder; what a process that died left there goes first. Raises InputError as `alone` does."""
    if folder.exists():
        with alone(folder):
            _empty(folder)
    folder.mkdir(exist_ok=True)
    with _held(folder):
        yield


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    busy = InputError(f"{folder}: another assay is at work there; wait until it is done, or write to another place")
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise busy from None
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:  # a file system without locks: see `alone`
            pass
        if not _same(held, folder):
            raise busy
        yield
    finally:
        os.close(held)


def _same(held: int, folder: Path) -> bool:
    """Whether the folder of that name is still the one that was opened."""
    try:
        return os.path.samestat(os.fstat(held), os.stat(folder))
    except FileNotFoundError:
        return False


def _empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
