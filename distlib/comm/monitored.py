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
    prefix, me = f"monitored/{round}", group.ranks[group.rank]
    if group.rank:
        store.set(f"{prefix}/{group.rank}", "1")
        try:
            store.wait([f"{prefix}/go"], timedelta(seconds=max(timeout, 1e-3)))
        except RuntimeError as error:
            raise RuntimeError(
                f"Rank {me} successfully reached monitoredBarrier, but received errors while waiting for send/recv "
                f"from rank {group.ranks[0]}: it was not let go within {timeout:.1f} s. Look at that rank's own "
                "error: it names the ranks that are missing"
            ) from error
        return
    until = time.monotonic() + timeout
    missing = list(range(1, group.size))
    while True:
        missing = [r for r in missing if not store.check([f"{prefix}/{r}"])]
        if not missing:
            store.set(f"{prefix}/go", "1")
            return
        if time.monotonic() >= until:
            break
        time.sleep(0.002)
    late = [str(group.ranks[r]) for r in (missing if wait_all_ranks else missing[:1])]
    who = "Ranks" if wait_all_ranks else "Rank"
    raise RuntimeError(
        f"Rank {me} timed out in monitoredBarrier after {timeout * 1000:.0f} ms: {who} {', '.join(late)} "
        f"failed to pass monitoredBarrier. Look at what they were doing"
    )
