"""Compiles the stand-ins for a GPU, once for each content: `python tests/compile_stand_ins.py`.

Tests do so themselves where it was not done; but then it counts as time of the first that needs one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import fake_device
from cuda_on_cpu import build


def emulated_kernels() -> str | None:
    """Why csrc/cuda cannot be emulated here, or None."""
    try:
        build.compiler()
    except RuntimeError as error:
        return str(error)
    build.library()
    return None


if __name__ == "__main__":
    with ThreadPoolExecutor() as pool:
        found = {"fake device": pool.submit(fake_device.why_not), "emulated kernels": pool.submit(emulated_kernels)}
        for what, compiled in found.items():
            if reason := compiled.result():
                print(f"{what}: {reason}; tests that need it are skipped")
