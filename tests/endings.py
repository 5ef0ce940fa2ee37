"""The ways in which a rank ends while the others of its job go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from distlib.comm.group import Group

ENDINGS = ("raises", "exits", "is killed inside", "is killed between", "leaves")


def end(how: str, group: Group, call: Callable[[], object]) -> NoReturn:
    """Ends this rank: by itself, between two calls, or inside of one of many (`call`, in which the others join)."""
    if how == "raises":
        raise KeyError("a bug in the user's script")
    if how == "is killed inside":
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            call()
    if how == "is killed between":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "leaves":
        group.close()
        time.sleep(3)
    os._exit(0)
