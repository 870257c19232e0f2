"""``robustlab explain NAME``: what the docstring and the fields of a part say, and what it is made of."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from robustlab.config import describe, dump, type_hints
from robustlab.registry import FOLDERS, entries, nearest
from robustlab.types import Part, Trainer, UserError, is_part

# the order in which parts of one name are explained
_ORDER = ("trainer", "attack", *[k for k in FOLDERS if k not in ("trainer", "attack")])


def find(name: str) -> list[type[Part]]:
    """All parts of that name, a trainer first.

    Raises:
        UserError: nothing is called so; the line offers the nearest name.
    """
    base = name.partition(":")[0]
    found = [entries(kind)[base] for kind in _ORDER if base in entries(kind)]
    if not found:
        known = {n for kind in FOLDERS for n in entries(kind)}
        raise UserError(
            f"nothing is called '{name}'{nearest(name, known)}; `robustlab list attacks` (trainers, models, ...) shows names"
        )
    return found


def explain(cls: type[Part]) -> str:
    """A part as text: heading, mathematics, description, fields with type and default, and for trainers the composition."""
    article = "an" if cls.kind[0] in "aeiou" else "a"
    lines = [f"{cls.name}: {article} {cls.kind}", f"  {cls.__module__}.{cls.__qualname__}"]
    if cls.cite:
        lines.append(f"  {cls.cite}")
    if issubclass(cls, Trainer):
        lines += [f"  fidelity: {cls.fidelity}", f"  cost per sample and step: {cls.passes}"]
    module = inspect.getmodule(cls)
    lines += ["", *_indent(inspect.cleandoc(module.__doc__ or "") if module else "")]
    description, notes = _split(inspect.cleandoc(cls.__doc__ or ""))
    lines += ["", *_indent(description)]
    fields = _fields(cls, notes)
    if fields:
        lines += ["", "  fields"]
        width = max(len(name) for name, *_ in fields)
        for name, kind, default, note in fields:
            lines.append(f"    {name:<{width}}  {kind}; default {default}" if default else f"    {name:<{width}}  {kind}; required")
            lines += [f"    {'':<{width}}  {part}" for part in _wrap(note, 100 - width)]
    if issubclass(cls, Trainer) and all(_has_default(f) for f in dataclasses.fields(cls)):  # type: ignore[arg-type]
        lines += ["", "  parts", *_parts(cls(), "    ")]
    return "\n".join(lines)


def _indent(text: str) -> list[str]:
    return [f"  {line}".rstrip() for line in text.splitlines()]


def _split(doc: str) -> tuple[str, dict[str, str]]:
    """The prose, and the notes of the ``Attributes`` section by field name."""
    prose, _, section = doc.partition("\nAttributes:\n")
    section = re.split(r"\n\S", section)[0]
    notes: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        match = re.match(r"    (\w[\w, ]*): (.*)", line)
        if match and not line.startswith("     "):
            names = [n.strip() for n in match[1].split(",")]
            notes |= dict.fromkeys(names, match[2])
        elif names and line.strip():
            notes |= {n: f"{notes[n]} {line.strip()}" for n in names}
    return prose.strip(), notes


def _inherited_notes(cls: type[Part]) -> dict[str, str]:
    notes: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__doc__ and dataclasses.is_dataclass(base):
            notes |= _split(inspect.cleandoc(base.__doc__))[1]
    return notes


def _has_default(f: Any) -> bool:
    return f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING


def _fields(cls: type[Part], notes: dict[str, str]) -> list[tuple[str, str, str, str]]:
    hints, notes = type_hints(cls), _inherited_notes(cls) | notes
    out = []
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        default = f.default if f.default is not dataclasses.MISSING else ""
        out.append((f.name, describe(hints[f.name]), short(default) if _has_default(f) else "", notes.get(f.name, "")))
    return out


def short(value: Any) -> str:
    """A default in a few characters: parts by name, numbers as they are, None as null."""
    if isinstance(value, tuple):
        return "[" + ", ".join(short(v) for v in value) + "]"
    if is_part(value):
        return getattr(value, "name", "") or type(value).__name__
    if isinstance(value, float):
        return f"{value:g}"
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if value is None or isinstance(value, bool)
        else str(value)
    )


def _parts(part: Any, pad: str) -> list[str]:
    """The composition, one line a part with the values that are not null, and its module."""
    lines = []
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        for item in value if isinstance(value, tuple) else (value,):
            if not (is_part(item) and isinstance(item, Part)):
                continue
            plain = {k: v for k, v in dump(item).items() if k != "name" and v is not None and not isinstance(v, dict)}
            shown = " ".join(f"{k}={short(tuple(v) if isinstance(v, list) else v)}" for k, v in plain.items())
            lines.append(f"{pad}{f.name}: {item.name} {shown}".rstrip() + f"   [{type(item).__module__}]")
            lines += _parts(item, pad + "  ")
    return lines


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, max(40, width))
