"""A run on disk: what it continues from, on this or any other number of ranks, under this or any other plan."""

from __future__ import annotations

from pathlib import Path

import distlib
from lm.curve import LossCurve
from lm.data import Sampler
from lm.settings import Settings

SHAPE = ("context", "layers", "width", "heads", "tied")  # settings that weights and positions fit only if equal


class Checkpoints:
    """Saves to --save in the background, and continues from --resume. Every rank makes one and calls it alike.

    Around the training loop it is a context manager: at its end, however it comes, the last save is on disk.
    """

    def __init__(self, settings: Settings, engine: distlib.Engine, sampler: Sampler, curve: LossCurve) -> None:
        self._settings, self._engine = settings, engine
        self._places = {"sampler": sampler, "curve": curve}
        self._last: distlib.checkpoint.SaveHandle | None = None

    def save(self) -> float:
        """Copies what to save and returns; a thread writes it. Returns the seconds that training stood still."""
        assert self._settings.save is not None
        shape = {name: getattr(self._settings, name) for name in SHAPE}
        extra = {"shape": shape, **self._places}
        self._last = self._engine.save(self._settings.save, extra=extra, asynchronous=True)
        assert self._last is not None
        return self._last.stall

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None:
            self._last.wait()

    def resume(self, path: Path) -> None:
        """Weights, optimizer, number of steps, place in the data and curve as saved.

        Raises ValueError for what cannot be continued from.
        """
        try:
            state = self._engine.load(path)
        except RuntimeError as error:
            raise ValueError(f"--resume {path}: {error}") from error
        shape = state.extra.get("shape")
        if state.step is None or not isinstance(shape, dict):
            raise ValueError(f"--resume {path}: not a checkpoint of this script")
        for name in SHAPE:
            if shape[name] != getattr(self._settings, name):
                raise ValueError(
                    f"--resume {path} was trained with --{name} {shape[name]}, and this run has "
                    f"{getattr(self._settings, name)}: give it the same"
                )
        if state.step >= self._settings.steps:
            raise ValueError(
                f"--resume {path} has {state.step} steps behind it: ask for more than --steps {self._settings.steps}"
            )
        for name, part in self._places.items():
            part.load_state_dict(state.extra[name])
