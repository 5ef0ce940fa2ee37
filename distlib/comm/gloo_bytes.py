"""What gloo's ways of a collective send, by formula. Pure."""

from __future__ import annotations

Sent = dict[int, int]  # bytes that this rank sends, by destination


def broadcast_targets(rank: int, root: int, size: int) -> list[int]:
    """To whom `rank` passes a broadcast on: gloo's is a binomial tree."""
    place = (rank - root) % size
    targets, bit = [], 1
    while bit < size:
        if place & (2 * bit - 1) == 0 and place + bit < size:
            targets.append((place + bit + root) % size)
        bit *= 2
    return targets


def expected_sent(kind: str, n: int, me: int, root: int, sent: int, received: int) -> Sent:
    """Bytes that rank `me` sends to each rank, by formula; `sent` and `received` are the bytes of its tensors."""
    after = (me + 1) % n
    if kind == "all_reduce":
        share = -(-sent // n)
        return {to: share + (share * (n - 1) if to == after else 0) for to in range(n)}
    if kind in ("reduce_scatter", "all_to_all"):
        return {to: sent // n for to in range(n)}
    if kind == "all_gather":
        return {after: sent * (n - 1)}
    if kind in ("gather", "reduce", "send"):
        return {root: sent}
    if kind == "scatter":
        return {to: received for to in range(n)} if me == root else {}
    if kind == "broadcast":
        return {to: sent for to in broadcast_targets(me, root, n)}
    return {}
