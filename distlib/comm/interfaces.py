"""Which network interface carries what goes between hosts: chosen by route, logged, and settable."""

from __future__ import annotations

import logging
import os
import socket
from functools import lru_cache
from typing import Any

import psutil

log = logging.getLogger("distlib")
VARIABLE = "DISTLIB_INTERFACE"


def addresses() -> dict[str, str]:
    """IPv4 (else IPv6) address by interface, of interfaces that are up."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found: dict[str, str] = {}
    for family in (socket.AF_INET6, socket.AF_INET):
        for name, entries in psutil.net_if_addrs().items():
            for entry in entries:
                if name in up and entry.family == family:
                    found[name] = entry.address.split("%")[0]
    return found


def route_to(host: str) -> str | None:
    """This machine's address on the way to `host`. Nothing is sent: the kernel only looks up its routes."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError:
        return None


def meeting_point(store: Any) -> str | None:
    """The host where the ranks met: that of the TCPStore behind `store`, else MASTER_ADDR."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return getattr(store, "host", None) or os.environ.get("MASTER_ADDR")


@lru_cache(maxsize=8)
def choose(master: str | None) -> str | None:
    """The interface to use: DISTLIB_INTERFACE, else GLOO_SOCKET_IFNAME, else the one on the way to `master`.

    None leaves the choice to gloo. Raises ValueError if a named interface does not exist or is down.
    """
    known = addresses()
    for variable in (VARIABLE, "GLOO_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "").split(",")[0]
        if wanted and wanted not in known:
            raise ValueError(
                f"{variable}={wanted!r}: no such interface is up here; there are: {', '.join(sorted(known))}"
            )
        if wanted:
            log.info("between hosts: interface %s (from %s)", wanted, variable)
            return wanted
    source = route_to(master) if master else None
    name = next((n for n, address in known.items() if address == source), None)
    log.info(
        "between hosts: interface %s, on the way to %s (set %s to change it)",
        name or "of gloo's choice",
        master,
        VARIABLE,
    )
    return name
