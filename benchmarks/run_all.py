"""All benchmarks, each in a process of its own: JSON and PNG in results/, tables appended to RESULTS.md.

Run it on a quiet machine; it takes some forty minutes. The exit code is 0 where every part ran, whether or
not its bars are met.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import emulated_cluster
from report import HERE

PARTS = [
    ["import_time.py"],
    ["collectives.py"],
    ["collectives.py", "--bus"],
    ["data_parallel.py"],
    ["optim.py"],
    ["sharded.py"],
    ["mics_network.py"],
    ["checkpoint.py"],
    ["activations.py"],
    ["pipeline.py"],
    ["messages.py"],
]
EMULATED = (["collectives.py", "--bus"], ["mics_network.py"])  # parts that need an emulated cluster


def main() -> int:
    busy = os.getloadavg()[0]
    if busy > 0.5:
        print(f"warning: the load is {busy:.1f}, so other programs run: the ratios will be off", file=sys.stderr)
    failed = []
    for part in PARTS:
        script, *arguments = part
        name = " ".join(part)
        reason = emulated_cluster.unavailable() if part in EMULATED else None
        if reason:
            print(f"{name} is left out: {reason}", file=sys.stderr)
            continue
        started = time.monotonic()
        command = [sys.executable, str(HERE / script), *arguments, "--record", *sys.argv[1:]]
        code = subprocess.run(command).returncode
        print(f"{name}: {time.monotonic() - started:.0f} s, exit code {code}\n", flush=True)
        if code:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
