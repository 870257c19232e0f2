"""YAML -> validated parts. The dataclass that implements a part is its schema; there is no second one.

A file is read into nodes that remember their file and line, ``extends`` and ``--set`` are merged node by node, and the tree is
then built into dataclasses. All mistakes of a file are collected and reported together, each as one line:

    configs/digits/pgd-at.yaml:7: trainer.inner.craft.attack.step_size: unknown key (did you mean 'steps'?)

Reading is YAML 1.2's idea of booleans (``on`` is a word), numbers such as ``1e-3`` and fractions such as ``8/255``; tags, cycles
and duplicate keys are refused. A part is ``{name: pgd, steps: 7}`` or just ``pgd``; without a name it changes the default part's
fields. For a field that holds several parts, a list replaces them (an item inherits from the default part of that name) and a
mapping ``{craft: {...}}`` changes the parts that it names. Any number may be a schedule: ``{name: linear, start: 0, end: 8/255}``.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types
import yaml

from robustlab.hints import FRACTION, LARGEST, a, adapter, choices_of, describe, fits, numbers, options_of, spoken, type_hints
from robustlab.nodes import Dumper, Node, item_name, merge, override, parse, place, position, read, shape
from robustlab.registry import entries, lookup, nearest
from robustlab.types import (
    Attack,
    CorruptionSuite,
    Count,
    Dataset,
    Fraction,
    Model,
    Optimizer,
    Part,
    Positive,
    Schedule,
    Suite,
    Threat,
    Trainer,
    UserError,
    Whole,
    check_radius,
    is_part,
    resolve_schedules,
    with_threat,
)

# ------------------------------------------------------------------------------------------------------ the document


@dataclass(frozen=True)
class Probe:
    """How robust accuracy is watched during training: PGD on the first validation images.

    Attributes:
        every: epochs between two probes; the last epoch is always probed.
        num_examples: how many validation images.
        steps: of PGD.
    """

    every: Count = 1
    num_examples: Count = 200
    steps: Count = 10


@dataclass(frozen=True)
class Overfitting:
    """Catastrophic overfitting of single-step training, watched by PGD on training images after every epoch.

    Attributes:
        drop: how far the accuracy may fall below the best of the run.
        num_examples: how many training images, drawn once, not augmented.
        steps: of PGD.
        act: ``stop``, or ``rollback``: once, back to the epoch before and on with ``attack`` in place of the trainer's own.
        attack: what crafts after a rollback; null: PGD with 10 steps of eps / 4.
    """

    drop: Fraction = 0.2
    num_examples: Count = 256
    steps: Count = 10
    act: Literal["stop", "rollback"] = "stop"
    attack: Attack | None = None


@dataclass(frozen=True)
class Guards:
    """When training stops by itself.

    Attributes:
        nan: stop at the first loss, weight or running statistic that is not finite.
        collapse: stop when, after this many epochs, clean validation accuracy is still at chance level; null: never.
        overfitting: what to do about catastrophic overfitting; null: do not look. For single-step trainers.
    """

    nan: bool = True
    collapse: Count | None = 5
    overfitting: Overfitting | None = None


@dataclass(frozen=True)
class Training:
    """The loop.

    Attributes:
        epochs: passes over the training set.
        batch_size: images per optimizer step, over all processes and micro-batches.
        accumulation: micro-batches per step.
        clip_grad: largest total gradient norm, or null.
        precision: of the forward passes; ``bf16`` is autocast.
        channels_last: memory format of model and images; the faster one for most convolutional nets.
        compile: run the model through torch.compile.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        threads: CPU threads, or null for torch's own choice.
        checkpoint_every: epochs between two checkpoints.
        probe: how robust accuracy is watched; ``best`` is chosen by it.
        guards: when training stops by itself.
    """

    epochs: Count = 10
    batch_size: Count = 128
    accumulation: Count = 1
    clip_grad: Positive | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = True
    compile: bool = False
    device: str = "auto"
    threads: Annotated[int, annotated_types.Ge(1), annotated_types.Le(4096)] | None = None
    checkpoint_every: Count = 1
    probe: Probe = Probe()
    guards: Guards = Guards()


@dataclass(frozen=True)
class Evaluation:
    """What ``robustlab evaluate`` does with this run when nothing else is asked for.

    Attributes:
        suites: names, or YAML files.
        num_examples: how many test images; null means all.
        batch_size: of the evaluation.
    """

    suites: tuple[str, ...] = ("pgd-20",)
    num_examples: Count | None = None
    batch_size: Count = 128


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run.

    Attributes:
        trainer: the method.
        model: the architecture; ``init`` starts from weights.
        data: the images.
        threat: norm and eps.
        optimizer: sgd or adamw.
        schedule: of the learning rate, as a factor on the optimizer's.
        training: the loop.
        evaluation: what is scored afterwards.
        logging: any of jsonl, tensorboard, wandb.
        seed: of all draws.
    """

    trainer: Trainer
    model: Model
    data: Dataset
    threat: Threat = Threat()
    optimizer: Optimizer
    schedule: Schedule
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    logging: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl",)
    seed: Whole = 0


DEFAULTS: dict[str, Any] = {"optimizer": "sgd", "schedule": "cosine"}

# ----------------------------------------------------------------------------------------------------------- building


class _Builder:
    """Builds nodes into dataclasses and collects what is wrong."""

    def __init__(self, may_vary: Callable[[str], bool], epochs: int = 10) -> None:
        self.errors: list[str] = []
        self.may_vary = may_vary  # whether the number at a path may be a schedule
        self.epochs = epochs

    def fail(self, node: Node, path: str, message: str) -> None:
        self.errors.append(place(node) + ": ".join(s for s in (path, message) if s))

    def times(self) -> list[float]:
        """Epochs at which schedules are tried out."""
        return [i * self.epochs / 32 for i in range(33)]

    def part(self, kind: str, node: Node, default: Part | None, path: str, cls: type[Part] | None = None) -> Any:
        """One part; ``None`` after a mistake."""
        fields = node.value
        if isinstance(fields, str):
            fields = {"name": node}
        if not isinstance(fields, dict):
            self.fail(node, path, f"expected the name of {a(spoken(kind))} or a mapping with one, got {shape(node)}")
            return None
        extra: dict[str, Any] = {}
        if cls is None:
            if "name" in fields:
                named = fields["name"]
                if not isinstance(named.value, str):
                    self.fail(
                        named, f"{path}.name" if path else "name", f"expected the name of {a(spoken(kind))}, got {shape(named)}"
                    )
                    return None
                name, colon, arch = named.value.partition(":")
                try:
                    cls = lookup(kind, name)
                except UserError as error:
                    self.fail(named, path, str(error))
                    return None
                if colon and not _takes_arch(cls):
                    self.fail(named, path, f"'{name}' takes no ':{arch}'")
                    return None
                extra = {"arch": arch} if colon else {}
            elif default is not None:
                cls = type(default)
            else:
                self.fail(node, path, f"'name' is missing; known: {', '.join(entries(kind))}")
                return None
        if default is not None and type(default) is not cls:
            default = None
        return self.fields(cls, {k: v for k, v in fields.items() if k != "name"}, node, default, path, extra)

    def fields(
        self, cls: Any, given: Mapping[str, Node], node: Node, default: Any, path: str, extra: Mapping[str, Any] = {}
    ) -> Any:
        """A dataclass from a mapping; fields that are not given come from ``default``, else from the class."""
        hints = type_hints(cls)
        known = {f.name: f for f in dataclasses.fields(cls) if f.init}
        before = len(self.errors)
        values: dict[str, Any] = {name: getattr(default, name) for name in known} if default is not None else {}
        values.update(extra)
        for key, child in given.items():
            at = f"{path}.{key}" if path else key
            if key not in known:
                hint = nearest(key, known) or f"; known: {', '.join(known) or 'none'}"
                self.fail(child, at, f"unknown key{hint}")
                continue
            start = values[key] if key in values else _class_default(known[key])
            values[key] = self.value(hints[key], child, start, at)
        for key, f in known.items():
            if key not in values and not _has_default(f):
                self.fail(node, f"{path}.{key}" if path else key, f"missing; expected {describe(hints[key])}")
        if len(self.errors) > before:
            return None
        try:
            part = cls(**values)
            if any(isinstance(v, Schedule) for v in values.values()):
                for t in self.times():
                    resolve_schedules(part, t, self.epochs)
            return part
        except ValueError as error:
            word, message = _blame(error, known)
            where = _locate(Node(dict(given), node.file, node.line), word.split(".") if word else ())
            self.fail(where, ".".join(w for w in (path, word) if w), message)
            return None

    def value(self, hint: Any, node: Node, default: Any, path: str) -> Any:
        """One field's value."""
        options = options_of(hint)
        if node.value is None and type(None) in options:
            return None
        for option in options:
            bare = typing.get_args(option)[0] if typing.get_origin(option) is Annotated else option
            if isinstance(bare, type) and issubclass(bare, Part):
                return self.part(bare.kind, node, default if isinstance(default, Part) else None, path)
            if isinstance(bare, type) and dataclasses.is_dataclass(bare):
                if not isinstance(node.value, dict):
                    self.fail(node, path, f"expected a mapping, got {shape(node)}")
                    return None
                return self.fields(bare, node.value, node, default, path)
            inner = typing.get_args(bare)
            if typing.get_origin(bare) is tuple and inner and isinstance(inner[0], type) and issubclass(inner[0], Part):
                return self.parts(inner[0].kind, node, default or (), path)
            if typing.get_origin(bare) is tuple and inner and isinstance(node.value, list):
                return self.items(bare, node, path)
            if bare is float and isinstance(node.value, dict):
                return self.varying(hint, node, default, path)
        return self.leaf(hint, node, path)

    def items(self, hint: Any, node: Node, path: str) -> Any:
        """A list of plain values."""
        inner = typing.get_args(hint)
        if inner[-1] is not Ellipsis and len(inner) != len(node.value):
            self.fail(node, path, f"expected {describe(hint)}, got {len(node.value)} values")
            return None
        hints = inner if inner[-1] is not Ellipsis else inner[:1] * len(node.value)
        return tuple(self.value(h, n, None, f"{path}.{i}") for i, (h, n) in enumerate(zip(hints, node.value, strict=True)))

    def varying(self, hint: Any, node: Node, default: Any, path: str) -> Any:
        """A number that is a schedule; its values are tried out."""
        if not self.may_vary(path):
            self.fail(node, path, "a schedule cannot stand here; only the numbers of trainer and data.augment may vary")
            return None
        outer, self.may_vary = self.may_vary, lambda path: False
        schedule = self.part("schedule", node, default if isinstance(default, Schedule) else None, path)
        self.may_vary = outer
        for t in self.times() if schedule is not None else ():
            value = schedule.at(t, self.epochs)
            if not fits(hint, value):
                self.fail(node, path, f"expected {describe(hint)}, but the schedule gives {value:g} at epoch {t:g}")
                return None
        return schedule

    def parts(self, kind: str, node: Node, default: tuple[Part, ...], path: str) -> Any:
        """Several parts: a list replaces them, a mapping changes the ones that it names."""
        by_name = {p.name: p for p in default}
        if isinstance(node.value, dict) and "name" not in node.value:
            changed = {}
            for name, child in node.value.items():
                names = [p.name for p in default]
                if names.count(name) != 1:
                    known = f"; here are: {', '.join(names) or 'none'} (write a list to replace them)"
                    wrong = f"{'more than one' if name in by_name else 'no'} such {kind} to change"
                    self.fail(child, f"{path}.{name}", f"{wrong}{nearest(name, by_name) if name not in by_name else ''}{known}")
                    continue
                changed[name] = self.part(kind, child, by_name[name], f"{path}.{name}")
            return tuple(changed.get(p.name, p) for p in default)
        items = node.value if isinstance(node.value, list) else [node]
        out = []
        for i, item in enumerate(items):
            named = item_name(item)
            start = by_name.get(named) if isinstance(named, str) else None
            out.append(self.part(kind, item, start, f"{path}.{i}"))
        return tuple(out)

    def leaf(self, hint: Any, node: Node, path: str) -> Any:
        raw = numbers(node.plain(), hint)
        if fits(hint, raw):
            return adapter(hint).validate_python(raw)
        choices = [str(c) for option in options_of(hint) for c in choices_of(option)]
        near = nearest(raw, choices) if choices and isinstance(raw, str) else ""
        if any(typing.get_origin(option) is tuple for option in options_of(hint)) and not isinstance(raw, dict | list | None):
            near = f" (write [{node.value}])"
        if isinstance(raw, int | float) and math.isfinite(raw) and abs(raw) > LARGEST:
            near = ", which float32 cannot hold"
        self.fail(node, path, f"expected {describe(hint)}, got {shape(node)}{near}")
        return None


def _blame(error: ValueError, known: typing.Container[str]) -> tuple[str, str]:
    """The field, or path from a field, that a part's own message begins with (or ""), and the rest of the message."""
    message = str(error)
    word = message.split(" ", 1)[0].rstrip(":,")
    return (word, message[len(word) :].lstrip(":, ")) if word.split(".")[0] in known else ("", message)


def _takes_arch(cls: Any) -> bool:
    """Whether the part is named like ``timm:resnet18``."""
    return any(f.name == "arch" for f in dataclasses.fields(cls))


def _class_default(f: Any) -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else None


def _has_default(f: Any) -> bool:
    return f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING


# ------------------------------------------------------------------------------------------------------------- public


def _as_node(value: Any) -> Node:
    if is_part(value):
        value = dump(value)
    if isinstance(value, Mapping):
        return Node({str(k): _as_node(v) for k, v in value.items()}, "", 0)
    if isinstance(value, list | tuple):
        return Node([_as_node(v) for v in value], "", 0)
    return Node(value, "", 0)


def build(kind: str, spec: Any, **fields: Any) -> Any:
    """A part from its name, or from a mapping with ``name`` and fields, or from itself.

    Args:
        kind: such as ``"attack"``.
        spec: ``"pgd"``, ``{"name": "pgd", "steps": 7}``, or a part, which is returned with ``fields`` changed.
        fields: the part's fields, by name.

    Raises:
        UserError: one line for each mistake.
    """
    if is_part(spec) and not fields:
        return spec
    default = spec if is_part(spec) else None
    node = _as_node({}) if default is not None else _as_node({"name": spec} if isinstance(spec, str) else spec)
    if isinstance(node.value, dict):
        node = Node({**node.value, **{k: _as_node(v) for k, v in fields.items()}}, "", 0)
    builder = _Builder(lambda path: kind in _VARYING)
    part = builder.part(kind, node, default, "")
    if builder.errors:
        label = part_label(spec)
        raise UserError(*(e if e.startswith((f"unknown {kind}", f"{label}: ")) else f"{label}: {e}" for e in builder.errors))
    return part


_VARYING = ("trainer", "stage", "attack", "objective", "regularizer", "gradient", "averaging")  # what Trainer.at resolves


def part_label(spec: Any) -> str:
    """What to call a specification in a message."""
    if isinstance(spec, Mapping):
        return str(spec.get("name", "part"))
    return spec if isinstance(spec, str) else str(getattr(spec, "name", "part"))


def dump(value: Any) -> Any:
    """A part (or section) as plain values, such that ``build`` gives it back; a part's mapping starts with its name."""
    if is_part(value):
        head = {"name": value.name} if isinstance(value, Part) else {}
        return head | {f.name: dump(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, tuple | list):
        return [dump(v) for v in value]
    if isinstance(value, Mapping):
        return {k: dump(v) for k, v in value.items()}
    return value


def build_config(node: Node) -> Config:
    """A whole configuration from nodes.

    Raises:
        UserError: one line for each mistake.
    """
    given = dict(node.value)
    for key, name in DEFAULTS.items():
        start = Node({"name": Node(name, node.file, node.line)}, node.file, node.line)
        given[key] = merge(start, given[key]) if key in given else start
    builder = _Builder(lambda path: path.startswith(("trainer.", "data.augment.")), _epochs(given))
    config = builder.fields(Config, given, node, None, "")
    if config is not None:
        _check_together(builder, config, Node(given, node.file, node.line))
    if builder.errors:
        raise UserError(*builder.errors)
    return typing.cast(Config, config)


def _epochs(given: Mapping[str, Node]) -> int:
    training = given["training"].plain() if "training" in given else None
    asked = training.get("epochs") if isinstance(training, dict) else None
    return asked if isinstance(asked, int) and asked > 0 else Training.epochs


def _check_together(builder: _Builder, config: Config, root: Node) -> None:
    """What the parts of a configuration demand of each other."""
    for where, part in [*_parts(config.trainer, ("trainer",)), *_parts(config.data.augment, ("data", "augment"))]:
        if not any(hasattr(part, field) for field in ("norm", "eps")):
            continue
        try:
            for t in builder.times():
                with_threat(resolve_schedules(part, t, builder.epochs), config.threat)
        except ValueError as error:
            word, message = _blame(error, ("norm", "eps"))
            builder.fail(_locate(root, [*where, word]), ".".join(w for w in (*where, word) if w), message)
    try:
        dataclasses.replace(config.trainer, inner=(*config.data.augment, *config.trainer.inner))
    except ValueError as error:
        builder.fail(_locate(root, ["data", "augment"]), "data.augment", f"before the trainer's stages: {error}")
    for i, name in enumerate(config.evaluation.suites):
        if not name.endswith((".yaml", ".yml")):
            try:
                lookup("suite", name)
            except UserError as error:
                where = ("evaluation", "suites", str(i))
                builder.fail(_locate(root, where), ".".join(where), str(error))


def _parts(value: Any, where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All parts of a tree, each with its path."""
    if isinstance(value, tuple):
        names = [getattr(item, "name", "") for item in value]
        for i, item in enumerate(value):
            yield from _parts(item, (*where, names[i] if names.count(names[i]) == 1 else str(i)))
    elif is_part(value):
        yield where, value
        for f in dataclasses.fields(value):
            yield from _parts(getattr(value, f.name), (*where, f.name))


def _locate(node: Node, where: Sequence[str]) -> Node:
    """The value at a path, or the nearest value around it that was written down."""
    for step in where:
        if isinstance(node.value, dict) and step in node.value:
            node = node.value[step]
        elif isinstance(node.value, list) and (i := position(node, step)) is not None:
            node = node.value[i]
        else:
            break
    return node


def load_config(path: str | Path, settings: Sequence[str] = ()) -> Config:
    """Read, merge, override and validate a configuration file.

    Raises:
        UserError: one line for each mistake: file, line, key, what was expected, and the nearest name.
    """
    return build_config(override(read(path), settings))


def config_from(values: Mapping[str, Any]) -> Config:
    """A configuration from plain values, as :func:`dump` makes them (checkpoints and run folders hold these)."""
    return build_config(_as_node(values))


def load_suite(spec: str) -> Suite:
    """A suite by name, as ``{name: cifar-c, severities: [3]}``, or from a YAML file with such fields (attacks, norms, ...).

    Raises:
        UserError: one line for each mistake.
    """
    if spec.lstrip().startswith("{"):
        return build_suite(parse(spec, "--suite"), "suite")
    if not spec.endswith((".yaml", ".yml")):
        try:
            return typing.cast(Suite, build("suite", spec))
        except UserError as error:
            if Path(spec).exists():
                raise UserError(f"{spec}: a suite file must end in .yaml") from None
            raise error
    return build_suite(read(spec), Path(spec).stem)


def build_suite(node: Node, stem: str) -> Suite:
    builder = _Builder(lambda path: False)
    named = node.value.get("name", Node(stem, node.file, node.line))
    if not isinstance(named.value, str):
        builder.fail(named, "name", f"expected the name of a suite, got {shape(named)}")
        raise UserError(*builder.errors)
    cls = None if named.value in entries("suite") else custom_suite(named.value, node.value)
    suite = builder.part("suite", node, None, "", cls)
    if suite is not None and not (suite.attacks or suite.corruptions or getattr(suite, "published", ())):
        builder.fail(node, "", "a suite needs 'attacks' or 'corruptions'")
    for norm in suite.norms if suite is not None else ():
        for i, eps in enumerate(suite.eps):
            try:
                check_radius(norm, eps)
                for attack in suite.attacks:
                    with_threat(attack, Threat(norm, eps))
            except ValueError as error:
                word, message = _blame(error, ("eps",))
                where = ("eps", str(i)) if word else ("norms", str(suite.norms.index(norm)))
                builder.fail(_locate(node, where), ".".join(where), message)
    if builder.errors:
        raise UserError(*builder.errors)
    return typing.cast(Suite, suite)


def custom_suite(name: str, keys: typing.Container[str] = ()) -> type[Suite]:
    """The class of a suite that a file with these keys describes."""
    own = {f.name for f in dataclasses.fields(CorruptionSuite)} - {f.name for f in dataclasses.fields(Suite)}
    base = CorruptionSuite if any(key in keys for key in own) or ("corruptions" in keys and "attacks" not in keys) else Suite
    return dataclass(frozen=True, kw_only=True)(
        type("CustomSuite", (base,), {"name": name, "__doc__": f"The suite '{name}', from a file."})
    )


def is_suite(node: Node) -> bool:
    """Whether a file describes a suite rather than a training run."""
    if not isinstance(node.value, dict) or "trainer" in node.value:
        return False
    named = node.value.get("name")
    own = any(key in node.value for key in ("attacks", "corruptions", "published"))
    return own or (named is not None and named.value in entries("suite"))


def validate_file(path: str | Path) -> None:
    """Check one YAML file, a configuration or a suite.

    Raises:
        UserError: one line for each mistake.
    """
    node = read(path)
    if is_suite(node):
        build_suite(node, Path(path).stem)
    else:
        build_config(node)


def to_yaml(value: Any) -> str:
    """Plain values, or a part, as YAML that :func:`read` understands."""
    return yaml.dump(dump(value), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


# --------------------------------------------------------------------------------------------------------- the schema


def json_schema() -> dict[str, Any]:
    """JSON Schema of a configuration file, for editors (the YAML language server completes and checks by it)."""
    definitions: dict[str, Any] = {}

    def of(hint: Any) -> dict[str, Any]:
        options = options_of(hint)
        if len(options) > 1:
            return {"anyOf": [of(o) for o in options]}
        bare = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
        if isinstance(bare, type) and issubclass(bare, Part):
            return parts_of(bare.kind)
        if isinstance(bare, type) and dataclasses.is_dataclass(bare):
            return section(bare)
        args = typing.get_args(bare)
        if typing.get_origin(bare) is tuple and args and isinstance(args[0], type) and issubclass(args[0], Part):
            return {"anyOf": [{"type": "array", "items": of(args[0])}, of(args[0])]}
        plain = adapter(hint).json_schema()
        if bare is float:
            fraction = {"type": "string", "pattern": FRACTION.pattern}
            return {"anyOf": [plain, fraction, {"allOf": [{"type": "object"}, parts_of("schedule")]}]}
        return plain

    def parts_of(kind: str) -> dict[str, Any]:
        if kind not in definitions:
            definitions[kind] = {}
            known = entries(kind)
            words = [{"enum": list(known)}, *({"type": "string", "pattern": f"^{n}:"} for n, c in known.items() if _takes_arch(c))]
            named = [section(cls, name) for name, cls in known.items()]
            loose = {"type": "object", "not": {"required": ["name"]}}
            definitions[kind] = {"anyOf": [*words, *named, loose]}
        return {"$ref": f"#/$defs/{kind}"}

    def section(cls: Any, name: str | None = None) -> dict[str, Any]:
        hints = type_hints(cls)
        properties = {f.name: of(hints[f.name]) for f in dataclasses.fields(cls) if f.init}
        if name is not None:
            properties["name"] = {"type": "string", "pattern": f"^{name}(:|$)"} if _takes_arch(cls) else {"const": name}
        out = {"type": "object", "properties": properties, "additionalProperties": False}
        return out | ({"required": ["name"]} if name is not None else {})

    root = section(Config)
    root["properties"]["extends"] = {"type": "string"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "robustlab configuration",
        **root,
        "$defs": definitions,
    }
