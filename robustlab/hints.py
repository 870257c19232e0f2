"""The annotations of fields: what they accept, and how they read in a message.

Ranges are ``annotated_types`` marks; values are checked by pydantic. A fraction such as ``8/255`` is a number where a field
wants one.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types as pytypes
import typing
from typing import Annotated, Any, Literal

import annotated_types
from pydantic import TypeAdapter, ValidationError

from robustlab.registry import plural
from robustlab.types import Part

LARGEST = 3e38  # float32 ends a little above
FRACTION = re.compile(r"^\s*([-+]?\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*$")


def fits(hint: Any, raw: Any) -> bool:
    """Whether a plain value is what a field wants: ``true`` is no number, and float32 can hold the numbers."""
    kinds = scalars_of(hint)
    if isinstance(raw, bool) and bool not in kinds:
        return False
    if isinstance(raw, str | int | float) and not isinstance(raw, bool) and kinds == {bool}:
        return False
    try:
        value = adapter(hint).validate_python(raw)
    except (ValidationError, ValueError, OverflowError):
        return False
    return not isinstance(value, float) or abs(value) <= LARGEST


def numbers(raw: Any, hint: Any) -> Any:
    """``8/255`` and ``1e-3`` as numbers where the field wants a number."""
    if isinstance(raw, str) and float in scalars_of(hint) and str not in scalars_of(hint):
        match = FRACTION.match(raw)
        if match and float(match[2]) != 0:
            return float(match[1]) / float(match[2])
    return raw


@functools.cache
def type_hints(cls: Any) -> dict[str, Any]:
    """The fields' annotations, resolved."""
    return typing.get_type_hints(cls, include_extras=True)


@functools.cache
def adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def options_of(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a single type is its own only one."""
    if typing.get_origin(hint) in (typing.Union, pytypes.UnionType):
        return tuple(o for a in typing.get_args(hint) for o in options_of(a))
    return (hint,)


def choices_of(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def scalars_of(hint: Any) -> set[type]:
    """The plain types that a field can hold."""
    out: set[type] = set()
    for option in options_of(hint):
        origin = typing.get_origin(option)
        if origin is Annotated:
            out |= scalars_of(typing.get_args(option)[0])
        elif origin in (tuple, list):
            for a in typing.get_args(option):
                out |= scalars_of(a) if a is not Ellipsis else set()
        elif origin is Literal:
            out |= {type(a) for a in typing.get_args(option)}
        elif isinstance(option, type):
            out.add(option)
    return out


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}


def describe(hint: Any) -> str:
    """A field's type in words, for messages and ``explain``."""
    options = options_of(hint)
    if len(options) > 1:
        return " or ".join(describe(o) for o in options)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        marks = {
            annotated_types.Ge: ("ge", ">="),
            annotated_types.Gt: ("gt", ">"),
            annotated_types.Le: ("le", "<="),
            annotated_types.Lt: ("lt", "<"),
        }
        limits = [f"{marks[type(m)][1]} {getattr(m, marks[type(m)][0])}" for m in args[1:] if type(m) in marks]
        return " ".join([describe(args[0]), " and ".join(limits)]).strip()
    if origin is Literal:
        return "one of " + ", ".join(str(c) for c in args) if len(args) > 1 else f"'{args[0]}'"
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list of {_many(args[0])}"
        return f"a list of {len(args)}: " + ", ".join(describe(a) for a in args)
    if isinstance(hint, type) and issubclass(hint, Part):
        return a(spoken(hint.kind))
    if origin is dict or (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return "a mapping"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _many(hint: Any) -> str:
    """The items of a list in words: ``words``, ``numbers >= 0``, ``stages``, ``lists of words``."""
    bare = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    if isinstance(bare, type) and issubclass(bare, Part):
        return plural(bare.kind)
    if typing.get_origin(bare) is tuple:
        return describe(bare).replace("a list", "lists", 1)
    one = describe(hint)
    if bare in _WORDS and one.startswith("a "):
        noun = _WORDS[bare].removeprefix("a ")
        return one.removeprefix("a ").replace(noun, f"{noun}s", 1)
    return one


def spoken(kind: str) -> str:
    """What a kind is called in a sentence."""
    return {"dataset": "data set", "gradient": "gradient rule", "averaging": "averaging of weights"}.get(kind, kind)


def a(word: str) -> str:
    """The word with its article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
