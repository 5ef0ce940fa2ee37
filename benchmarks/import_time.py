"""What `import distlib` adds to `import torch`: whole processes, fresh and in turns.

torch loads distlib's entry point by itself where the package is installed, so torch alone is measured with
TORCH_DEVICE_BACKEND_AUTOLOAD=0, and torch with the entry point besides.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import report
from report import Bar, Report, Row

ROUNDS = 7
ALONE = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
VARIANTS = {
    "torch alone": ("import torch", ALONE),
    "torch and distlib": ("import torch, distlib", {}),
    "torch, entry point": ("import torch", {}),
}


def main() -> None:
    options = report.parser(__doc__).parse_args()
    samples: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(-1, ROUNDS):  # the first turn only fills the file cache
        for name, (statement, environment) in VARIANTS.items():
            seconds = _seconds(statement, environment)
            if turn >= 0:
                samples[name].append(seconds)
    bars = [
        Bar("torch and distlib", "torch alone", at_most=0.3, difference=True),
        Bar("torch, entry point", "torch alone", at_most=0.3, difference=True),
    ]
    rows = [Row("import", 1, samples, bars)]
    report.publish(Report("import_time", "What `import distlib` adds to `import torch`", rows), options)


def _seconds(statement: str, environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, env={**os.environ, **environment})
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
