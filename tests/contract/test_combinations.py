"""Any parts together: 60 random pairs and triples train for two steps with a finite loss, or are refused for a reason that the
README gives. The seed is fixed; a second draw takes its seed from ``ROBUSTLAB_DRAW`` or the number of the run of the CI.
"""

import dataclasses
import os
import random
import re
from pathlib import Path

import pytest
import torch
from small import Threat, net, steps

from robustlab import config
from robustlab.registry import entries
from robustlab.types import rebuild, with_threat

DRAWS, MOST_REFUSED = 60, 10
CAPS = {"steps": 2, "binary_steps": 2, "restarts": 1, "n": 2, "queries": 30, "init_trials": 10}
OUTSIDE = {"call", "torchattacks", "autoattack-reference", "patch", "sigma-zero"}  # code of others; l0, which no trainer has
README = (Path(__file__).parents[2] / "README.md").read_text()


def reasons():
    """The pieces of messages that the README lists, one for each row of its table."""
    section = README.split("## Combinations that we refuse")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def crafting():
    """The stages that stand in the place of an attack."""
    return [n for n, c in entries("stage").items() if c.crafts and n != "craft"]


def choices():
    """What may be drawn on each axis: (name, where it stands)."""
    # before the attack is the usual place, and drawn twice as often
    mixers = {n: ("after",) if c.taps else ("before", "before", "after") for n, c in entries("stage").items() if c.mixes}
    return {
        "objective": list(entries("objective")),
        "gradient": [n for n in entries("gradient") if n != "plain"],
        "averaging": list(entries("averaging")),
        "regularizer": list(entries("regularizer")),
        "attack": [*(n for n in entries("attack") if n not in OUTSIDE), *crafting()],
        "mixer": [(n, where) for n, places in mixers.items() for where in places],
        "labels": ["label-smoothing", "cutout", "flip-crop"],
    }


def drawn(seed):
    """Pairs and triples of parts of different kinds."""
    draw, axes, found = random.Random(seed), choices(), []
    while len(found) < DRAWS:
        kinds = draw.sample(sorted(axes), draw.choice((2, 3)))
        found.append({kind: draw.choice(axes[kind]) for kind in kinds})
    return found


def build(parts):
    """The trainer with these parts in place of those of PGD training, and the threat model that the attack knows."""
    inner, norm = [{"name": "craft", "attack": "pgd"}], "linf"
    if attack := parts.get("attack"):
        if attack in crafting():
            inner = [{"name": attack, **({"sites": ["stem"]} if attack == "slat" else {})}]
        else:
            inner, norm = [{"name": "craft", "attack": attack}], entries("attack")[attack].norms[0]
    if "mixer" in parts:
        name, where = parts["mixer"]
        view = "clean" if where == "before" else "adv"
        stage = {"name": name, "on": view, "to": view}
        inner = [stage, *inner] if where == "before" else [*inner, stage]
    if "labels" in parts:
        inner = [parts["labels"], *inner]
    fields = {k: parts[k] for k in ("objective", "gradient", "averaging") if k in parts}
    if fields.get("objective") == "cross-entropy":
        fields["objective"] = {"name": "cross-entropy", "on": ["clean", "adv"]}
    if "regularizer" in parts:
        fields["regularizers"] = [parts["regularizer"]]
    method = config.build("trainer", "pgd-at", inner=inner, bn_updates=["adv"], **fields)
    method = rebuild(method, lambda field, v: min(v, CAPS[field]) if field in CAPS and isinstance(v, int) else v)
    return with_threat(method, Threat(norm, 0.1 if norm == "linf" else 1.0))


def outcome(parts):
    """``trained``, or the message with which the combination was refused."""
    try:
        _, terms = steps(net(), build(parts), count=2, n=6)
    except ValueError as refusal:  # UserError is one
        return str(refusal)
    assert torch.isfinite(terms["loss"]), parts
    return "trained"


@pytest.mark.parametrize("seed", sorted({0, int(os.environ.get("ROBUSTLAB_DRAW") or os.environ.get("GITHUB_RUN_NUMBER") or 1)}))
def test_random_combinations_train_or_are_refused_for_a_listed_reason(seed):
    known, refused = reasons(), {}
    for i, parts in enumerate(drawn(seed)):
        said = outcome(parts)
        if said != "trained":
            assert any(reason in said for reason in known), f"draw {i}, {parts}: {said}"
            refused[i] = said
    assert len(refused) <= MOST_REFUSED, refused


REFUSED = {
    "mixed apart": {"objective": "trades", "mixer": ("mixup", "after")},
    "has perturbed or mixed layers": {"attack": "slat", "mixer": ("mixup", "after")},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_readme_says_is_refused(reason):
    assert reason in reasons()
    assert reason in outcome(REFUSED[reason])


def test_an_attack_does_not_see_mixed_layers():
    assert "has perturbed or mixed layers" in outcome({"mixer": ("manifold-mixup", "before")})


def test_a_pass_is_not_shared_by_views_with_perturbed_layers():
    assert "cannot share a pass" in reasons()
    with pytest.raises(ValueError, match="cannot share a pass"):
        dataclasses.replace(build({"attack": "slat", "objective": "trades"}), joint=(("clean", "adv"),))


def test_every_kind_of_part_is_drawn():
    names = {p for seed in range(2) for parts in drawn(seed) for p in parts.values()}
    for kind, options in choices().items():
        assert set(options) & names, kind
