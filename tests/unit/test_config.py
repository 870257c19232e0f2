"""Configuration: reading, merging, overriding, building, dumping, the schema, and the words of every message."""

import dataclasses
import json
import math
import re
import typing
from pathlib import Path
from typing import Annotated, Literal

import annotated_types
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustlab.attacks.pgd import PGD
from robustlab.config import (
    Config,
    Training,
    build,
    build_config,
    config_from,
    dump,
    is_suite,
    json_schema,
    load_config,
    load_suite,
    to_yaml,
    validate_file,
)
from robustlab.hints import FRACTION, describe, type_hints
from robustlab.nodes import merge, override, parse, read
from robustlab.registry import FOLDERS, entries
from robustlab.trainers.pgd_at import PgdAt
from robustlab.types import Part, Schedule, Threat, UserError, is_part

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD = "trainer: pgd-at\nmodel: small_cnn\ndata: digits\n"
EVERY_PART = [(kind, name) for kind in FOLDERS for name in entries(kind)]


def config(text: str, *sets: str) -> Config:
    return build_config(override(parse(text, "c.yaml"), sets))


def errors(text: str, *sets: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        config(text, *sets)
    return list(caught.value.lines)


# ------------------------------------------------------------------------------------------------------------ scalars


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("null", None),
        ("~", None),
        ("", None),
        ("12", 12),
        ("-12", -12),
        ("+3", 3),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("0b11", "0b11"),
        ("2026-11-20", "2026-11-20"),
        ("1e-3", 0.001),
        ("1.5E+2", 150.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.inf", -math.inf),
        ("8/255", "8/255"),
        ("'12'", "12"),
        ('"true"', "true"),
        ("<<", "<<"),
        ("=", "="),
        ("!!float 3", 3.0),
        ("!!str 3", "3"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    got = parse(f"a: {text}", "f").value["a"].value
    assert (type(got), got) == (type(value), value)


def test_not_a_number_is_read_as_such():
    assert math.isnan(parse("a: .nan", "f").value["a"].value)


def test_a_key_may_be_any_word():
    assert parse("on: 1\ntrue: 2\n3: 4\nnull: 5\n<<: 6", "f").plain() == {"on": 1, "true": 2, "3": 4, "null": 5, "<<": 6}


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("0.5/255", 0.5 / 255), ("0/1", 0.0), ("0x1", 1.0), ("1e-1", 0.1)],
)
def test_numbers_in_number_fields(text, value):
    assert config(f"{GOOD}threat: {{eps: '{text}'}}" if "/" in text else f"{GOOD}threat: {{eps: {text}}}").threat.eps == value


def test_nodes_remember_file_and_line():
    node = parse("a: 1\nb:\n  c: [2,\n    3]\n", "f.yaml")
    inner = node.value["b"].value["c"]
    assert (node.value["b"].line, inner.line, [n.line for n in inner.value]) == (2, 3, [3, 4])
    assert inner.value[0].file == "f.yaml"


# ------------------------------------------------------------------------------------------------------------ extends


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "c.yaml"


def test_extends_is_relative_to_the_file_and_chains(tmp_path, monkeypatch):
    path = write(
        tmp_path,
        c="extends: sub/b.yaml\nseed: 3\n",
        sub__b="extends: ../a.yaml\nseed: 2\ntraining: {epochs: 2}\n",
        a=GOOD + "seed: 1\ntraining: {epochs: 1, batch_size: 7}\n",
    )
    monkeypatch.chdir("/")
    got = load_config(path)
    assert (got.seed, got.training.epochs, got.training.batch_size, got.trainer) == (3, 2, 7, PgdAt())


def test_lines_point_into_the_file_that_has_the_mistake(tmp_path):
    path = write(tmp_path, c="extends: b.yaml\n\nsede: 1\n", b=GOOD + "training:\n  epochs: x\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert list(caught.value.lines) == [
        f"{tmp_path}/b.yaml:5: training.epochs: expected a whole number >= 1, got 'x'",
        f"{tmp_path}/c.yaml:3: sede: unknown key (did you mean 'seed'?)",
    ]


def merged(base: str, over: str) -> object:
    return merge(parse(base, "base"), parse(over, "over")).plain()


@pytest.mark.parametrize(
    ("base", "over", "result"),
    [
        ("a: 1\nb: 2", "b: 3\nc: 4", {"a": 1, "b": 3, "c": 4}),
        ("a: {b: {c: 1, d: 2}}", "a: {b: {c: 3}}", {"a": {"b": {"c": 3, "d": 2}}}),
        ("o: {name: sgd, lr: 1, nesterov: true}", "o: {name: adamw, lr: 2}", {"o": {"name": "adamw", "lr": 2}}),
        ("o: {name: sgd, lr: 1}", "o: {name: sgd, momentum: 2}", {"o": {"name": "sgd", "lr": 1, "momentum": 2}}),
        ("o: {name: sgd, lr: 1}", "o: {momentum: 2}", {"o": {"name": "sgd", "lr": 1, "momentum": 2}}),
        ("o: {lr: 1}", "o: {name: sgd}", {"o": {"name": "sgd"}}),
        ("o: sgd", "o: {momentum: 2}", {"o": {"name": "sgd", "momentum": 2}}),
        ("o: {name: sgd, lr: 1}", "o: adamw", {"o": "adamw"}),
        ("l: [1, 2]", "l: [3]", {"l": [3]}),
        ("l: [a, {name: b, x: 1}]", "l: {b: {y: 2}}", {"l": ["a", {"name": "b", "x": 1, "y": 2}]}),
        ("l: [a, b]", "l: {0: {y: 2}}", {"l": [{"name": "a", "y": 2}, "b"]}),
        ("l: [a, b]", "l: {name: c}", {"l": {"name": "c"}}),
        ("l: [1, 2]", "l: {}", {"l": {}}),
        ("a: {b: 1}", "a: null", {"a": None}),
        ("a: null", "a: {b: 1}", {"a": {"b": 1}}),
    ],
)
def test_merge(base, over, result):
    assert merged(base, over) == result


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("l: {c: {y: 2}}", "over:1: c: no such item; this list has: a, b, b"),
        ("l: {b: {y: 2}}", "over:1: b: this list has 'b' more than once; name the position, from 0"),
        ("l: {3: {y: 2}}", "over:1: 3: no such item; this list has: a, b, b"),
    ],
)
def test_merge_into_a_list_names_what_is_wrong(over, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        merged("l: [a, b, {name: b}]", over)


# -------------------------------------------------------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("text", "sets", "result"),
    [
        ("a: 1", ["a=2"], {"a": 2}),
        ("a: 1", ["b.c=[1, x]"], {"a": 1, "b": {"c": [1, "x"]}}),
        ("a: {b: 1}", ["a.b=null", "a.c=true"], {"a": {"b": None, "c": True}}),
        ("t: pgd-at", ["t.attack_bn=eval"], {"t": {"name": "pgd-at", "attack_bn": "eval"}}),
        ("t: pgd-at", ["t.name=trades"], {"t": {"name": "trades"}}),
        ("t: {name: pgd-at, attack_bn: eval}", ["t=trades"], {"t": "trades"}),
        (
            "t: {inner: [{name: a}, b]}",
            ["t.inner.0.x=1", "t.inner.1.y=2"],
            {"t": {"inner": [{"name": "a", "x": 1}, {"name": "b", "y": 2}]}},
        ),
        ("t: {inner: [{name: a}, b]}", ["t.inner.b.y=2"], {"t": {"inner": [{"name": "a"}, {"name": "b", "y": 2}]}}),
        ("t: {inner: {a: {x: 1}}}", ["t.inner.a.y=2"], {"t": {"inner": {"a": {"x": 1, "y": 2}}}}),
        ("t: ~", ["t.a.b=on"], {"t": {"a": {"b": "on"}}}),
        ("a: 1", ["a=x=y"], {"a": "x=y"}),
        ("a: 1", ["a="], {"a": None}),
        ("a: 1", ["a= 3 "], {"a": 3}),
    ],
)
def test_override(text, sets, result):
    assert override(parse(text, "f"), sets).plain() == result


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.epochs", "--set training.epochs: expected key.key=value, for example training.epochs=20"),
        ("=3", "--set =3: expected key.key=value, for example training.epochs=20"),
        ("a..b=3", "--set a..b=3: expected key.key=value, for example training.epochs=20"),
        ("seed.x=3", "--set seed.x=3: 'x' lies inside 0, which has no keys"),
        ("list.2=3", "--set list.2=3: 2: no such item; this list has: craft, label-smoothing"),
        ("list.\u00b2=3", "--set list.\u00b2=3: \u00b2: no such item; this list has: craft, label-smoothing"),
        (
            "list.kraft.x=3",
            "--set list.kraft.x=3: kraft: no such item (did you mean 'craft'?); this list has: craft, label-smoothing",
        ),
        ("a=[1", "--set a=[1:1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "a=!!python/name:os.system",
            "--set a=!!python/name:os.system:1: the tag '!!python/name:os.system' is not allowed; a configuration "
            "holds plain values only",
        ),
    ],
)
def test_override_errors(setting, message):
    with pytest.raises(UserError) as caught:
        override(parse("seed: 0\nlist: [craft, {name: label-smoothing}]", "f"), [setting])
    assert list(caught.value.lines) == [message]


def test_a_mistake_in_a_setting_is_reported_at_the_setting():
    assert errors(GOOD, "training.epoch=3") == ["--set training.epoch=3: training.epoch: unknown key (did you mean 'epochs'?)"]
    assert errors(GOOD, "threat.eps=8") == [
        "--set threat.eps=8: threat.eps: is in [0, 1] pixel units: for linf 8 is more than the whole range; did you mean 8/255?"
    ]


# ------------------------------------------------------------------------------------------------------- parts in parts


def attack_of(c: Config) -> PGD:
    (craft,) = [s for s in c.trainer.inner if s.name == "craft"]
    return craft.attack


def test_a_part_inside_a_trainer_is_changed_by_its_name():
    c = config("trainer: {name: trades, inner: {craft: {attack: {steps: 7}}}}\nmodel: small_cnn\ndata: digits\n")
    default = build("trainer", "trades").inner[0]
    assert attack_of(c) == dataclasses.replace(default.attack, steps=7)
    assert dataclasses.replace(c.trainer.inner[0], attack=default.attack) == default
    assert attack_of(config(GOOD, "trainer=trades", "trainer.inner.craft.attack.steps=7")) == attack_of(c)


def test_list_items_start_from_the_trainers_own_stage_of_that_name():
    text = GOOD.replace("pgd-at", "{name: trades, inner: [mixup, {name: craft, attack: {steps: 3}}, label-smoothing]}")
    c = config(text)
    assert [s.name for s in c.trainer.inner] == ["mixup", "craft", "label-smoothing"]
    assert (attack_of(c).steps, attack_of(c).loss, attack_of(c).start, c.trainer.inner[1].toward) == (3, "kl", "normal", "clean")


def test_a_part_with_another_name_starts_from_its_own_defaults():
    c = config("trainer: {name: trades, inner: {craft: {attack: {name: fgsm}}}}\nmodel: small_cnn\ndata: digits\n")
    assert attack_of(c) == build("attack", "fgsm")


def test_patching_a_list_of_a_base_file_keeps_the_list(tmp_path):
    path = write(
        tmp_path,
        c="extends: b.yaml\ntrainer: {inner: {craft: {attack: {steps: 3}}}}\n",
        b="trainer: {name: pgd-at, inner: [mixup, craft]}\nmodel: small_cnn\ndata: digits\n",
    )
    c = load_config(path)
    assert ([s.name for s in c.trainer.inner], attack_of(c).steps, attack_of(c).rel_step) == (["mixup", "craft"], 3, 0.25)


def test_one_part_may_stand_for_a_list_of_one():
    c = config("trainer: {name: standard, inner: label-smoothing}\nmodel: small_cnn\ndata: digits\n")
    assert [s.name for s in c.trainer.inner] == ["label-smoothing"]


def test_defaults_of_a_run():
    c = config(GOOD)
    assert (c.optimizer.name, c.schedule.name, c.threat, c.training) == ("sgd", "cosine", Threat(), Training())
    assert config(GOOD + "optimizer: {momentum: 0.5}").optimizer == build("optimizer", "sgd", momentum=0.5)
    assert config(GOOD + "optimizer: {name: adamw}").optimizer == build("optimizer", "adamw")


# ---------------------------------------------------------------------------------------------------------- schedules


def test_a_number_may_be_a_schedule():
    text = """\
trainer:
  name: awp
  inner: {craft: {attack: {eps: {name: linear, start: 0, end: 8/255, epochs: 4}}}}
  gradient: {gamma: {name: piecewise, milestones: [0.5], values: [0, 0.01]}}
model: small_cnn
data: digits
training: {epochs: 10}
"""
    c = config(text)
    assert isinstance(attack_of(c).eps, Schedule)
    for epoch, eps, gamma in [(0, 0, 0), (2, 4 / 255, 0), (4, 8 / 255, 0), (5, 8 / 255, 0.01), (9.5, 8 / 255, 0.01)]:
        now = c.trainer.at(epoch, 10)
        assert now.inner[0].attack.eps == pytest.approx(eps, rel=1e-12)
        assert now.gradient.gamma == gamma
    assert c.trainer.at(3, 10).objective is c.trainer.objective  # what does not vary is not copied
    assert config_from(dump(c)) == c


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "trainer: {name: awp, gradient: {gamma: {name: linear, start: 0.01, end: -0.01}}}\nmodel: small_cnn\ndata: digits\n",
            "c.yaml:1: trainer.gradient.gamma: expected a number >= 0, but the schedule gives -0.000625 at epoch 5.3125",
        ),
        (
            GOOD + "optimizer: {lr: {name: linear}}\n",
            "c.yaml:4: optimizer.lr: a schedule cannot stand here; only the numbers of trainer and data.augment may vary",
        ),
        (
            GOOD + "threat: {eps: {name: linear}}\n",
            "c.yaml:4: threat.eps: a schedule cannot stand here; only the numbers of trainer and data.augment may vary",
        ),
        (
            "trainer: {name: awp, gradient: {gamma: {name: linear, end: {name: cosine}}}}\nmodel: small_cnn\ndata: digits\n",
            "c.yaml:1: trainer.gradient.gamma.end: a schedule cannot stand here; only the numbers of trainer and "
            "data.augment may vary",
        ),
        (
            "trainer: {name: awp, gradient: {gamma: {start: 0}}}\nmodel: small_cnn\ndata: digits\n",
            "c.yaml:1: trainer.gradient.gamma: 'name' is missing; known: " + ", ".join(entries("schedule")),
        ),
    ],
)
def test_schedules_are_refused_where_nothing_resolves_them_or_out_of_range(text, message):
    assert errors(text) == [message]


# ------------------------------------------------------------------------------------------------- dump and build again


def made(kind: str, name: str) -> Part:
    cls = entries(kind)[name]
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    known = {"arch": "resnet18", "attack": "pgd", "corruption": "contrast"}
    values = {n: known.get(n, "x") for n in needed}
    return build(kind, name, **{n: values[n] for n in needed})


@pytest.mark.parametrize(("kind", "name"), EVERY_PART)
def test_every_part_comes_back_from_its_dump(kind, name):
    part = made(kind, name)
    plain = dump(part)
    assert plain["name"] == name
    assert build(kind, json.loads(json.dumps(plain))) == part
    assert build(kind, parse(to_yaml(part), "f").plain()) == part


def strategy(hint) -> st.SearchStrategy:
    """Valid values of an annotation, as a configuration would write them."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        low = max([m.ge for m in args[1:] if isinstance(m, annotated_types.Ge)], default=None)
        above = max([m.gt for m in args[1:] if isinstance(m, annotated_types.Gt)], default=None)
        high = min([m.le for m in args[1:] if isinstance(m, annotated_types.Le)], default=None)
        below = min([m.lt for m in args[1:] if isinstance(m, annotated_types.Lt)], default=None)
        if args[0] is int:
            return st.integers(low if low is not None else -(2**62), high if high is not None else 2**62)
        bottom, top = low if low is not None else above, next(v for v in (high, below, 1e38) if v is not None)
        return st.floats(
            bottom, top, exclude_min=above is not None, exclude_max=below is not None, allow_nan=False, allow_infinity=False
        )
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return st.lists(strategy(args[0]), max_size=3)
        return st.tuples(*map(strategy, args)).map(list)
    if origin is dict:
        return st.dictionaries(st.sampled_from(["steps", "alpha", "x"]), st.integers(1, 9), max_size=2)
    if args:  # a union
        return st.one_of(*map(strategy, args))
    if isinstance(hint, type) and issubclass(hint, Part):
        return st.sampled_from([n for n, c in entries(hint.kind).items() if not required_fields(c)])
    if dataclasses.is_dataclass(hint):
        needed = set(required_fields(hint))
        some = {name: strategy(h) for name, h in typing.get_type_hints(hint, include_extras=True).items()}
        must = {name: some.pop(name) for name in needed}
        return st.fixed_dictionaries(must, optional=some)
    plain = {
        bool: st.booleans(),
        int: st.integers(-(2**62), 2**62),
        float: st.floats(-1e38, 1e38),
        str: st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
        type(None): st.none(),
    }
    return plain[hint]


def required_fields(cls) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]


@pytest.mark.parametrize(("kind", "name"), EVERY_PART)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_valid_values_come_back(kind, name, data):
    hints = type_hints(entries(kind)[name])
    fields = {f.name: hints[f.name] for f in dataclasses.fields(entries(kind)[name]) if f.init}
    chosen = {
        f: data.draw(strategy(h), label=f)
        for f, h in fields.items()
        if f in required_fields(entries(kind)[name]) or data.draw(st.booleans())
    }
    try:
        part = build(kind, name, **chosen)
    except UserError as error:  # a demand of the part that its annotations cannot say, such as a view that nothing makes
        if any(": expected " in line and "one more than" not in line for line in error.lines):
            raise
        return
    assert build(kind, dump(part)) == part
    assert build(kind, parse(to_yaml(part), "f").plain()) == part
    for field, value in chosen.items():
        if (
            isinstance(value, bool | int | str)
            and not is_part(getattr(part, field))
            and not isinstance(getattr(part, field), tuple)
        ):
            assert getattr(part, field) == value


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_the_configurations_in_the_repository(path):
    validate_file(path)
    if "trainer" in read(path).value:
        c = load_config(path)
        assert config_from(json.loads(json.dumps(dump(c)))) == c
        assert build_config(parse(to_yaml(c), "f")) == c


def test_yaml_is_written_without_needless_quotes():
    text = to_yaml({"on": "clean", "a": "1e-3", "b": "true", "c": None, "d": (0.1, 1), "e": "8/255"})
    assert text == "on: clean\na: '1e-3'\nb: 'true'\nc: null\nd:\n- 0.1\n- 1\ne: 8/255\n"
    twice = {"x": 1}
    assert to_yaml([twice, twice]) == "- x: 1\n- x: 1\n"


# ------------------------------------------------------------------------------------------------------- build, suites


@pytest.mark.parametrize(
    ("kind", "spec", "fields", "message"),
    [
        ("attack", "pdg", {}, "unknown attack 'pdg' (did you mean 'pgd'?); known: "),
        ("attack", "trades", {}, "unknown attack 'trades'; 'trades' is an objective and a trainer; known: "),
        ("attack", "pgd", {"eps": -1}, "pgd: eps: expected a number >= 0 or null, got -1"),
        (
            "attack",
            "pgd",
            {"norm": "linf", "eps": 8},
            "pgd: eps: is in [0, 1] pixel units: for linf 8 is more than the whole range; did you mean 8/255?",
        ),
        ("attack", "pgd", {"norm": "l0"}, "pgd: norm 'l0' is not supported; expected one of linf, l2, l1"),
        ("attack", "pgd", {"step_size": 1}, "pgd: step_size: unknown key (did you mean 'steps'?)"),
        ("attack", "pgd", {"steps": 0}, "pgd: steps: expected a whole number >= 1, got 0"),
        ("attack", "pgd", {"steps": True}, "pgd: steps: expected a whole number >= 1, got true"),
        ("attack", "pgd", {"targeted": 1}, "pgd: targeted: expected true or false, got 1"),
        ("attack", "pgd", {"loss": "CE"}, "pgd: loss: expected one of ce, kl, dlr, margin, got 'CE' (did you mean 'ce'?)"),
        ("objective", "cross-entropy", {"on": "adv"}, "cross-entropy: on: expected a list of words, got 'adv' (write [adv])"),
        ("objective", "cross-entropy", {"on": []}, "cross-entropy: on: name at least one view"),
        ("schedule", "piecewise", {"milestones": [0.7, 0.5]}, "piecewise: milestones: must rise"),
        ("stage", "craft", {}, "craft: attack: missing; expected an attack"),
        ("suite", "pgd-20", {"severities": [0]}, "pgd-20: severities.0: expected a whole number >= 1 and <= 5, got 0"),
    ],
)
def test_messages_of_build(kind, spec, fields, message):
    with pytest.raises(UserError) as caught:
        build(kind, spec, **fields)
    (line,) = caught.value.lines
    assert line == message or (message.endswith("known: ") and line == message + ", ".join(entries(kind)))


def test_build_changes_fields_of_a_part():
    assert build("attack", PGD(steps=3), restarts=2) == PGD(steps=3, restarts=2)
    part = PGD(steps=3)
    assert build("attack", part) is part


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file():
    text = (
        "seed: -1\ntrainer: {name: pgd-at, attack_bn: off}\nmodel: {name: small_cnn, widht: 3}\ndata: digits\nthreat: {eps: nine}\n"
    )
    assert errors(text, "training.epochs=no") == [
        "c.yaml:1: seed: expected a whole number >= 0, got -1",
        "c.yaml:2: trainer.attack_bn: expected one of eval, train-noupdate, train-update, got 'off'",
        "c.yaml:3: model.widht: unknown key (did you mean 'width'?)",
        "c.yaml:5: threat.eps: expected a number, got 'nine'",
        "--set training.epochs=no: training.epochs: expected a whole number >= 1, got 'no'",
    ]


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (Annotated[float, annotated_types.Ge(0), annotated_types.Lt(1)], "a number >= 0 and < 1"),
        (float | None, "a number or null"),
        (Literal["a", "b"], "one of a, b"),
        (Literal["a"], "'a'"),
        (tuple[str, ...], "a list of words"),
        (tuple[tuple[str, ...], ...], "a list of lists of words"),
        (tuple[Annotated[int, annotated_types.Ge(1)], ...], "a list of whole numbers >= 1"),
        (tuple[float, float], "a list of 2: a number, a number"),
        (tuple[Part, ...], "a list of s"),
        (PGD, "an attack"),
        (Threat, "a mapping"),
    ],
)
def test_types_in_words(hint, words):
    assert describe(hint) == words


def test_a_suite_from_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("attacks: [{name: pgd, steps: 3}, fgsm]\nnorms: [linf]\neps: [4/255, 8/255]\nnum_examples: 10\n")
    suite = load_suite(str(path))
    assert (suite.name, suite.norms, suite.eps, [a.name for a in suite.attacks]) == (
        "mine",
        ("linf",),
        (4 / 255, 8 / 255),
        ["pgd", "fgsm"],
    )
    with pytest.raises(UserError, match=r"unknown suite 'pgd-2' \(did you mean 'pgd-20'\?\)"):
        load_suite("pgd-2")
    other = tmp_path / "mine.txt"
    other.write_text("attacks: [pgd]\n")
    with pytest.raises(UserError, match=r"mine.txt: a suite file must end in .yaml$"):
        load_suite(str(other))


# ------------------------------------------------------------------------------------------------------------- schema


@pytest.fixture(scope="module")
def checker():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schema_is_json_and_names_every_part():
    schema = json.loads(json.dumps(json_schema()))
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {f.name for f in dataclasses.fields(Config)} | {"extends"}
    for kind in schema["$defs"]:
        named = [s["properties"]["name"] for s in schema["$defs"][kind]["anyOf"] if "name" in s.get("properties", {})]
        assert len(named) == len(entries(kind))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_the_schema_accepts_the_configurations_in_the_repository(path, checker):
    text = parse(path.read_text(), str(path)).plain()
    if not is_suite(parse(path.read_text(), str(path))):  # the schema is that of runs
        assert [e.message for e in checker.iter_errors(text)] == []
        assert [e.message for e in checker.iter_errors(json.loads(json.dumps(dump(load_config(path)))))] == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"sede": 1}, []),
        ({"training": {"epoch": 3}}, ["training"]),
        ({"training": {"epochs": 0}}, ["training", "epochs"]),
        ({"training": {"probe": {"step": 3}}}, ["training", "probe"]),
        ({"model": {"name": "small_cnn", "widht": 3}}, ["model"]),
        ({"model": {"name": "tiny"}}, ["model"]),
        ({"model": "tiny"}, ["model"]),
        ({"model": "small_cnn:wide"}, ["model"]),
        ({"trainer": {"name": "pgd-at", "inner": [{"name": "craft", "attack": {"name": "pgd", "stepz": 3}}]}}, ["trainer"]),
        ({"optimizer": {"name": "sgd", "lr": "fast"}}, ["optimizer"]),
        ({"logging": ["json"]}, ["logging"]),
        ({"seed": "x"}, ["seed"]),
    ],
)
def test_the_schema_rejects(change, where, checker):
    good = {"trainer": "pgd-at", "model": "small_cnn", "data": "digits", "threat": {"eps": "8/255"}}
    assert checker.is_valid(good)
    (error, *_) = list(checker.iter_errors(good | change))
    assert list(error.absolute_path)[: len(where)] == where


def test_the_schemas_fraction_is_the_readers():
    assert FRACTION.match("8/255")
    assert not FRACTION.match("8/-255")
