"""Names: discovery, duplicates, docstrings, nearest words, plug-ins."""

import dataclasses
import importlib.metadata

import pytest

from robustlab import registry
from robustlab.registry import entries, kind_of, lookup, nearest, plural, register, summary
from robustlab.types import Part, Regularizer, Schedule, UserError


@pytest.fixture
def scratch(monkeypatch):
    """Registrations of a test vanish after it."""
    monkeypatch.setattr(registry, "_entries", {kind: dict(known) for kind, known in registry._entries.items()})
    monkeypatch.setattr(registry, "_loaded", set(registry._loaded))


def test_every_kind_is_discovered_and_sorted():
    for kind in registry.FOLDERS:
        known = entries(kind)
        assert list(known) == sorted(known)
        for name, cls in known.items():
            assert cls.kind == kind
            assert cls.name == name
            assert summary(cls)
            assert lookup(kind, name) is cls
    assert {"gaussian_noise", "impulse_noise", "defocus_blur", "brightness", "contrast"} <= set(entries("corruption"))
    assert {"mixup", "label-smoothing"} <= set(entries("stage"))
    assert "ema" in entries("averaging")


def test_a_registered_class_is_a_frozen_keyword_only_dataclass(scratch):
    @register("half", cite="arXiv:0000.00000")
    class Half(Schedule):
        """Half.

        And more.
        """

        start: float = 1.0

    part = Half(start=2.0)
    assert (Half.name, Half.cite, summary(Half)) == ("half", "arXiv:0000.00000", "Half.")
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.start = 3.0
    with pytest.raises(TypeError):
        Half(2.0)
    assert entries("schedule")["half"] is Half


def test_a_part_needs_a_docstring_of_its_own(scratch):
    with pytest.raises(ValueError, match=r"needs a docstring.*explain bare"):

        @register("bare")
        class Bare(Schedule):
            start: float = 1.0

    with pytest.raises(ValueError, match="needs a docstring"):

        @register("child")
        class Child(lookup("corruption", "contrast")):
            pass


def test_a_name_belongs_to_one_class(scratch):
    def make(qualname):
        cls = type("Twice", (Schedule,), {"__doc__": "Something.", "__module__": "somewhere", "__qualname__": qualname})
        return register("twice")(cls)

    make("Twice")
    make("Twice")  # the same module, imported again
    with pytest.raises(ValueError, match="the schedule 'twice' is already registered by somewhere"):
        make("Other")

    @register("twice")
    class OfAnotherKind(Regularizer):
        """Names are unique within a kind only."""


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(
        UserError, match=r"^unknown corruption 'contrst' \(did you mean 'contrast'\?\); known: .*brightness, .*contrast"
    ):
        lookup("corruption", "contrst")
    with pytest.raises(UserError, match=r"did you mean 'contrast'"):
        lookup("corruption", "CONTRAST")
    with pytest.raises(UserError, match=r"^unknown corruption 'zzzz'; known"):
        lookup("corruption", "zzzz")


def test_nearest():
    assert nearest("pdg", ["pgd", "fgsm"]) == " (did you mean 'pgd'?)"
    assert nearest("PGD", ["pgd", "fgsm"]) == " (did you mean 'pgd'?)"
    assert nearest("autoAtack", ["AutoAttack"]) == " (did you mean 'AutoAttack'?)"
    assert nearest("qqqq", ["pgd"]) == ""
    assert nearest(12, [11, 13, 123]) == " (did you mean '123'?)"
    assert nearest("x", []) == ""


def test_kinds_by_singular_and_plural():
    for kind in registry.FOLDERS:
        assert kind_of(kind) == kind
        assert kind_of(plural(kind)) == kind
    with pytest.raises(UserError, match=r"unknown kind 'atacks' \(did you mean 'attacks'\?\); expected one of attacks, "):
        kind_of("atacks")


class Point:
    """An entry point of another package."""

    name, value = "mine", "my_package.parts"

    def __init__(self, load):
        self.load = load


def points(monkeypatch, *loads):
    found = [Point(load) for load in loads]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found if group == "robustlab.parts" else [])
    registry._loaded.discard("schedule")


def test_other_packages_register_through_entry_points(scratch, monkeypatch):
    def load():
        @register("plugged")
        class Plugged(Schedule):
            """From elsewhere."""

    points(monkeypatch, load)
    assert "plugged" in entries("schedule")


def test_a_broken_plug_in_is_named_every_time_it_is_met(scratch, monkeypatch):
    def load():
        raise ImportError("no module named 'lost'")

    points(monkeypatch, load)
    for _ in range(2):  # a failed load is not remembered as a complete one
        with pytest.raises(UserError, match=r"plug-in 'mine' \(my_package.parts\) cannot be loaded: no module named 'lost'"):
            entries("schedule")


def test_the_base_of_all_parts_has_no_name():
    assert Part.name == ""
