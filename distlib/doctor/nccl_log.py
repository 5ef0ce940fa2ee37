"""NCCL's own log of the self-test: which network it took."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from distlib.doctor.facts import NcclSaid
from distlib.doctor.tools import text_of

_FILE = "NCCL_DEBUG_FILE"


@contextmanager
def recorded(environ: MutableMapping[str, str]) -> Iterator[Callable[[], NcclSaid | None]]:
    """What NCCL logs in the block, when it is asked for; None if NCCL did not run, or logs to a file of the user's.

    NCCL reads its variables once a process, as it makes its first communicator: it must not have made one before.
    """
    with tempfile.TemporaryDirectory(prefix="distlib-doctor-") as folder:
        file = Path(folder) / "nccl.log"
        ours = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", _FILE: str(file)}
        if environ.get(_FILE):
            ours = {}
        before = {name: environ.get(name) for name in ours}
        environ.update(ours)
        try:
            yield lambda: parse(text_of(file))
        finally:
            for name, value in before.items():
                if value is None:
                    environ.pop(name, None)
                else:
                    environ[name] = value


def parse(log: str) -> NcclSaid | None:
    """The network that NCCL names in its log, and what the plugin for libfabric says; None of an empty log."""
    if not log:
        return None
    networks = re.findall(r"Using network (.+?)\s*$", log, re.MULTILINE)
    plugin = re.search(r"NET/OFI .*aws-ofi-nccl ([0-9][0-9a-zA-Z.~-]*)", log)
    provider = re.search(r"NET/OFI Selected [Pp]rovider is (\w+)", log)
    return NcclSaid(
        network=networks[-1] if networks else "",
        has_ofi_line="NET/OFI" in log,
        plugin=plugin[1] if plugin else "",
        provider=provider[1] if provider else "",
        gpudirect="/GDRDMA" in log,
    )
