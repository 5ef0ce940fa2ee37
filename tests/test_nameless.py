"""Files without a name: nothing in the folder, room before use, and a full disk changes nothing."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from distlib.nameless import NamelessFile
from distlib.sharded.files import file_zeros


def test_it_has_no_name_and_goes_with_the_object(tmp_path: Path) -> None:
    file = NamelessFile(tmp_path, 3)
    file.grow(4)
    descriptor = file.fileno()
    assert not list(tmp_path.iterdir())
    assert file.nbytes == os.fstat(descriptor).st_size == 7
    os.pwrite(descriptor, b"xy", 2)
    with open(file.path, "rb") as again:
        assert again.read() == b"\0\0xy\0\0\0"
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def _full(*_: Any) -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_what_is_free_and_leaves_the_file_as_it_was(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = NamelessFile(tmp_path, 5)
    if code == errno.ENOSPC:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1234}))
        told = "No space left on device, 1,234 bytes are free there"
    else:
        monkeypatch.setattr(os, "posix_fallocate", _full)
        told = r"quota exceeded, [\d,]+ bytes are free there"
    with pytest.raises(OSError, match=told) as caught:
        file.grow(10**6)
    assert caught.value.errno == code and caught.value.filename == str(tmp_path)
    assert file.nbytes == os.fstat(file.fileno()).st_size == 5
    with pytest.raises(OSError, match=rf"offload: no 4,000,000 bytes in {tmp_path}: .*{told}") as caught:
        file_zeros(tmp_path, 10**6, torch.float32)
    assert caught.value.errno == code


def _too_large(rank: int, n: int, folder: str) -> None:
    file = NamelessFile(Path(folder), 100)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with pytest.raises(OSError, match="File too large"):
        file.grow(4096)
    assert os.fstat(file.fileno()).st_size == file.nbytes == 100
    file.grow(3996)


def test_a_limit_of_the_process_is_an_error_like_a_full_disk(tmp_path: Path) -> None:
    run_ranks(1, _too_large, str(tmp_path))
