"""YAML as nodes: values that remember their file and line; ``extends`` and ``--set`` merged node by node.

Reading is YAML 1.2's core schema: ``on`` is a word, ``1e-3`` a number. Tags, cycles, duplicate keys and files that are no
configuration are refused with one line that says where.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from robustlab.registry import nearest
from robustlab.types import UserError


@dataclass(frozen=True)
class Node:
    """A value with the place it was written at; mappings and lists hold further nodes."""

    value: Any
    file: str
    line: int

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {k: v.plain() for k, v in self.value.items()}
        if isinstance(self.value, list):
            return [v.plain() for v in self.value]
        return self.value


class _Loader(yaml.SafeLoader):
    """PyYAML with the plain scalars of YAML 1.2's core schema, and no others."""

    yaml_implicit_resolvers = {}


class Dumper(yaml.SafeDumper):
    """Quotes a word only where :class:`_Loader` would read something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


_TAG = "tag:yaml.org,2002:"
for _type, _first, _regex in (
    ("null", ["~", "n", "N", ""], r"~|null|Null|NULL|"),
    ("bool", list("tTfF"), r"true|True|TRUE|false|False|FALSE"),
    ("int", list("-+0123456789"), r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    (
        "float",
        list("-+.0123456789"),
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    ),
):
    _Loader.add_implicit_resolver(_TAG + _type, re.compile(rf"(?:{_regex})\Z"), _first)

_SCALARS = {_TAG + t for t in ("str", "int", "float", "bool", "null")}
_MOST_NODES = 20_000
_MOST_CHARACTERS = 250_000
_MOST_LEVELS = 50


def parse(text: str, file: str) -> Node:
    """YAML text as nodes.

    Raises:
        UserError: not YAML; a tag, a cycle, a duplicate key, a key that is no word; too many nodes.
    """
    if len(text) > _MOST_CHARACTERS:
        raise UserError(f"{file}: more than {_MOST_CHARACTERS:,} characters; not a configuration")
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{file}:{line}: not a text file: it contains the character U+{int(error.character):04X}") from None
    try:
        root = loader.get_single_node()
        return Node(None, file, 1) if root is None else _convert(root, file, (), [0])
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = str(error.problem or error.context)
        what = f"{error.context}, {problem}" if problem.startswith("but ") else problem
        raise UserError(f"{file}:{mark.line + 1 if mark else 1}: not valid YAML: {what}") from None
    except (ValueError, OverflowError):  # such as the escape "\\Uffffffff"
        raise UserError(f"{file}:{loader.line + 1}: not valid YAML: an escape that stands for no character") from None
    except RecursionError:
        raise UserError(f"{file}:{loader.line + 1}: nested more than {_MOST_LEVELS} levels deep") from None
    finally:
        loader.dispose()


def _convert(node: yaml.Node, file: str, above: tuple[int, ...], count: list[int]) -> Node:
    line = node.start_mark.line + 1
    count[0] += 1
    if count[0] > _MOST_NODES:
        raise UserError(f"{file}:{line}: more than {_MOST_NODES} values; aliases that multiply?")
    if id(node) in above:
        raise UserError(f"{file}:{line}: an alias refers to the value that contains it")
    if len(above) > _MOST_LEVELS:
        raise UserError(f"{file}:{line}: nested more than {_MOST_LEVELS} levels deep")
    above = (*above, id(node))
    if isinstance(node, yaml.ScalarNode):
        if node.tag not in _SCALARS:
            raise UserError(f"{file}:{line}: {_no_tag(node)}")
        return Node(_scalar(node, file, line), file, line)
    if isinstance(node, yaml.SequenceNode):
        if node.tag != _TAG + "seq":
            raise UserError(f"{file}:{line}: {_no_tag(node)}")
        return Node([_convert(child, file, above, count) for child in node.value], file, line)
    if node.tag != _TAG + "map":
        raise UserError(f"{file}:{line}: {_no_tag(node)}")
    out: dict[str, Node] = {}
    for key_node, child in node.value:
        at = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _SCALARS:
            raise UserError(f"{file}:{at}: a key must be a word")
        key = str(key_node.value)
        if not key.isprintable() or len(key) > 100:
            raise UserError(f"{file}:{at}: a key must be a word")
        if key in out:
            raise UserError(f"{file}:{at}: {key}: this key stands twice (first in line {out[key].line})")
        converted = _convert(child, file, above, count)
        out[key] = Node(converted.value, file, at)
    return Node(out, file, line)


def _no_tag(node: yaml.Node) -> str:
    return f"the tag '{node.tag.replace(_TAG, '!!')}' is not allowed; a configuration holds plain values only"


_KINDS = {"int": "whole number", "float": "number", "bool": "truth value", "null": "null"}


def _scalar(node: yaml.ScalarNode, file: str, line: int) -> Any:
    kind, text = node.tag.removeprefix(_TAG), str(node.value)
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "int":
            value = int(text, 0 if text[:2] in ("0x", "0o") else 10)
            if abs(value) >= 2**63:
                raise OverflowError
            return value
        if kind == "float":
            return float(re.sub(r"^([-+]?)\.(?=[iInN])", r"\1", text))
    except (KeyError, ValueError, OverflowError):
        large = kind == "int" and text.lstrip("+-")[:1].isdigit()
        raise UserError(f"{file}:{line}: {short(text)} is {'too large a number' if large else f'no {_KINDS[kind]}'}") from None
    return text


def read(path: str | Path, _above: tuple[Path, ...] = ()) -> Node:
    """A YAML file as nodes, with its ``extends`` merged in.

    Raises:
        UserError: the file cannot be read, is empty, is a list, or extends itself.
    """
    path = Path(path)
    file = str(path)
    node = parse(_text(path), file)
    if node.value is None:
        raise UserError(f"{file}:1: the file is empty; expected a mapping such as 'trainer: pgd-at'")
    if not isinstance(node.value, dict):
        raise UserError(f"{file}:{node.line}: expected a mapping such as 'trainer: pgd-at', got {shape(node)}")
    base = node.value.pop("extends", None)
    if base is not None:
        if not isinstance(base.value, str):
            raise UserError(f"{file}:{base.line}: extends: expected a path, got {shape(base)}")
        target = path.parent / base.value
        if not _is_file(target):
            raise UserError(f"{file}:{base.line}: extends: no such file {short(str(target))}{_near_file(target)}")
        here = (*_above, path.resolve())
        if target.resolve() in here:
            way = " -> ".join(p.name for p in (*here[here.index(target.resolve()) :], target))
            raise UserError(f"{file}:{base.line}: extends: a file cannot extend itself: {way}")
        node = merge(read(target, here), node)
    return node


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError(errno.EINVAL, "not a file")
        with open(path, "rb") as source:
            raw = source.read(4 * _MOST_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read: {reason}{_near_file(path)}") from None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start > 4 * _MOST_CHARACTERS - 4:
            return raw.decode("utf-8", "replace")
        raise UserError(f"{path}:{raw.count(10, 0, error.start) + 1}: not a text file in UTF-8") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, or a folder that may not be read
        return False


def _near_file(path: Path) -> str:
    try:
        names = {p.stem: p for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml") and p.name != path.name}
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.5)
    return f" (did you mean '{names[close[0]]}'?)" if close else ""


def merge(base: Node, over: Node) -> Node:
    """Mappings merge key by key, everything else replaces. A part with another name replaces the whole part.

    A mapping without a name, laid over a list of parts, changes the parts that it names.

    Raises:
        UserError: the list has no part of that name, or several.
    """
    if isinstance(base.value, list) and isinstance(over.value, dict) and over.value and "name" not in over.value:
        items = list(base.value)
        for name, node in over.value.items():
            i = position(base, name)
            if i is None:
                raise UserError(f"{place(node)}{name}: {_no_item(base, name)}")
            items[i] = merge(items[i], node)
        return Node(items, base.file, base.line)
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        if isinstance(over.value, dict) and isinstance(base.value, str) and "name" not in over.value:
            base = Node({"name": base}, base.file, base.line)  # `trainer: pgd-at` and then fields of it
        else:
            return over
    names = [n.value["name"].value if "name" in n.value else None for n in (base, over)]
    if names[1] is not None and names[0] != names[1]:
        return over
    out = dict(base.value)
    for key, node in over.value.items():
        out[key] = merge(out[key], node) if key in out else node
    return Node(out, over.file, over.line)


def place(node: Node) -> str:
    """``file:line: ``, or nothing where a value comes from no file."""
    return f"{node.file}: " if node.file.startswith("--set") else f"{node.file}:{node.line}: " if node.file else ""


def item_name(item: Node) -> Any:
    named = item.value.get("name") if isinstance(item.value, dict) else item
    return named.value if named is not None else None


def position(items: Node, key: str) -> int | None:
    """Which item of a list a key means: its position or its name; None if there is no such item, or more than one."""
    if key.isdecimal():
        return int(key) if len(key) < 10 and int(key) < len(items.value) else None
    found = [i for i, item in enumerate(items.value) if item_name(item) == key]
    return found[0] if len(found) == 1 else None


def _no_item(items: Node, key: str) -> str:
    names = [n if isinstance(n := item_name(item), str) else str(i) for i, item in enumerate(items.value)]
    if names.count(key) > 1:
        return f"this list has '{key}' more than once; name the position, from 0"
    return f"no such item{nearest(key, names)}; this list has: {', '.join(names) or 'nothing'}"


def override(root: Node, settings: Sequence[str]) -> Node:
    """Apply ``a.b=c`` settings; a step of the path may be a list index. The value is read as YAML.

    Raises:
        UserError: not of the form ``a.b=c``, or a path through something that is no mapping.
    """
    for setting in settings:
        path, found, text = setting.partition("=")
        keys = path.strip().split(".")
        if not found or not all(keys):
            raise UserError(f"--set {setting}: expected key.key=value, for example training.epochs=20")
        leaf = parse(text, f"--set {setting}")
        try:
            root = _put(root, keys, leaf)
        except UserError as error:
            raise UserError(f"--set {setting}: {error}") from None
    return root


def _put(node: Node, keys: list[str], leaf: Node) -> Node:
    if not keys:
        return merge(node, leaf)
    head, rest = keys[0], keys[1:]
    here = Node(None, leaf.file, 1)
    if isinstance(node.value, list):
        i = position(node, head)
        if i is None:
            raise UserError(f"{head}: {_no_item(node, head)}")
        items = list(node.value)
        items[i] = _put(items[i], rest, leaf)
        return Node(items, node.file, node.line)
    if isinstance(node.value, str):
        node = Node({"name": node}, node.file, node.line)
    elif node.value is None:
        node = Node({}, leaf.file, 1)
    elif not isinstance(node.value, dict):
        raise UserError(f"'{head}' lies inside {shape(node)}, which has no keys")
    child = node.value.get(head, here)
    return Node({**node.value, head: _put(child, rest, leaf)}, node.file, node.line)


def shape(node: Node) -> str:
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list" if node.value else "an empty list"
    if node.value is None:
        return "nothing"
    if isinstance(node.value, bool | float):
        return yaml.dump(node.value, Dumper=Dumper).split("\n")[0]
    return short(node.value)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
