"""The base class of the config's sections: immutable, validated, with one-line errors."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, Tag, ValidationError
from pydantic_core import ErrorDetails

from ..utils.errors import UserError

# Configs come from strangers too: larger values than any network has would fill the memory.
Layers = Annotated[int, Field(ge=1, le=1000)]
Pixels = Annotated[int, Field(ge=1, le=2**15)]
Size = Annotated[int, Field(ge=1, le=100_000)]


class ConfigSection(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> Self:
        """Validate nested values by field name.

        Raises UserError, which starts with `source`, if a key is unknown or a value is invalid.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(_error_message(cls, error, source)) from None

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed."""
        return type(self).from_dict({**self.model_dump(), **changes})


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested `changes` into a copy of `base`: mappings are merged, other values replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _error_message(section: type[BaseModel], error: ValidationError, source: str) -> str:
    """Describe the first problem in one line: source, key, reason, valid alternatives."""
    problems: dict[tuple[str, ...], list[ErrorDetails]] = {}  # a union field has one error per member
    for details in error.errors(include_url=False):
        path, _ = _locate(section, details["loc"])
        problems.setdefault(path, []).append(details)
    path, (problem, *alternatives) = next(iter(problems.items()))
    key = ".".join(path) or section.__name__
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        _, names = _locate(section, problem["loc"])
        close = difflib.get_close_matches(path[-1], names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"valid keys: {', '.join(names)}"
        return f"{source}: unknown key '{key}'; {hint}{more}"
    message = problem["msg"].removeprefix("Value error, ")
    message += "".join(f" or {other['msg'].removeprefix('Input should be ')}" for other in alternatives)
    value = "" if isinstance(problem["input"], dict | BaseModel) else f" (got {problem['input']!r})"
    where = "" if not path and problem["type"] == "value_error" else f"{key}: "  # a validator names its keys itself
    return f"{source}: {where}{message[0].lower()}{message[1:]}{value}{more}"


def _locate(section: type[BaseModel], location: Sequence[str | int]) -> tuple[tuple[str, ...], list[str]]:
    """Return the key of an error, without the union members that pydantic appends, and the valid keys beside it."""
    path, names = [], list(section.model_fields)
    tagged: dict[str, type[BaseModel]] = {}  # members of the union that the last key is
    for part in map(str, location):
        if part in tagged:
            section, tagged = tagged[part], {}
            names = list(section.model_fields)
            continue
        path.append(part)
        names = list(section.model_fields)
        annotation = section.model_fields[part].annotation if part in names else None
        members = [member for member in (annotation, *get_args(annotation)) if member is not None]
        tagged = {
            tag.tag: get_args(member)[0]
            for member in members
            for tag in getattr(member, "__metadata__", ())
            if isinstance(tag, Tag)
        }
        nested = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
        if not nested and not tagged:
            break
        section = nested[0] if nested else section
    return tuple(path), names
