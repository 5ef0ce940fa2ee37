"""Facts in, problems out, for distlib's own environment variables. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from distlib.doctor.facts import Facts, Problem, error, warning
from distlib.doctor.variables import INSTALL_SETTINGS, SETTINGS

# Settings that are whole numbers, and the smallest. DISTLIB_CORE, DISTLIB_SIMD and DISTLIB_INTERFACE are judged
# by those who read them.
SMALLEST = {
    "DISTLIB_NODES": 1,
    "DISTLIB_ARENA_MB": 64,
    "DISTLIB_STAGING_KB": 64,
    "DISTLIB_ROOMS_KB": 0,
    "DISTLIB_CHUNK_KB": 64,
    "DISTLIB_DEVICE_STAGING_KB": 1,
    "DISTLIB_DEVICE_BLOCKS": 1,
    "DISTLIB_DEVICE_THREADS": 32,
    "DISTLIB_DEVICE_CHUNK_KB": 64,
}
SWITCHES = ("DISTLIB_FINGERPRINT", "DISTLIB_DEVICE_DESCRIPTORS")


def check_settings(facts: Facts) -> Iterator[Problem]:
    """DISTLIB_* variables: unknown names, impossible values, and those that take no effect here."""
    known = [*SETTINGS, *INSTALL_SETTINGS]
    for name, value in facts.settings.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            yield error(
                "settings",
                what=f"{name} is no setting of distlib",
                why="It has no effect: jobs run as if it were not set.",
                fix=f"Did you mean {near[0]}?" if near else f"Unset it. There are {', '.join(SETTINGS)}.",
            )
        elif value.strip() and name in SMALLEST and not _is_whole(value, SMALLEST[name]):
            yield error(
                "settings",
                what=f"{name}={value!r} is no whole number from {SMALLEST[name]} on",
                why="Ranks will fail as they start.",
                fix="Correct it, or unset it.",
            )
        elif name in SWITCHES and value.strip() not in ("", "0", "1"):
            yield error(
                "settings",
                what=f"{name}={value!r} is neither 0 nor 1",
                why="Ranks will fail as they start.",
                fix="Correct it, or unset it.",
            )
    yield from _without_effect(facts)


def _is_whole(value: str, smallest: int) -> bool:
    return re.fullmatch(r"[0-9]+", value.strip()) is not None and int(value) >= smallest


def _without_effect(facts: Facts) -> Iterator[Problem]:
    """Settings that nothing will read."""
    settings, build = facts.settings, facts.build
    if settings.get("DISTLIB_MASTER_ADDR") and facts.launched.launcher == "torchrun":
        yield warning(
            "settings",
            what="DISTLIB_MASTER_ADDR is set under torchrun",
            why="It has no effect there: torchrun gives its own address.",
            fix="Use torchrun's --master-addr or --rdzv-endpoint, and unset DISTLIB_MASTER_ADDR.",
        )
    for name, is_built in (("DISTLIB_NATIVE", build.is_built), ("DISTLIB_CUDA", build.cuda_built)):
        value = settings.get(name)
        if value in ("0", "1") and is_built != (value == "1"):
            yield warning(
                "settings",
                what=f"{name}={value} is set, but is read only when distlib is installed",
                why=f"It has no effect now; that part was {'' if is_built else 'not '}compiled then.",
                fix=f"{name}={value} pip install --force-reinstall --no-deps distlib-train; or unset it.",
            )
