"""Replicated training: every rank holds the whole model, gradients are averaged during backward.

wrapper.py     DataParallel: the module the user sees
reducer.py     the path of a gradient, from landing to average
backward.py    where a backward ends, or that it died
memory.py      a bucket layout turned into tensors: buffers, and a view of them per parameter
report.py      what went wrong in one backward, noticed on one rank and told on all
agreement.py   ranks compare notes: what must be equal everywhere, and who differs
replicas.py    parameters and buffers broadcast in few large messages
checks.py      what can be wrapped, and what must not change afterwards
naming.py      a wrapper that the wrapped module's names shine through
hooks.py       a bucket as a communication hook sees it
join.py        ranks that ran out of inputs shadow the others
"""

from distlib.data_parallel.wrapper import DataParallel

__all__ = ["DataParallel"]
