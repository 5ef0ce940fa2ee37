"""Values that say what is wrong with them: all problems at once, each with key, value and what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def setting(default: Any, right: str, meaning: str, **limits: Any) -> Any:
    """A field. right: ends the sentence "must be ..."; meaning: what it does, with its unit."""
    return Field(default, description=meaning, json_schema_extra={"right": right}, **limits)


class SettingsError(ValueError):
    """Settings that are wrong. problems: each in words; `what` has them."""

    def __init__(self, what: str, problems: list[str]) -> None:
        super().__init__(what, problems)
        self.what, self.problems = what, problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.what}: {self.problems[0]}"
        return f"{self.what}: {len(self.problems)} problems" + "".join(f"\n  {problem}" for problem in self.problems)


class Checked(BaseModel):
    """Settings that do not change. Wrong ones raise one SettingsError, a ValueError, with every problem.

    Types are strict: True is no number, "2" neither.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, **values: Any) -> None:
        problems = []
        known = type(self).model_fields
        for key in values.keys() - known.keys():
            problems.append(f"{key}={values[key]!r}: unknown key{nearest(key, known)}")
        try:
            super().__init__(**{key: value for key, value in values.items() if key in known})
        except ValidationError as error:
            problems += _said(error, known, values)
        if not problems:
            problems = self.contradictions()
        if problems:
            raise SettingsError(type(self).__name__, sorted(problems))

    def contradictions(self) -> list[str]:
        """Problems of values that are right one by one."""
        return []

    def replace(self, **changes: Any) -> Any:
        """A copy with these settings instead, checked like a new one."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        fields = type(self).model_fields
        return {name: getattr(self, name) for name in fields if getattr(self, name) != fields[name].default}

    def __repr_args__(self) -> Iterable[tuple[str, Any]]:
        return self.changed().items()


def markdown(kind: type[Checked]) -> str:
    """The settings of a kind, for docs/plan.md."""
    lines = ["| setting | default | may be | is |", "|---|---|---|---|"]
    for name, one in kind.model_fields.items():
        extra = one.json_schema_extra
        right = extra["right"] if isinstance(extra, dict) else ""
        shown = "all defaults" if isinstance(one.default, Checked) else f"`{one.default!r}`"
        lines.append(f"| `{name}` | {shown} | {right} | {one.description} |")
    return "\n".join(lines) + "\n"


def nearest(key: str, known: Iterable[str]) -> str:
    """What to say of an unknown key."""
    names = list(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(names)}"


def _said(error: ValidationError, fields: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """One problem per field: alternatives of one type are one sentence."""
    found: dict[str, list[str]] = {}
    for one in error.errors():
        name = str(one["loc"][0])
        inner = one.get("ctx", {}).get("error")
        if isinstance(inner, SettingsError):
            found[name] = [f"{name}.{problem}" for problem in inner.problems]
        elif isinstance(inner, ValueError):
            found[name] = [f"{name}={values[name]!r}: {inner}"]
        else:
            right = fields[name].json_schema_extra["right"]
            found.setdefault(name, [f"{name}={values[name]!r}: must be {right}{_as_number(values[name])}"])
    return [problem for problems in found.values() for problem in problems]


def _as_number(value: Any) -> str:
    """What to say of text that looks like a number to others than YAML."""
    if not (isinstance(value, str) and _EXPONENT.fullmatch(value)):
        return ""
    digits, _, exponent = value.lower().partition("e")
    point, sign = "" if "." in digits else ".0", "" if exponent[0] in "+-" else "+"
    return f"; it is text. With an exponent, YAML wants a point and a sign: {digits}{point}e{sign}{exponent}"
