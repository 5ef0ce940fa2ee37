"""Checkpoints that fit any world: `save`, `load`, `export`. Read `saving.py` first, then `layout.py`."""

from distlib.checkpoint.deepspeed import convert_deepspeed
from distlib.checkpoint.exporting import export
from distlib.checkpoint.loading import LoadedState, load
from distlib.checkpoint.saving import SaveHandle, save

__all__ = ["LoadedState", "SaveHandle", "convert_deepspeed", "export", "load", "save"]
