"""Where tests of what wraps a model run: on the fake device anywhere, on a real GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from devices import device_here

CARDS = torch.cuda.device_count() if torch.cuda.is_available() else 0
EACH_ITS_CARD = [pytest.mark.gpu, pytest.mark.skipif(CARDS < 2, reason=f"{CARDS} cards: needs 2 at least")]
PLACES = [  # and how many ranks
    pytest.param("fake", 1),
    pytest.param("fake", 2),
    pytest.param("one card", 1, marks=pytest.mark.gpu),
    pytest.param("one card", 2, marks=pytest.mark.gpu),
    pytest.param("one card", 3, marks=pytest.mark.gpu),
    pytest.param("a card each", max(2, CARDS), marks=EACH_ITS_CARD),
]


def ready(place: str, request: pytest.FixtureRequest) -> None:
    """In a test, before its ranks start: skips it where there can be no fake device."""
    if place == "fake":
        request.getfixturevalue("built_fake_device")


def device_of(place: str, rank: int) -> torch.device:
    """In a rank."""
    if place == "fake":
        return device_here("fake")
    device = torch.device("cuda", rank if place == "a card each" else 0)
    torch.cuda.set_device(device)
    return device
