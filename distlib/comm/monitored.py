"""The monitored barrier: through the store, so that a rank that does not come is named and the group survives."""

from __future__ import annotations

import time
import weakref
from datetime import timedelta

import torch.distributed as dist

from distlib.comm.group import Group

_rounds: weakref.WeakKeyDictionary[Group, int] = weakref.WeakKeyDictionary()


def monitored_barrier(store: dist.Store, group: Group, timeout: float, wait_all_ranks: bool) -> None:
    """Rank 0 waits for the others, then lets them go. RuntimeError within `timeout` seconds on every rank that called:
    on rank 0 naming the first rank that is missing, or all of them with `wait_all_ranks`."""
    round = _rounds[group] = _rounds.get(group, 0) + 1
    prefix = f"monitored/{round}"
    if group.rank:
        store.set(f"{prefix}/{group.rank}", "1")
        try:
            store.wait([f"{prefix}/go"], timedelta(seconds=timeout))
        except RuntimeError as error:
            raise RuntimeError(
                f"Rank {group.rank} timed out in monitoredBarrier: rank 0 did not let it go within {timeout:.1f} s. "
                "Rank 0's own error names the ranks that are missing"
            ) from error
        return
    until = time.monotonic() + timeout
    missing = list(range(1, group.size))
    while missing and time.monotonic() < until:
        missing = [r for r in missing if not store.check([f"{prefix}/{r}"])]
        if missing:
            time.sleep(0.002)
    if not missing:
        store.set(f"{prefix}/go", "1")
        return
    late = ", ".join(str(group.ranks[r]) for r in (missing if wait_all_ranks else missing[:1]))
    raise RuntimeError(
        f"Rank {group.ranks[0]} timed out in monitoredBarrier after {timeout * 1000:.0f} ms: ranks {late} failed to "
        f"pass monitoredBarrier. Look at what they were doing"
    )
