"""The loss of every step, kept where it was computed: nobody waits for it but at a report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossCurve:
    """Collects losses (fp32, nats per byte), means over all ranks; `settle()` looks at them.

    `steps` is how many it has room for; `validation` holds (step, loss) pairs.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self._losses = torch.zeros(steps, device=device)
        self._settled = self._count = 0
        self.validation: list[tuple[int, float]] = []

    def add(self, loss: Tensor) -> None:
        """The next step's loss, a scalar. It stays on its device."""
        self._losses[self._count] = loss
        self._count += 1

    def settle(self) -> float:
        """The mean of the steps since the last time.

        Raises FloatingPointError, on all ranks alike, for a loss that is not a finite number.
        """
        fresh = self._losses[self._settled : self._count]
        if not bool(fresh.isfinite().all()):
            step = self._settled + int(fresh.isfinite().long().argmin()) + 1
            raise FloatingPointError(f"the loss of step {step} is not a number: try a smaller --lr")
        self._settled = self._count
        return fresh.mean().item()

    @property
    def training(self) -> list[float]:
        """Up to the last `settle()`."""
        return self._losses[: self._settled].tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"training": self.training, "validation": [list(pair) for pair in self.validation]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a curve of this many steps or fewer."""
        self._settled = self._count = len(state["training"])
        self._losses[: self._count] = torch.tensor(state["training"])
        self.validation = [(int(step), float(loss)) for step, loss in state["validation"]]
