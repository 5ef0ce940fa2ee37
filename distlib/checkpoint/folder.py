"""The folder of a checkpoint: written aside, then put in place in one move. A kill leaves the old one or the new one.

    runs/.step.saving-4f1c     being written; nobody reads it                a kill here: the next save removes it
    runs/step                  <- exchanged with it in one system call       before: the old, after: the new
    runs/.step.saving-4f1c     now the old one; removed                      a kill here: the next save removes it

Where the file system cannot exchange two names, the old one is first renamed to `.step.replaced-4f1c`. A kill right
then leaves no `step`; whoever comes next, load or save, renames the old one back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("distlib.checkpoint")
SAVING, REPLACED = "saving", "replaced"
MANIFEST = "manifest.json"
METADATA = ".metadata"
_AT_FDCWD, _EXCHANGE = -100, 2
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}

# Tests put a function here that ends the process: it is called with the name of each phase of a save as it begins.
on_phase: Callable[[str], None] = lambda phase: None  # noqa: E731


def real(path: str | os.PathLike[str]) -> Path:
    """The absolute path, links followed: renames work on the folder itself."""
    return Path(os.path.realpath(path))


def aside(path: Path, kind: str, token: str) -> Path:
    """A hidden neighbour of the checkpoint `path`."""
    return path.parent / f".{path.name}.{kind}-{token}"


def neighbours(path: Path, kind: str) -> list[Path]:
    """What earlier saves of `path` left beside it."""
    prefix = f".{path.name}.{kind}-"
    if not path.parent.is_dir():
        return []
    return sorted(other for other in path.parent.iterdir() if other.name.startswith(prefix))


def recover(path: Path) -> None:
    """Brings back a checkpoint that a killed save had renamed away. One rank calls it."""
    if not path.exists():
        for old in neighbours(path, REPLACED):
            if (old / MANIFEST).is_file():
                old.rename(path)
                _sync_folder(path.parent)
                return


def begin(path: Path, token: str) -> None:
    """Makes the folder to write in, after removing what killed saves left. One rank calls it.

    Raises ValueError where `path` is something else than a checkpoint or an empty folder: it would be lost.
    """
    recover(path)
    if path.exists():
        if not path.is_dir():
            raise ValueError(f"{path} is a file; a checkpoint is a folder. Save under another name")
        if any(path.iterdir()) and not (path / MANIFEST).is_file():
            raise ValueError(f"{path} holds files but no checkpoint of distlib: it is not replaced. Save elsewhere")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in neighbours(path, SAVING) + neighbours(path, REPLACED):
        _remove(left)
    aside(path, SAVING, token).mkdir()
    on_phase("begun")


def commit(path: Path, token: str) -> None:
    """Puts the finished folder in place of whatever `path` was. One rank calls it, when all files are on disk."""
    new = aside(path, SAVING, token)
    _sync_folder(new)
    on_phase("synced")
    if not path.exists():
        new.rename(path)
        on_phase("placed")
        _sync_folder(path.parent)
        return
    if exchange(new, path):
        old = new
    else:
        old = aside(path, REPLACED, token)
        path.rename(old)
        on_phase("renamed away")
        new.rename(path)
    on_phase("placed")
    _sync_folder(path.parent)
    _remove(old)
    on_phase("cleaned")


def discard(path: Path, token: str) -> None:
    """Removes the folder of a save that failed."""
    if (new := aside(path, SAVING, token)).exists():
        _remove(new)


def _remove(left: Path) -> None:
    """Removes a folder that is of no use any more, as far as that is possible; the next save tries again (`begin`). It
    is no reason for a save to fail: the checkpoint is complete without it."""
    try:
        shutil.rmtree(left)
    except OSError as error:
        shutil.rmtree(left, ignore_errors=True)
        log.warning("%s, which a save left, cannot be removed: %s. The next save to this path tries again", left, error)


def exchange(a: Path, b: Path) -> bool:
    """Exchanges two names in one step (renameat2 with RENAME_EXCHANGE). False where the system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


def write_file(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Waits until the folder's names are on disk, where the file system knows how."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse to sync folders
            os.fsync(handle)
    finally:
        os.close(handle)
