"""The audit of a suite that spares samples its dearer attacks: a random part of these gets the exact suite after all.

    pool       the survivors that were not given all of the exact suite: N
    drawn      m of them, in an order that depends on the seed and their positions alone; k of the m break
    left       the limit on how many of the other N - m would break: one-sided, 95 %, exact (hypergeometric)

The k count as broken. The accuracy under the exact suite is then at most ``left / n`` below the measured one; it can lie above by
what the cheap attacks alone have broken. An audit that goes on until the limit is small enough looks several times, and each look
may err: the j-th is at confidence 1 - 0.05 / 2^j, so that all together are at 95 %. Looks are taken where they can first succeed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from robustlab.evaluation.cascade import Gate, gate_of, steps_of
from robustlab.evaluation.result import Tally
from robustlab.evaluation.statistics import ALPHA, draws_needed, most_left
from robustlab.rng import Rng
from robustlab.types import BoundSuite, Suite, Threat, UserError

PREFIX = "audit/"  # of its attacks in the ledger


def judged(suite: BoundSuite, exact: Suite) -> bool:
    """Whether what lies behind the suite's gate is the exact suite, so that a sample that came through is settled."""
    return suite.attacks[suite.leading :] == exact.attacks


def exact_suite(plan: Suite, shard: tuple[int, int] | None, audit: int | None, audit_bound: float | None) -> Suite | None:
    """The suite that another one stands in for; None for suites that do not.

    Raises:
        UserError: an audit is asked for that cannot be.
    """
    from robustlab import config

    if not isinstance(plan, BoundSuite):
        if audit is not None or audit_bound is not None:
            raise UserError(f"audit: the suite '{plan.name}' spares no sample any attack; there is nothing to audit")
        return None
    if shard is not None and (audit or audit_bound is not None):
        raise UserError("audit: a shard does not see the whole; merge the shards, then evaluate with --resume in the merged folder")
    if audit is not None and audit < 0:
        raise UserError(f"audit: expected a number of images, 0 or more, got {audit}")
    if audit_bound is not None and not 0 <= audit_bound <= 100:
        raise UserError(f"audit_bound: expected points of accuracy, 0 to 100, got {audit_bound:g}")
    exact: Suite = config.build("suite", plan.exact)
    return exact


class Audit:
    """One audit, under one threat model.

    Args:
        exact: the name of the suite that the drawn samples get.
        pool: positions of the samples to draw from.
        n: images in all.
        seed, threat: what the draw depends on.
        size: how many to draw at least.
        points: draw on until at most so many points of accuracy are left; None: do not.
    """

    def __init__(self, exact: str, pool: list[int], n: int, seed: int, threat: Threat, size: int = 0, points: float | None = None):
        self.exact, self.n, self.seed, self.size = exact, n, seed, min(size, len(pool))
        self.most = None if points is None else int(points / 100 * n + 1e-9)
        self.order = _shuffled(sorted(pool), Rng(seed).child("audit", threat.norm, repr(threat.eps)))
        self.audited = self.misses = self.looks = 0
        self.tally = Tally()

    def pieces(self, size: int, known: Mapping[int, int]) -> Iterator[tuple[int, list[int]]]:
        """Where in the order the next samples begin, and their positions, until enough are audited.

        Each piece has to be counted (:meth:`count`) before the next is asked for.

        Args:
            size: samples in one piece.
            known: pieces that an earlier run cut: where they begin and how long they are.
        """
        while not self._enough():
            self.looks += self.most is not None
            goal = self._goal()
            while self.audited < goal:
                yield self.piece(known.get(self.audited, min(size, goal - self.audited)))
        while self.audited in known:  # asked for less than there is
            yield self.piece(known[self.audited])

    def piece(self, length: int) -> tuple[int, list[int]]:
        """Where in the order the next so many samples begin, and their positions, ascending."""
        return self.audited, sorted(self.order[self.audited : self.audited + length])

    def count(self, audited: int, misses: int, looks: int = 0) -> None:
        """Take in a piece; ``looks``: what the ledger says that it was for."""
        self.audited += audited
        self.misses += misses
        self.looks = max(self.looks, looks)

    @property
    def left(self) -> int:
        """How many of the others would break, at most."""
        return most_left(len(self.order), self.audited, self.misses, ALPHA / 2**self.looks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; see ``Result.threats``."""
        return {
            "suite": self.exact,
            "survivors": len(self.order),
            "audited": self.audited,
            "misses": self.misses,
            "left": self.left,
            "points": 100 * self.left / self.n,
            "looks": self.looks,
            "seed": self.seed,
            "forwards": self.tally.forwards,
            "backwards": self.tally.backwards,
            "seconds": self.tally.seconds,
        }

    def _enough(self) -> bool:
        if self.most is None:
            return self.audited >= self.size
        return self.audited == len(self.order) or (self.audited >= self.size and self.left <= self.most)

    def _goal(self) -> int:
        if self.most is None:
            return self.size
        return max(self.size, draws_needed(len(self.order), self.misses, self.most, ALPHA / 2**self.looks))


def recount(header: Mapping[str, Any], entries: Sequence[dict[str, Any]], robust: Sequence[Tensor]) -> list[Audit | None]:
    """The audits that a ledger tells, one for each threat model; None where its suite stands in for no other.

    Args:
        header, entries: the ledger.
        robust: who survived the suite's own attacks (n,), for each threat model.

    Raises:
        UserError: lines that no audit writes.
    """
    from robustlab import config

    if "exact" not in header["suite"]["resolved"]:
        return [None for _ in robust]
    suite = config.build("suite", header["suite"]["resolved"])
    exact = config.build("suite", suite.exact)
    found: list[Audit | None] = []
    for t, survived in zip(header["threats"], robust, strict=True):
        own = [e for e in entries if e["threat"] == t]
        pool = set(survived.nonzero().flatten().tolist())
        if judged(suite, exact):
            pool &= spared(gate_of(suite), own)
        audit = Audit(suite.exact, list(pool), header["n"], header["seed"], Threat(t["norm"], t["eps"]))
        lines = {(e["batch"], e["attack"]): e for e in own if e["attack"].startswith(PREFIX)}
        _take_in(audit, lines, [PREFIX + step.label for step in steps_of(exact)])
        found.append(audit)
    return found


def _take_in(audit: Audit, lines: dict[tuple[int, str], dict[str, Any]], labels: list[str]) -> None:
    while lines:
        start, left = audit.piece(len(lines.get((audit.audited, labels[0]), {"index": ()})["index"]))
        given, looks = len(left), 0
        for label in labels:
            line = lines.pop((start, label), None)
            if line is None or line["index"] != left or not given:
                raise UserError(f"'{label}', from {start}: missing, or not the samples that the seed draws")
            left = [row for row, v in zip(left, line["verdict"], strict=True) if v]
            looks = line["looks"]
            audit.tally.add(line)
        audit.count(given, given - len(left), looks)


def spared(gate: Gate | None, entries: Iterable[Mapping[str, Any]]) -> set[int]:
    """Positions of the samples that a gate spares the attacks behind it, among these lines of a ledger."""
    led = [e for e in entries if gate is not None and e["attack"] == gate.label]
    return {row for e in led if gate is not None for row, out in zip(e["index"], gate.spares(e), strict=True) if out}


def _shuffled(pool: list[int], rng: Rng) -> list[int]:
    """The pool in random order; that of two samples does not depend on the others."""
    if not pool:
        return []
    tickets = torch.tensor(pool)
    high, low = rng.at(tickets).bits((2,)).long().unbind(1)
    return tickets[((high << 32) + low).argsort(stable=True)].tolist()
