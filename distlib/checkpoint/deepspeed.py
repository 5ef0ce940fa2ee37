"""DeepSpeed's ZeRO checkpoints, stages 1 to 3, converted into ours: weights, moments, steps, hyperparameters.

    stages 1, 2   a flat vector per optimizer group, cut into equal parts, one per rank:
                  group 0   [ w1 | w2 | w3 ...|pad ]    rank 0 has the first half, rank 1 the second
    stage 3       every parameter cut into equal parts, one per rank, each rank's parts one after another:
                  rank 0    [ w1 a | w2 a | w3 a ]      rank 1    [ w1 b | w2 b.pad | w3 b ]

Only DeepSpeed's files are read, without DeepSpeed: what they hold of its classes is read as plain data. One parameter
at a time is in memory; the rest is mapped from the files.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from distlib.checkpoint import folder, layout, writer
from distlib.checkpoint.layout import Piece
from distlib.checkpoint.manifest import Manifest
from distlib.checkpoint.model_state import MODEL
from distlib.checkpoint.optimizer_state import STATE
from distlib.checkpoint.ranks import Ranks
from distlib.checkpoint.writer import Planned
from distlib.checkpoint.writing import Job, planned, write

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay", "initial_lr")
MASTERS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}


def convert_deepspeed(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tag: str | None = None,
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Convert a ZeRO checkpoint of DeepSpeed into a checkpoint for `distlib.load`. One process calls it, without ranks.

    Weights are the fp32 masters, also where DeepSpeed trained in bf16 or fp16; frozen parameters and buffers are
    converted to fp32. The optimizer's moments, step and hyperparameters come with them, for `torch.optim.AdamW` or
    Adam and for distlib's own. The rest that DeepSpeed keeps is in the LoadedState's `extra["deepspeed"]`: client
    state, samples and skipped steps counted, the loss scale, the state of a learning rate scheduler.

    Args:
        path: the folder given to DeepSpeed's save_checkpoint.
        out: the checkpoint to write, as `distlib.save` does.
        tag: of the checkpoint in it; default: the one that DeepSpeed's file `latest` names.
        aliases: other names of tied parameters, with the name they are stored under, where DeepSpeed did not record
            them.

    Raises:
        ValueError: for what is no ZeRO checkpoint, or one with model parallelism, experts, or an optimizer other than
            Adam. RuntimeError: for files that are missing or do not fit together. Both name file and parameter.
    """
    source = _Source(folder.real(path), tag)
    flats = _stage_3(source) if source.stage == 3 else _stages_1_and_2(source)
    ties = source.ties(aliases or {})
    frozen = source.frozen()
    shapes: dict[str, tuple[int, ...]] = {name: place.shape for name, place in flats.items()}
    pieces = [_whole(MODEL + name, shape, torch.float32) for name, shape in shapes.items()]
    pieces += [_whole(MODEL + name, tensor.shape, tensor.dtype) for name, tensor in frozen.items()]
    keys = sorted({key for place in flats.values() for key in place.keys})
    kinds = {"step": "scalar", **{key: "piece" for key in keys}}
    for name, place in flats.items():
        pieces.append(_whole(f"{STATE}{name}.step", (), torch.float32))
        pieces += [_whole(f"{STATE}{name}.{key}", place.shape, place.dtype(key)) for key in place.keys]
    cuts = list(layout.chunks(pieces))
    plan = [planned(pieces[chunk.piece], chunk) for chunk in cuts]
    groups = {("optimizer", "param_groups"): writer.to_bytes(source.groups())}
    plan += [Planned(".".join(where), where) for where in groups]

    def make(name: str) -> torch.Tensor:
        if name.startswith(MODEL):
            name = name.removeprefix(MODEL)
            return frozen[name] if name in frozen else flats[name].read("")
        parameter, _, key = name.removeprefix(STATE).rpartition(".")
        return torch.tensor(flats[parameter].step) if key == "step" else flats[parameter].read(key)

    def contents() -> Iterator[torch.Tensor | bytes]:
        last, flat = -1, torch.empty(0)
        for chunk in cuts:
            if chunk.piece != last:
                last, flat = chunk.piece, make(pieces[chunk.piece].name).reshape(-1)
            yield flat[chunk.start : chunk.start + chunk.numel].view(chunk.sizes)
        yield from groups.values()

    manifest = Manifest("", 1, source.step, ties, {"class": source.optimizer, "kinds": kinds})
    rest = writer.to_bytes(source.rest())
    note = {"path": "", "facts": "", "step": source.step, "replica": 0, "parts": (), "kinds": kinds}
    note |= {"extra": {"deepspeed": ""}, "extra bytes": {"deepspeed": rest}}
    write(Ranks(None, 0, 1), folder.real(out), Job(plan, contents(), note, manifest), None)


def _whole(name: str, shape: Any, dtype: torch.dtype) -> Piece:
    return Piece(name, torch.Size(shape), 0, torch.empty(tuple(shape), dtype=dtype, device="meta"))


class _Source:
    """DeepSpeed's files of one checkpoint.

    stage: 1 to 3. world: the ranks that saved. model: the first model file's content; models: each rank's (stage 3).
    states: each rank's optimizer file's content.
    """

    def __init__(self, root: Path, tag: str | None) -> None:
        latest = root / "latest"
        if tag is None and not latest.is_file():
            raise ValueError(f"{root} is no checkpoint of DeepSpeed: it has no file 'latest'. Give tag=, if it has one")
        self.path = root / (tag if tag is not None else latest.read_text().strip())
        if not self.path.is_dir():
            tags = sorted(other.name for other in root.iterdir() if other.is_dir()) if root.is_dir() else []
            raise ValueError(f"{self.path} does not exist; {root} has the tags {tags}")
        files: dict[int, Path] = {}
        for file in sorted(self.path.glob("*_optim_states.pt")):
            found = re.fullmatch(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt", file.name)
            if found is None or int(found[2]) != 0:
                raise ValueError(f"{file} is of a model-parallel or expert run: only plain ZeRO can be converted")
            files[int(found[1])] = file
        if not files:
            raise ValueError(f"{self.path} has no *zero_pp_rank_*_optim_states.pt: it was not saved under ZeRO")
        first = _read(files[min(files)])["optimizer_state_dict"]
        self.stage = int(_plain_number(first.get("zero_stage", 0)))
        if self.stage not in MASTERS or MASTERS[self.stage] not in first:
            raise ValueError(f"{files[min(files)]} is of ZeRO stage {self.stage}: only 1, 2 and 3 can be converted")
        count = first["partition_count"]
        self.world = max(count) if isinstance(count, (list, tuple)) else int(count)
        for rank in range(self.world):
            if rank not in files:
                raise RuntimeError(f"{self.path}: the optimizer file of rank {rank} of {self.world} is missing")
        if len(files) > self.world:
            raise RuntimeError(f"{self.path} has {len(files)} optimizer files of {self.world} ranks: written over")
        self.files = [files[rank] for rank in range(self.world)]
        self.states = [_read(file)["optimizer_state_dict"] for file in self.files]
        config = _read(self.files[0]).get("ds_config") or {}
        names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(self.world)]
        names = names if self.stage == 3 else ["mp_rank_00_model_states.pt"]
        for name in names:
            if not (self.path / name).is_file():
                raise RuntimeError(f"{self.path / name} is missing")
        self.models = [_read(self.path / name) for name in names]
        self.model = self.models[0]
        self.model_file = self.path / names[0]
        if not self.model.get("param_shapes"):
            raise ValueError(f"{self.model_file} has no param_shapes: it was not saved under ZeRO")
        self.shapes: list[dict[str, tuple[int, ...]]] = [
            {name: tuple(shape) for name, shape in group.items()} for group in self.model["param_shapes"]
        ]
        self.step = int(self.model["global_steps"])
        kind = str((config.get("optimizer") or {}).get("type", "AdamW")).lower()
        if "adam" not in kind or "onebit" in kind or "zeroone" in kind:
            raise ValueError(f"{self.files[0]} is of the optimizer {kind!r}: only Adam and AdamW can be converted")
        self.optimizer = "AdamW"

    def inner(self, rank: int) -> dict[str, Any]:
        """The state dict of the optimizer that ZeRO wraps, of one rank."""
        found = self.states[rank]["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        if not isinstance(found, dict):
            raise ValueError(f"{self.files[rank]} was saved with elastic_checkpoint: save it without, then convert it")
        return found

    def groups(self) -> list[dict[str, Any]]:
        """The hyperparameters, by parameters' names."""
        inner = self.inner(0)["param_groups"]
        return [
            {**{key: group[key] for key in HYPERPARAMETERS if key in group}, "params": list(shapes)}
            for group, shapes in zip(inner, self.shapes, strict=True)
        ]

    def step_of(self, group: int, state: dict[str, Any]) -> float:
        """The optimizer's step: some of DeepSpeed's optimizers keep it with the state, some with the group."""
        step = state.get("step", self.inner(0)["param_groups"][group].get("step"))
        return float(step if step is not None else self.step - int(self.model.get("skipped_steps", 0)))

    def frozen(self) -> dict[str, torch.Tensor]:
        """Parameters that were not trained, and persistent buffers; in fp32 as DeepSpeed's own tool has them."""
        found: dict[str, torch.Tensor] = {}
        for name, shape in (self.model.get("frozen_param_shapes") or {}).items():
            parts = [model["frozen_param_fragments"][name].reshape(-1) for model in self.models]
            whole = torch.cat(parts)[: math.prod(shape)]
            if whole.numel() != math.prod(shape):
                raise RuntimeError(f"{self.model_file}: '{name}' of shape {tuple(shape)} has {whole.numel()} elements")
            found[name] = whole.view(tuple(shape)).float()
        if self.stage < 3:  # its model file has all parameters whole; stage 1 names the frozen ones nowhere else
            trained = {name for group in self.shapes for name in group} | set(self.model.get("shared_params") or {})
            found.update({n: t.float() for n, t in self.model["module"].items() if n not in trained})
        for name in self.model["buffer_names"]:
            if name in self.model["module"]:
                buffer = self.model["module"][name]
                found[name] = buffer.float() if buffer.is_floating_point() else buffer
        return found

    def ties(self, given: Mapping[str, str]) -> dict[str, str]:
        """Other names of tied parameters, as recorded or given."""
        ties = {**{str(alias): str(name) for alias, name in (self.model.get("shared_params") or {}).items()}, **given}
        known = {name for group in self.shapes for name in group} | set(self.frozen())
        for alias, name in ties.items():
            if name not in known or alias in known:
                raise ValueError(f"aliases: '{alias}' is to be tied to '{name}'; the checkpoint stores {sorted(known)}")
        unknown = sorted(set(self.model["module"]) - known - set(ties))
        if unknown:
            raise ValueError(
                f"{self.model_file} stores nothing for {unknown}. If they are tied to others, say so: "
                f"aliases={json.dumps({name: '...' for name in unknown})}"
            )
        return ties

    def rest(self) -> dict[str, Any]:
        """What else there is, as far as it is plain data."""
        known = {"module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params"}
        known |= {"frozen_param_fragments", "ds_config"}
        rest = {key: value for key, value in self.model.items() if key not in known and _is_plain(value)}
        scaler = self.states[0].get("loss_scaler")
        scale = getattr(scaler, "cur_scale", None)
        return {**rest, "loss_scale": float(scale)} if scale is not None else rest


class _Place:
    """Where one parameter lies in the ranks' flat vectors. keys: of its tensors of optimizer state.

    parts: (flat vectors by key, begin, numel); "" is the key of the weights. They follow each other in the parameter.
    """

    def __init__(self, shape: tuple[int, ...], step: float, parts: list[tuple[dict[str, _Flat], int, int]]) -> None:
        self.shape, self.step, self.parts = shape, step, parts
        self.keys = [key for key in parts[0][0] if key]

    def dtype(self, key: str) -> torch.dtype:
        return self.parts[0][0][key].dtype

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor."""
        found = torch.cat([flats[key].read(begin, numel) for flats, begin, numel in self.parts])
        return found[: math.prod(self.shape)].view(self.shape)


class _Flat:
    """Vectors that follow each other, as one."""

    def __init__(self, vectors: list[torch.Tensor], what: str) -> None:
        self.vectors = [vector.reshape(-1) for vector in vectors]
        self.numel, self.dtype, self.what = sum(v.numel() for v in self.vectors), self.vectors[0].dtype, what

    def read(self, begin: int, numel: int) -> torch.Tensor:
        if begin + numel > self.numel:
            raise RuntimeError(f"{self.what} has {self.numel} elements; {numel} from {begin} on are asked for")
        found, place = [], 0
        for vector in self.vectors:
            low, high = max(begin - place, 0), min(begin + numel - place, vector.numel())
            if low < high:
                found.append(vector[low:high])
            place += vector.numel()
        return torch.cat(found) if found else self.vectors[0][:0]


def _tensors(state: Any) -> dict[str, torch.Tensor]:
    """Of an optimizer's state for one flat vector, what has its geometry."""
    found = {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
    if not {"exp_avg", "exp_avg_sq"} <= found.keys():
        raise ValueError(f"the optimizer's state has the tensors {sorted(found)}: only Adam's can be converted")
    return found


def _stages_1_and_2(source: _Source) -> dict[str, _Place]:
    """Parameters by name: each is one part of its group's vector."""
    places: dict[str, _Place] = {}
    for number, shapes in enumerate(source.shapes):
        what = f"{source.path}: group {number}"
        masters = [state[MASTERS[source.stage]][number] for state in source.states]
        states = [source.inner(rank)["state"].get(number) for rank in range(source.world)]
        if any(state is None for state in states):
            raise ValueError(f"{what} has no optimizer state: it was saved before the first step")
        flats = {"": _Flat(masters, what)}
        for key in _tensors(states[0]):
            flats[key] = _Flat([state[key] for state in states], f"{what}, {key}")
        step = source.step_of(number, states[0])
        paddings = source.states[0].get("param_alignment_paddings")
        begin = 0
        for position, (name, shape) in enumerate(shapes.items()):
            places[name] = _Place(shape, step, [(flats, begin, math.prod(shape))])
            begin += math.prod(shape) + (int(paddings[number][position]) if paddings else 0)
        if begin > flats[""].numel:
            raise RuntimeError(f"{what} has {flats[''].numel} elements, its parameters {begin}")
    return places


def _stage_3(source: _Source) -> dict[str, _Place]:
    """Parameters by name: each has one part on every rank."""
    ranks = []
    for rank in range(source.world):
        masters = source.states[rank][MASTERS[3]]
        states = [source.inner(rank)["state"].get(number) for number in range(len(masters))]
        if any(state is None for state in states):
            raise ValueError(f"{source.files[rank]} has no optimizer state: it was saved before the first step")
        flats = {"": _Flat(masters, str(source.files[rank]))}
        for key in _tensors(states[0]):
            vectors = [state[key].reshape(-1)[: master.numel()] for state, master in zip(states, masters, strict=True)]
            flats[key] = _Flat(vectors, f"{source.files[rank]}, {key}")
        ranks.append(flats)
    places: dict[str, _Place] = {}
    begin = 0
    for number, shapes in enumerate(source.shapes):
        step = source.step_of(number, source.inner(0)["state"][0])
        for name, shape in shapes.items():
            part = math.ceil(math.prod(shape) / source.world)
            places[name] = _Place(shape, step, [(flats, begin, part) for flats in ranks])
            begin += part
    if begin != ranks[0][""].numel:
        raise RuntimeError(f"{source.files[0]} has {ranks[0][''].numel} elements, its parameters need {begin}")
    return places


# ---- reading DeepSpeed's files without DeepSpeed ------------------------------------------------------------


class _Foreign:
    """An object of a class that is not loaded: its arguments and attributes, as data."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _without_attributes(rebuild: Any, kind: Any, arguments: Any, attributes: Any) -> Any:
    """A tensor to which DeepSpeed had given attributes of its own."""
    return rebuild(*arguments)


class _Unpickler(pickle.Unpickler):
    """Loads tensors and plain containers; anything else, DeepSpeed's classes among it, becomes a `_Foreign`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _without_attributes
        value = getattr(torch, name, None) if module == "torch" else None
        plain = isinstance(value, torch.dtype) or (module, name) in {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
            ("torch.storage", "UntypedStorage"),
            ("torch.storage", "TypedStorage"),
            ("collections", "OrderedDict"),
            ("collections", "defaultdict"),
            ("builtins", "set"),
            ("builtins", "frozenset"),
            ("builtins", "list"),
            ("builtins", "dict"),
            ("builtins", "int"),
            ("builtins", "float"),
        }
        return super().find_class(module, name) if plain else type(name, (_Foreign,), {"__module__": __name__})


def _read(file: Path) -> Any:
    module = SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__=__name__)
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=False, pickle_module=module)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise RuntimeError(f"{file} cannot be read: {error}") from error


def _plain_number(value: Any) -> Any:
    """An enum's value is its only argument."""
    return value.args[0] if isinstance(value, _Foreign) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool, torch.Tensor))
