"""What an evaluation found."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustlab.evaluation.statistics import Interval, wilson

POINTS = 100  # of a cost curve at most


@dataclass
class Tally:
    """What one attack, one corruption or the clean pass did, added up over the batches."""

    given: int = 0
    correct: int = 0
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    reached: float = 0.0
    outside: int = 0
    flags: list[str] = field(default_factory=list)
    spent: dict[int, float] = field(default_factory=dict)  # passes by the sample's position; a line without them shares its total
    survived: dict[int, int] = field(default_factory=dict)
    confidence: dict[int, float] = field(default_factory=dict)  # by the sample's position, where the line tells it

    def add(self, entry: dict[str, Any]) -> None:
        n = len(entry["verdict"])
        mean = (entry["forwards"] + entry["backwards"]) / max(n, 1)
        self.spent.update(zip(entry["index"], map(sum, entry["passes"]) if "passes" in entry else [mean] * n, strict=True))
        self.survived.update(zip(entry["index"], entry["verdict"], strict=True))
        self.confidence.update(zip(entry["index"], entry.get("confidence", ()), strict="confidence" in entry))
        self.given += n
        self.correct += sum(entry["verdict"])
        self.forwards += entry["forwards"]
        self.backwards += entry["backwards"]
        self.seconds += entry["seconds"]
        self.reached = max(self.reached, entry.get("reached", 0.0))
        self.outside += entry.get("outside", 0)
        self.flags += [flag for flag in entry.get("flags", ()) if flag not in self.flags]

    @property
    def broken(self) -> int:
        return self.given - self.correct


@dataclass(frozen=True, repr=False)
class Result:
    """Accuracies of a classifier under a suite. Fractions are of all ``n`` images, misclassified ones included.

    Attributes:
        n: images evaluated.
        clean_accuracy, clean_interval: without an adversary; intervals are Wilson's, 95 %.
        robust_accuracy, interval: correct, and broken by no attack of the first threat model; None without attacks.
        per_attack: for the first threat model, in order: ``robust_accuracy`` after the attack, how many images it was given
            and broke, its ``forwards``, ``backwards`` and ``seconds``, the largest norm it reached, how many images it
            returned outside ball or box (they were projected before they were scored), its warnings (``flags``), and the most
            passes that any image had got when it ended, those of earlier attacks included (``spent``).
        clean, robust: verdict of each image (n,), bool; ``robust`` is None without attacks.
        threats: one dict per threat model: ``norm eps k robust_accuracy interval per_attack cost curve audit``; for ``curve`` see
            :func:`cost_curve`. ``audit`` is None, or for
            suites that stand in for an exact one: that one's name (``suite``), the ``survivors`` that were not given all of it,
            how many of these were ``audited`` and broken (``misses``; they are not in ``k``), how many more may be ``left``
            (one-sided, 95 %) and that in ``points`` of accuracy, the ``looks``, the ``seed``, ``forwards backwards seconds`` (not
            in the threat model's ``cost``).
        verdicts: ``robust`` for each of ``threats``.
        corruptions: for each corruption the accuracy at each severity (keys ``"1"`` to ``"5"``) and their ``mean``.
        corruption_accuracy: the mean over the corruptions, or None.
        corruption_scores: what they come to, for corruption suites; see ``corruption_scores.scores``. None for others.
        cost: ``forwards backwards seconds`` in all, and per image. The forward that re-scores an attack's images is not the
            attack's and is not counted.
        suite: its name and every parameter (``resolved``).
        seed, precision, batch_size: as used. ``precision`` is that of the search; scores are always in full precision.
        model_hash: of the weights and the structure.
        fingerprint: of the images and labels evaluated.
        environment: versions and machine.
        provenance: what the caller handed over.
        ledger: the file with the per-sample verdicts, or None.
        reliability: whether the attacks' verdicts can be believed (``evaluation.reliability.Report.to_dict()``), or None.
    """

    n: int
    clean_accuracy: float
    clean_interval: Interval
    robust_accuracy: float | None
    interval: Interval | None
    per_attack: dict[str, dict[str, Any]]
    clean: Tensor
    robust: Tensor | None
    threats: list[dict[str, Any]]
    verdicts: list[Tensor]
    corruptions: dict[str, dict[str, float]]
    corruption_accuracy: float | None
    cost: dict[str, float]
    suite: dict[str, Any]
    seed: int
    precision: str
    batch_size: int
    model_hash: str
    fingerprint: str
    environment: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    ledger: str | None = None
    reliability: dict[str, Any] | None = None
    corruption_scores: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """One line: ``clean 95.31 % [90.1, 97.8], robust 73.44 % [65.2, 80.3] under pgd-20 (linf 0.1, n = 128)``."""
        parts = [_show("clean", self.clean_accuracy, self.clean_interval)]
        where, audit = f"n = {self.n}", self.audit
        if self.robust_accuracy is not None and self.interval is not None:
            parts.append(_show("robust" if audit is None else "robust at most", self.robust_accuracy, self.interval))
            if audit is not None and audit["audited"]:
                parts[-1] += f" (audit: by at most {audit['points']:.2f} points too high)"
            where = f"{self.threats[0]['norm']} {self.threats[0]['eps']:.4g}, {where}"
        if self.corruption_accuracy is not None:
            parts.append(f"corruptions {100 * self.corruption_accuracy:.2f} %")
        return f"{', '.join(parts)} under {self.suite['name']} ({where})"

    @property
    def audit(self) -> dict[str, Any] | None:
        """That of the first threat model."""
        return self.threats[0]["audit"] if self.threats else None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-sample verdicts (they are in the ledger), as plain JSON-able values."""
        k = int(self.clean.sum())
        first = self.threats[0] if self.threats else None
        return {
            "n": self.n,
            "clean": proportion(k, self.n),
            "robust": proportion(first["k"], self.n) if first else None,
            "threat": {"norm": first["norm"], "eps": first["eps"]} if first else None,
            "per_attack": self.per_attack,
            "threats": self.threats,
            "corruptions": self.corruptions,
            "corruption_accuracy": self.corruption_accuracy,
            "corruption_scores": self.corruption_scores,
            "cost": self.cost,
            "suite": self.suite,
            "seed": self.seed,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "model_hash": self.model_hash,
            "fingerprint": self.fingerprint,
            "environment": self.environment,
            "provenance": self.provenance,
            "ledger": self.ledger,
            "reliability": self.reliability,
        }


def _show(name: str, accuracy: float, interval: Interval) -> str:
    return f"{name} {100 * accuracy:.2f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def proportion(k: int, n: int) -> dict[str, Any]:
    return {"k": k, "n": n, "accuracy": k / n, "interval": list(wilson(k, n))}


def cost_of(tallies: list[Tally], n: int, audits: Sequence[Mapping[str, Any]] = ()) -> dict[str, float]:
    costs = [*map(vars, tallies), *audits]
    forwards, backwards = sum(c["forwards"] for c in costs), sum(c["backwards"] for c in costs)
    return {
        "forwards": forwards,
        "backwards": backwards,
        "seconds": sum(c["seconds"] for c in costs),
        "forwards_per_sample": forwards / n,
        "backwards_per_sample": backwards / n,
    }


def threat_summary(
    norm: str, eps: float, tallies: dict[str, Tally], right: Tensor, verdict: Tensor, audit: dict[str, Any] | None
) -> dict[str, Any]:
    """One entry of ``Result.threats``."""
    n, k = len(verdict), int(verdict.sum())
    left = itertools.accumulate((t.broken for t in tallies.values()), operator.sub, initial=int(right.sum()))
    next(left)
    curve, ends = cost_curve(int(right.sum()), n, tallies)
    per_attack = {
        label: {
            "robust_accuracy": next(left) / n,
            "attacked": t.given,
            "broken": t.broken,
            "forwards": t.forwards,
            "backwards": t.backwards,
            "seconds": t.seconds,
            "reached": t.reached,
            "outside": t.outside,
            "flags": t.flags,
            "spent": ends[label],
        }
        for label, t in tallies.items()
    }
    return {
        "norm": norm,
        "eps": eps,
        "k": k,
        "robust_accuracy": k / n,
        "interval": list(wilson(k, n)),
        "per_attack": per_attack,
        "cost": cost_of(list(tallies.values()), n),
        "curve": curve,
        "audit": audit,
    }


def corruption_summary(tallies: dict[tuple[str, int], Tally], n: int) -> dict[str, dict[str, float]]:
    """``Result.corruptions``."""
    out: dict[str, dict[str, float]] = {}
    for (label, severity), t in tallies.items():
        out.setdefault(label, {})[str(severity)] = t.correct / n
    for row in out.values():
        row["mean"] = sum(row.values()) / len(row)
    return out


def cost_curve(clean: int, n: int, tallies: dict[str, Tally]) -> tuple[list[list[float]], dict[str, float]]:
    """Robust accuracy against what the adversary may spend on each image: a step function, right at each of its points.

    At c it is the share of all n images that no attack broke with at most c passes (forwards and backwards, those of earlier
    attacks included), the attacks taken in order.

    Args:
        clean: images classified correctly without an adversary.
        n: images.
        tallies: of the attacks, in order.

    Returns:
        ``[passes, robust accuracy]`` in order of the passes, from no passes to the most that any image got, ``POINTS`` at most; and
        for each attack the most that any image had got when it ended.
    """
    spent, broken, ends = dict[int, float](), Counter[float](), dict[str, float]()
    for label, tally in tallies.items():
        for i, passes in tally.spent.items():
            spent[i] = spent.get(i, 0) + passes
            if not tally.survived[i]:
                broken[spent[i]] += 1
        ends[label] = max(spent.values(), default=0)
    last, left = max(ends.values(), default=0), clean
    steps = [[0.0, clean / n]]
    for passes in sorted(broken):
        left -= broken[passes]
        steps.append([passes, left / n])
    if last > steps[-1][0]:
        steps.append([last, left / n])
    if len(steps) > POINTS:
        steps = [steps[round(j * (len(steps) - 1) / (POINTS - 1))] for j in range(POINTS)]
    return steps, ends


def as_mask(indices: list[int], n: int) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.tensor(indices, dtype=torch.long)] = True
    return mask


def assemble(
    n: int,
    clean: Tally,
    right: Tensor,
    threats: list[tuple[str, float]],
    attacked: list[dict[str, Tally]],
    verdicts: list[Tensor],
    corrupted: dict[tuple[str, int], Tally],
    corrupted_attacked: dict[tuple[str, int], Tally],
    corruption_threat: Mapping[str, Any] | None,
    audits: list[dict[str, Any] | None],
    **known: Any,
) -> Result:
    """The result of ``n`` images.

    Args:
        n: images.
        clean, right: the clean pass, and its verdicts (n,).
        threats, attacked, verdicts: norm and radius, tallies of the attacks and verdicts (n,) of each threat model.
        corrupted: tallies by corruption and severity.
        corrupted_attacked, corruption_threat: those of the attack on corrupted images, and its norm and radius.
        audits: of each threat model.
        known: the other fields of the result.
    """
    from robustlab.evaluation.corruption_scores import scores

    each = zip(threats, attacked, verdicts, audits, strict=True)
    rows = [threat_summary(*t, tallies, right, verdict, audit) for t, tallies, verdict, audit in each]
    first, corruptions = rows[0] if rows else None, corruption_summary(corrupted, n)
    everything = [clean, *(t for tallies in attacked for t in tallies.values()), *corrupted.values(), *corrupted_attacked.values()]
    told = known["suite"]["resolved"]
    return Result(
        n=n,
        clean_accuracy=clean.correct / n,
        clean_interval=wilson(clean.correct, n),
        robust_accuracy=first["robust_accuracy"] if first else None,
        interval=wilson(first["k"], n) if first else None,
        per_attack=first["per_attack"] if first else {},
        clean=right,
        robust=verdicts[0] if verdicts else None,
        threats=rows,
        verdicts=verdicts,
        corruptions=corruptions,
        corruption_accuracy=sum(c["mean"] for c in corruptions.values()) / len(corruptions) if corruptions else None,
        corruption_scores=scores(n, clean, corrupted, corrupted_attacked, told, corruption_threat)
        if corrupted and "files" in told
        else None,
        cost=cost_of(everything, n, [audit for audit in audits if audit is not None]),
        **known,
    )
