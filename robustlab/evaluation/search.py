"""One attack on some images: searched on faster copies of the classifier, believed only where the classifier itself is fooled.

    for g in copy in bfloat16 (if asked for), copy in float32, f:             copies that cannot be trusted are left out
        x' = trusted(attack(g, x));  robust = f is right on x'
        false successes: f is right on x', and g is not, or cannot tell;  x, y = those        the attack left them too early

A false success saves no sample: the next better copy, last the classifier itself, is searched for it again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustlab.evaluation.counting import Counter, per_sample
from robustlab.evaluation.judge import Judge, right, trusted
from robustlab.evaluation.prepare import prepare
from robustlab.modes import ambient, bn_mode, full_precision, tf32, unwrap
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Threat, UserError, speculating, with_rows, with_threat

FULL = 12  # rows from which on a CPU works at its full speed in bfloat16; with two it takes half as long again for each


@dataclass
class Found:
    """What a search did to n images.

    Attributes:
        x_adv: in ball and box (n, C, H, W).
        robust: whether the classifier is right on them (n,).
        passes: forwards and backwards of each (n, 2); None where the attack did not tell them.
        nearness: what the attack reported (n,), or None.
        forwards, backwards: in all, those that verified it included.
        unverified: how often a copy alone was fooled.
        reached, outside: the largest norm, and how often the attack had left ball or box; see ``judge.trusted``.
        flags: warnings of the attack, and of the search.
        seconds: how long it took.
    """

    x_adv: Tensor
    robust: Tensor
    passes: Tensor | None = None
    nearness: Tensor | None = None
    forwards: int = 0
    backwards: int = 0
    unverified: int = 0
    reached: float = 0.0
    outside: int = 0
    flags: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def report(self, rows: Tensor, info: dict[str, Any], told: list[list[int]] | None) -> None:
        """Take in what the attack says of some rows; ``told``: the passes that it spent on each, if they add up."""
        self.passes = None if self.passes is None or told is None else self.passes.index_add(0, rows.cpu(), torch.tensor(told))
        if (near := info.get("nearness")) is not None:
            self.nearness = torch.zeros(len(self.robust)).to(near) if self.nearness is None else self.nearness
            self.nearness[rows] = near
        self.flags = list(dict.fromkeys([*self.flags, *map(str, info.get("flags", ()))]))

    def verified(self, rows: Tensor, counter: Counter, false: int) -> None:
        """Take in what a run spent, the look at some rows included, and how many of these were false successes."""
        if self.passes is not None:
            self.passes[rows.cpu(), 0] += 1
        self.forwards, self.backwards = self.forwards + counter.forwards, self.backwards + counter.backwards
        self.unverified += false


class Search:
    """Runs attacks on a classifier.

    Args:
        judge: the classifier.
        precision: of the first copy, ``fp32`` or ``bf16``.
        rows: images in one pass, at most; None leaves it to the attacks.
    """

    def __init__(self, judge: Judge, precision: str = "fp32", rows: int | None = None):
        self.judge, self.f, self.precision, self.rows = judge, judge.f, precision, rows
        self.copies: dict[str, Classifier] = {}  # by precision, made when first asked for

    def run(self, attack: Attack, threat: Threat, label: str, x: Tensor, y: Tensor, rng: Rng, *, copies: bool = True) -> Found:
        """Attack images that are classified correctly.

        Args:
            attack, threat: as told.
            label: what to call the attack in errors.
            x, y: images (n, C, H, W) and labels (n,).
            rng: of the draws.
            copies: whether to search on copies at all.

        Raises:
            UserError: the attack refuses its fields, or returns anything but images.
        """
        found = Found(x.clone(), torch.ones(len(x), dtype=torch.bool, device=x.device))
        if len(x) == 0:
            return found
        start, rows = self.judge.clock(), torch.arange(len(x), device=x.device)
        found.passes = torch.zeros(len(x), 2, dtype=torch.long)
        for f in self._models(x) if copies else (self.f,):
            counter = Counter(functools.partial(self._queried, f), unwrap(self.f))
            told = speculating(attack, FULL // len(rows)) if self._lacks_rows(f, len(rows)) else attack
            returned, info = self._once(counter, told, threat, label, x[rows], y[rows], rng.select(rows))
            x_adv, reached, outside = trusted(returned, x[rows], threat, label)
            z = self.judge.logits(x_adv)
            found.x_adv[rows], found.robust[rows] = x_adv, right(z, y[rows])
            found.reached, found.outside = max(found.reached, reached), found.outside + outside
            found.report(rows, info, per_sample(info, len(rows), counter))
            looked, false = self._false_successes(f, counter, x_adv, y[rows], z)
            found.verified(rows[looked], counter, len(false))
            if len(rows := rows[false]) == 0:
                break
            attack = speculating(attack)  # one or two of a batch, as a rule: proposal by proposal they would take as long as all
        if copies and self.copies.get("bf16") is self.f:
            found.flags.append("searched in float32: the model has no copy in bfloat16 to be trusted")
        found.seconds = self.judge.clock() - start
        return found

    def _models(self, x: Tensor) -> Iterator[Classifier]:
        """What an attack runs on, in turn, each for the false successes of the one before. The last is the classifier itself."""
        for precision in ("bf16", "fp32") if self.precision == "bf16" else ("fp32",):
            if precision not in self.copies:
                self.copies[precision] = prepare(self.f, x, precision)
            if self.copies[precision] is not self.f:
                yield self.copies[precision]
        yield self.f

    def _lacks_rows(self, f: Classifier, count: int) -> bool:
        return f is self.copies.get("bf16") and self.judge.device.type == "cpu" and 2 * count <= FULL

    def _queried(self, f: Classifier, x: Tensor) -> Tensor:
        """What attacks are answered, in the precision of a copy. What the classifier itself says in TF32 nothing would catch."""
        own = full_precision() if f is self.f else contextlib.nullcontext()
        with torch.autocast(self.judge.device.type, enabled=False), own:
            return f(x).to(self.judge.dtype)

    def _once(
        self, counter: Counter, attack: Attack, threat: Threat, label: str, x: Tensor, y: Tensor, rng: Rng
    ) -> tuple[Any, dict[str, Any]]:
        """One run of an attack, which gets a copy of the images."""
        target = self.judge.target(y)
        try:
            attack = with_rows(with_threat(attack, threat), self.rows)
            with ambient(rng.batch_seed()), bn_mode(self.f, "eval"), torch.enable_grad():
                x_adv, info = attack.run(counter, x.clone(), target, rng)
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"the attack '{label}': {error}") from error
        return x_adv, dict(info)

    @torch.no_grad()
    def _false_successes(self, f: Classifier, counter: Counter, x_adv: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that ``f`` was asked about, and those that it believes fooled, or cannot tell, while the logits ``z`` are right.

        An attack leaves such a sample although it might be broken. In float32 only rows whose ``z`` are all but tied can be; in
        bfloat16, and on a GPU in TF32, any.
        """
        bf16, coarse = f is self.copies.get("bf16"), tf32(self.judge.device)
        low, near = bf16 or coarse, 2.0**-8 if bf16 else 2.0**-10 if coarse else 1e-5
        rows = (right(z, y) & (low | _tied(z, y, 1e-3))).nonzero().squeeze(1)
        if f is self.f or len(rows) == 0:
            return rows[:0], rows[:0]
        with bn_mode(self.f, "eval"):
            own = counter(x_adv[rows])
        return rows, rows[~right(own, y[rows]) | _tied(own, y[rows], near)]


def _tied(z: Tensor, y: Tensor, near: float) -> Tensor:
    """Whether the margin of the class ``y`` (N,) is at most ``near`` of the largest logit."""
    own = z.gather(1, y[:, None])
    return (own - z.scatter(1, y[:, None], -torch.inf)).amin(1) <= near * z.abs().amax(1)
