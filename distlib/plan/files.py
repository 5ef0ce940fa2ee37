"""Mappings in files: YAML and JSON. A key that stands twice is refused, not overwritten."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

_SUFFIXES = (".yaml", ".yml", ".json")


def read(path: Path) -> dict[str, Any]:
    """The mapping in a file. ValueError for another suffix, text that cannot be read, or what is no mapping."""
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"a plan is read from a file that ends in {', '.join(_SUFFIXES)}")
    text = path.read_text(encoding="utf-8")
    found = read_json(text) if path.suffix.lower() == ".json" else _read_yaml(text)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"must hold settings by name, such as 'stage: 3', not {type(found).__name__}")
    return found


def read_json(text: str) -> Any:
    """What JSON text holds. ValueError for a key that stands twice, and for what is no JSON, with its place."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}; this is not JSON") from None


def to_yaml(values: dict[str, Any]) -> str:
    """As YAML text, in the order of the mapping."""
    return _yaml().safe_dump(values, sort_keys=False, default_flow_style=False)


def _read_yaml(text: str) -> Any:
    yaml = _yaml()

    loading: Any = type("Loader", (yaml.SafeLoader,), {})  # one of our own: what is added to it stays here

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        return _once(
            [(loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value]
        )

    loading.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, loading)
    except yaml.YAMLError as error:
        raise ValueError(f"this is not YAML: {error}") from None


def _yaml() -> Any:
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "a plan in YAML needs PyYAML, which is not installed: pip install pyyaml (or the extra 'plan' of this "
            "package), or write the plan as .json"
        ) from None
    return yaml


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if not isinstance(key, Hashable):
            raise ValueError(f"{key!r} is no name of a setting, for {value!r}")
        if key in found:
            raise ValueError(f"{key!r} stands twice, as {found[key]!r} and {value!r}: keep one")
        found[key] = value
    return found
