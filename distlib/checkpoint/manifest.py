"""The manifest of a checkpoint: what was saved, by how many ranks, and the checksum of every part of every file.

The tensors lie in files of `torch.distributed.checkpoint` (DCP), whose own index is `.metadata`; the manifest stands
beside it. It is JSON and ends with the checksum of itself.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distlib.checkpoint.folder import MANIFEST, METADATA

FORMAT, VERSION = "distlib checkpoint", 1


@dataclass
class Manifest:
    """What `manifest.json` holds.

    save_id: of this save, for logs. world_size: the ranks that saved. replicas: in which copy of the whole model each
    of them was, such as [0, 0, 1, 1] for two pipelines; None in files that do not tell. step: as given. aliases: other
    names of tied parameters, with the one that is stored. optimizer: {"class": its name, "kinds": {state key: "piece"
    or "scalar"}} or None. shared, by_rank: keys of `extra` that were equal on all ranks, and those that were not.
    files: by name, {"bytes": size, "chunks": [[offset, bytes, crc32], ...]}; the chunks follow each other.
    """

    save_id: str
    world_size: int
    step: int | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    scaler: bool = False
    rng: bool = False
    shared: list[str] = field(default_factory=list)
    by_rank: list[str] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    replicas: list[int] | None = None

    def to_bytes(self) -> bytes:
        """The file's content."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({**body, "crc32": zlib.crc32(_canonical(body))}, indent=None).encode()

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Reads and checks the manifest of a checkpoint folder.

        Raises ValueError for what is no checkpoint of distlib, or of another version; RuntimeError for a damaged one.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} {_what_else(folder)}")
        try:
            body = json.loads(path.read_bytes())
        except ValueError as error:
            raise RuntimeError(f"{path} is damaged: {error}. Load another checkpoint") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"{path} is not the manifest of a distlib checkpoint")
        if body.get("version") != VERSION:
            raise ValueError(
                f"{path} is of version {body.get('version')!r}; this distlib reads version {VERSION}. "
                "Load it with the distlib that saved it"
            )
        found = body.pop("crc32", None)
        if found != zlib.crc32(_canonical(body)):
            raise RuntimeError(f"{path} is damaged: its checksum is not that of its content. Load another checkpoint")
        del body["format"], body["version"]
        return Manifest(**body)

    def check_sizes(self, folder: Path, holds: dict[str, str]) -> None:
        """That all files are there, in full. holds: by file, something that it holds, for the message."""
        for name, facts in self.files.items():
            path = folder / name
            about = f", which holds {holds[name]}" if name in holds else ""
            if not path.is_file():
                raise RuntimeError(f"{path}{about}, is missing. Load another checkpoint")
            size = path.stat().st_size
            if size != facts["bytes"]:
                raise RuntimeError(
                    f"{path}{about}, has {size} bytes instead of {facts['bytes']}: it was "
                    f"{'truncated' if size < facts['bytes'] else 'changed'}. Load another checkpoint"
                )


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _what_else(folder: Path) -> str:
    """What the folder is, if it is no checkpoint, and what to do about it."""
    if not folder.exists():
        return "does not exist: there is no checkpoint to load"
    if folder.is_file():
        return "is a file; a checkpoint of distlib is a folder"
    if (folder / "zero_to_fp32.py").exists() or list(folder.glob("*zero_pp_rank_*")):
        return "is a checkpoint of DeepSpeed: convert it with distlib.checkpoint.deepspeed.convert_deepspeed"
    if (folder / METADATA).exists():
        return "is a checkpoint of torch.distributed.checkpoint, not of distlib: load it with torch's own dcp.load"
    return f"is not a checkpoint of distlib: it has no {MANIFEST}"
