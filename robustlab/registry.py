"""Names. A part is one file in an axis folder: a class under ``@register``; importing the folder finds it.

Other packages register through the entry-point group ``robustlab.parts``: each entry point names a module, and importing
the module runs its decorators.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from robustlab.types import Part, UserError

FOLDERS: dict[str, tuple[str, ...]] = {
    "attack": ("attacks",),
    "stage": ("attacks", "augment", "mixing", "labels", "latent"),
    "objective": ("objectives",),
    "regularizer": ("regularizers",),
    "gradient": ("weight_perturbation",),
    "averaging": ("averaging",),
    "trainer": ("trainers",),
    "suite": ("suites",),
    "corruption": ("corruptions",),
    "model": ("models",),
    "dataset": ("data",),
    "optimizer": ("training",),
    "schedule": ("training",),
}
PLURAL = {"gradient": "gradients", "averaging": "averaging"}

_entries: dict[str, dict[str, type[Part]]] = {kind: {} for kind in FOLDERS}
_loaded: set[str] = set()
P = TypeVar("P", bound=type[Part])


def register(name: str, *, cite: str = "") -> Callable[[P], P]:
    """Class decorator: make a frozen keyword-only dataclass of the part and give it its name.

    Args:
        name: what configurations call it; kebab-case for trainers, snake_case for models and corruptions.
        cite: the paper, as "Authors, venue year, arXiv:number".

    Raises:
        ValueError: the name is taken by another class, or the class has no docstring.
    """

    def decorate(cls: P) -> P:
        cls = dataclass(frozen=True, kw_only=True)(cls)  # type: ignore[assignment]
        if not cls.__doc__ or cls.__doc__.startswith(f"{cls.__name__}("):
            raise ValueError(f"{cls.__qualname__}: a part needs a docstring; it is what `robustlab explain {name}` prints")
        other = _entries[cls.kind].get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the {cls.kind} '{name}' is already registered by {other.__module__}")
        cls.name, cls.cite = name, cite
        _entries[cls.kind][name] = cls
        return cls

    return decorate


def _load(kind: str) -> None:
    if kind in _loaded:
        return
    _loaded.add(kind)
    try:
        _import(kind)
    except BaseException:
        _loaded.discard(kind)
        raise


def _import(kind: str) -> None:
    for folder in FOLDERS[kind]:
        package = importlib.import_module(f"robustlab.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"robustlab.{folder}.{module.name}")
    for point in importlib.metadata.entry_points(group="robustlab.parts"):
        try:
            point.load()
        except Exception as error:
            raise UserError(f"the plug-in '{point.name}' ({point.value}) cannot be loaded: {error}") from error


def entries(kind: str) -> dict[str, type[Part]]:
    """All parts of a kind by name, sorted."""
    _load(kind)
    return dict(sorted(_entries[kind].items()))


def lookup(kind: str, name: str) -> type[Part]:
    """The class behind a name.

    Raises:
        UserError: no such name; the line offers the nearest one.
    """
    known = entries(kind)
    if name not in known:
        others = [f"an {k}" if k[0] in "aeiou" else f"a {k}" for k in FOLDERS if name in entries(k)]
        elsewhere = f"; '{name}' is {' and '.join(others)}" if others else ""
        shown = name if len(name) <= 60 else f"{name[:57]}..."
        raise UserError(f"unknown {kind} '{shown}'{nearest(shown, known)}{elsewhere}; known: {', '.join(known)}")
    return known[name]


def nearest(word: object, known: object) -> str:
    """`` (did you mean 'pgd'?)``, or nothing when no known word is near; capitals do not count."""
    spelled = {str(k).lower(): str(k) for k in known}  # type: ignore[attr-defined]
    letters = sorted(str(word).lower())
    swapped = [name for name in spelled if sorted(name) == letters]  # `pdg` is a slip for pgd, though pdpgd is nearer by difflib
    close = swapped or difflib.get_close_matches(str(word).lower(), spelled, n=1, cutoff=0.5)
    return f" (did you mean '{spelled[close[0]]}'?)" if close else ""


def kind_of(word: str) -> str:
    """The kind that a singular or plural word names (``attacks`` -> ``attack``).

    Raises:
        UserError: no such kind.
    """
    for kind in FOLDERS:
        if word in (kind, plural(kind)):
            return kind
    names = [plural(k) for k in FOLDERS]
    raise UserError(f"unknown kind '{word}'{nearest(word, names)}; expected one of {', '.join(names)}")


def plural(kind: str) -> str:
    return PLURAL.get(kind, f"{kind}s")


def summary(cls: type) -> str:
    """The first sentence of a part's docstring."""
    return inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def import_callable(spec: str) -> Any:
    """The object that ``package.module:name`` names; modules in the current folder are found too.

    Raises:
        UserError: the module cannot be imported or has no such name.
    """
    module_name, _, name = spec.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{spec}: cannot import '{module_name}': {type(error).__name__}: {reason}") from None
    finally:
        sys.path.remove(here)
    if not hasattr(module, name):
        raise UserError(
            f"{spec}: '{module_name}' has no '{name}'{nearest(name, [n for n in vars(module) if not n.startswith('_')])}"
        )
    return getattr(module, name)
