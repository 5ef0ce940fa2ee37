"""The c10d backend "distlib": how torch comes to know it. Cheap: what it needs is imported with its first group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed import distributed_c10d as c10d

from distlib.comm.patches import patch_torch

if TYPE_CHECKING:
    from distlib.comm.process_group import ProcessGroup

NAME = "distlib"


def _create(options: Any, pg_options: Any = None) -> ProcessGroup:
    from distlib.comm.process_group import ProcessGroup

    if pg_options is not None:
        raise ValueError("backend distlib takes no pg_options")
    return ProcessGroup(options)


def register() -> None:
    """Makes "distlib" known to torch.distributed; once, and cheaply."""
    if NAME in c10d.Backend.backend_list:
        return
    c10d.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])
    patch_torch()
