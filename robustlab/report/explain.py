"""``robustlab explain NAME``: what the docstring and the fields of a part say, and what it is made of."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable
from typing import Any

from robustlab import geometry
from robustlab.config import dump
from robustlab.hints import a, describe, spoken, type_hints
from robustlab.registry import FOLDERS, entries, nearest
from robustlab.types import Attack, Part, Trainer, UserError, is_part

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


_USE = {
    "trainer": "trainer: {name}",
    "model": "model: {name}",
    "dataset": "data: {name}",
    "optimizer": "optimizer: {name}",
    "schedule": "schedule: {name}, or in place of a number inside the trainer",
    "stage": "trainer.inner: [{name}, ...]",
    "attack": "trainer.inner.craft.attack: {name}, or a suite's attacks: [{name}, ...]",
    "objective": "trainer.objective: {name}",
    "regularizer": "trainer.regularizers: [{name}, ...]",
    "gradient": "trainer.gradient: {name}",
    "averaging": "trainer.averaging: {name}",
    "suite": "robustlab evaluate MODEL --suite {name}",
    "corruption": "a suite's corruptions: [{name}, ...]",
}


def explain(cls: type[Part], width: int = 100) -> str:
    """A part as text: what it does, its mathematics, its fields with type and default, for trainers the composition, its source.

    Args:
        cls: the part.
        width: of the text, in characters; formulas are never broken.
    """
    description, notes = _split(inspect.cleandoc(cls.__doc__ or ""))
    module = inspect.getmodule(cls)
    details = inspect.cleandoc((module.__doc__ if module else "") or "")
    lines = [f"{cls.name}, {a(spoken(cls.kind))}", "", *_indent(reflow(description, width - 2))]
    if details:
        lines += ["", "  details", *_indent(reflow(details, width - 4), "    ")]
    fields = _fields(cls, notes)
    if fields:
        lines += ["", "  fields"]
        column = max(len(name) for name, *_ in fields)
        for name, kind, default, note in fields:
            lines.append(f"    {name:<{column}}  {kind} ({f'default {default}' if default else 'required'})")
            lines += [f"    {'':<{column}}  {part}" for part in _fill(plain(note), max(40, width - column - 6))]
    if issubclass(cls, Trainer) and all(_has_default(f) for f in dataclasses.fields(cls)):  # type: ignore[arg-type]
        lines += ["", "  parts", *_parts(cls(), "    ")]
    facts = {"use": _USE[cls.kind].format(name=f"{cls.name}:ARCH" if "arch" in type_hints(cls) else cls.name)}
    if issubclass(cls, Trainer):
        facts |= {"cost": f"{cls.passes} per sample and step", "fidelity": cls.fidelity}
    facts |= {"source": cls.cite, "code": f"{cls.__module__}.{cls.__qualname__}"}
    lines += ["", *(f"  {word:<8}  {fact}" for word, fact in facts.items() if fact)]
    return "\n".join(lines)


def reflow(text: str, width: int) -> list[str]:
    """Paragraphs and lists filled to a width; indented blocks, which are formulas, as they stand."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", plain(text).strip("\n")):
        rows = block.splitlines()
        if rows[0].startswith("- "):
            for item in re.split(r"\n(?=- )", block):
                lines += _fill(" ".join(item.split()), width, subsequent_indent="  ")
        elif any(row.startswith(" ") for row in rows):
            lines += rows
        else:
            lines += _fill(" ".join(rows), width)
        lines.append("")
    return lines[:-1]


def _fill(text: str, width: int, subsequent_indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=subsequent_indent, break_on_hyphens=False, break_long_words=False)


def plain(text: str) -> str:
    """Names between single quotes, and configurations' word for None."""
    return re.sub(r"\bNone\b", "null", re.sub(r"``([^`]*)``", r"'\1'", text))


def _indent(lines: Iterable[str], pad: str = "  ") -> list[str]:
    return [f"{pad}{line}".rstrip() for line in lines]


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


def _default(f: Any) -> Any:
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()


def _fields(cls: type[Part], notes: dict[str, str]) -> list[tuple[str, str, str, str]]:
    hints, notes = type_hints(cls), _inherited_notes(cls) | notes
    out = []
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind = describe(hints[f.name])
        if f.name == "norm" and issubclass(cls, Attack):
            kind = kind.replace(", ".join(geometry.NORMS), ", ".join(cls.norms))
        out.append((f.name, kind, short(_default(f)) if _has_default(f) else "", notes.get(f.name, "")))
    return out


def short(value: Any) -> str:
    """A default in a few characters: parts by name, numbers as they are, None as null."""
    if isinstance(value, tuple):
        return "[" + ", ".join(short(v) for v in value) + "]"
    if is_part(value):
        return getattr(value, "name", "") or type(value).__name__
    if isinstance(value, float):
        return f"{value:g}"
    words: dict[Any, str] = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


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
