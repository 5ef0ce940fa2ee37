"""Bytes of real text in windows that ranks share out: corpus, train/validation split, resumable sampler."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PARTS = 20  # one part in twenty is kept for validation
SEPARATOR = b"\0"  # between files


def load_corpus(path: Path | None, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation bytes, each a flat uint8 array; the same on all ranks that see the same files.

    A file is memory-mapped, so it may be larger than memory, and its last twentieth is for validation. A
    folder is read whole, and every twentieth of its text files (see `text_files`) is for validation. None is
    the standard library. Raises OSError for what cannot be read, ValueError where a side is too short for one
    window of `context`.
    """
    if path is not None and path.is_file():
        whole: np.ndarray = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        cut = len(whole) - len(whole) // PARTS
        train, validation = whole[:cut], whole[cut:]
        source = f"--data {path}"
    else:
        files = standard_library() if path is None else text_files(path)
        texts = [text for text in map(Path.read_bytes, files) if text and b"\0" not in text[:8192]]
        train, validation = split(texts)
        source = f"--data {path} ({len(texts)} text files)" if path else "Python's standard library"
    if not count_windows(train, context) or not count_windows(validation, context):
        raise ValueError(
            f"{source}: {len(train):,} bytes to train on and {len(validation):,} to validate, but a window "
            f"takes {context + 1}: give more --data or a smaller --context than {context}"
        )
    return train, validation


def standard_library() -> list[Path]:
    """Every .py file of the running Python's standard library, sorted. Installed packages are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    return [file for file in text_files(root, "*.py") if "site-packages" not in file.relative_to(root).parts]


def text_files(folder: Path, pattern: str = "*") -> list[Path]:
    """Files below `folder`, none of them hidden, in an order that is the same on every machine.

    Empty and binary ones (with a zero byte in the first 8 KiB, as git tells them) are left out by the reader.
    Raises FileNotFoundError, ValueError where there are none.
    """
    if not folder.exists():
        raise FileNotFoundError(f"--data {folder}: no such file or folder")
    names = {file.relative_to(folder).parts: file for file in folder.rglob(pattern) if file.is_file()}
    files = [names[parts] for parts in sorted(names) if not any(part.startswith(".") for part in parts)]
    if not files:
        raise ValueError(f"--data {folder}: no files in this folder")
    return files


def split(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Every twentieth text to validation, the others to training. Each side: one array, zeros between texts.

    A text longer than a twentieth of the whole is cut first, so that neither a handful of texts nor a giant
    among them leaves a side empty.
    """
    longest = max(1, sum(map(len, texts)) // PARTS)
    parts = [text[start : start + longest] for text in texts for start in range(0, len(text), longest)]
    train = SEPARATOR.join(part for index, part in enumerate(parts) if (index + 1) % PARTS)
    validation = SEPARATOR.join(parts[PARTS - 1 :: PARTS])
    return np.frombuffer(train, dtype=np.uint8), np.frombuffer(validation, dtype=np.uint8)


def count_windows(text: np.ndarray, context: int) -> int:
    """How many windows of `context` inputs, each followed by a target, `text` holds."""
    return max(0, (len(text) - 1) // context)


def batch_of(text: np.ndarray, windows: np.ndarray, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The numbered windows as inputs and targets (moved on by a byte), each int64 [len(windows), context].

    On a GPU they may be on their way when it returns: the host does not wait for the copy.
    """
    positions = windows[:, None] * context + np.arange(context + 1)
    tokens = torch.from_numpy(text[positions].astype(np.int64))
    if device.type != "cpu":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]


class Sampler:
    """An endless sequence of global batches of window numbers, of which each rank takes its slice:

        order in this epoch   7 2 9 4 | 0 5 8 1 | 3 6     global_batch = 4; the last two wait
        rank 0 of 2           7 2       0 5
        rank 1 of 2               9 4       8 1

    The order depends on seed and epoch alone and the position counts the windows of all ranks, so global
    batches do not depend on the number of ranks, and a state saved on n ranks continues on any other number.

    windows: to choose from. global_batch: windows in a step over all ranks; `size` must divide it. rank,
    size: of this process. Raises ValueError, on every rank alike, for numbers that do not fit.
    """

    def __init__(self, windows: int, global_batch: int, rank: int = 0, size: int = 1, seed: int = 0) -> None:
        if global_batch < 1 or global_batch % size:
            raise ValueError(f"a global batch of {global_batch} windows does not divide over {size} ranks")
        if windows < global_batch:
            raise ValueError(
                f"the data has {windows} windows to train on and a step takes {global_batch}: "
                "give more --data, a smaller --batch or a smaller --context"
            )
        self.windows, self.global_batch, self.rank, self.size = windows, global_batch, rank, size
        self.seed, self.epoch, self.position = seed, 0, 0
        self._order = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.windows)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        """This rank's window numbers for the next step, int64 [global_batch / size]."""
        if self.position + self.global_batch > self.windows:
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._shuffled()
        share = self.global_batch // self.size
        mine = self.position + self.rank * share
        self.position += self.global_batch
        return self._order[mine : mine + share]

    def state_dict(self) -> dict[str, int]:
        """Where the sequence stands: the same on every rank."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position, "windows": self.windows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state`, on any number of ranks. Raises ValueError for one saved with other data."""
        if state["windows"] != self.windows:
            raise ValueError(
                f"the saved place is one among {state['windows']} windows and this data has {self.windows}: "
                "resume with the same --data and --context"
            )
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._order = self._shuffled()
