"""The two walks of Square (see ``square``): all samples in step, or each at its own pace, several proposals at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustlab import losses
from robustlab.attacks.square_windows import propose, side
from robustlab.attacks.steps import fooled
from robustlab.rng import Rng
from robustlab.types import Classifier

BLOCK = 100  # queries whose draws are made at once
ROUNDING = 64  # units in the last place: a margin that falls by less has not fallen
WIDE = 16  # proposals that are judged at once, at most


class How(NamedTuple):
    """The threat model, the budget, how fast the schedule of window sizes runs, and the draws."""

    norm: str
    eps: float
    queries: int
    p_init: float
    pace: float
    rng: Rng

    def side(self, query: int, shape: torch.Size) -> int:
        """The window's, at the place in the schedule that a query has."""
        return side(self.p_init, int(query * self.pace), shape, self.norm)

    def draws(self, row: Tensor, q: int, channels: int) -> Tensor:
        """What the block of queries from ``q`` on needs, for some samples: (n, BLOCK, 5 + C)."""
        source = self.rng.select(row).child("queries", q // BLOCK)
        return source.uniform((min(BLOCK, self.queries - q), 5 + channels), dtype=torch.float64)


@dataclass
class Search:
    """The samples still searched, a row for each; and for the whole batch what was found and what it cost."""

    row: Tensor  # position in the batch
    x0: Tensor
    y: Tensor
    best: Tensor
    value: Tensor  # its margin
    out: Tensor
    cost: Tensor  # (N, 2), passes
    asked: Tensor  # (N,), points compared

    def leave(self, done: Tensor) -> Tensor:
        """Take samples out; returns the mask of those that stay."""
        self.out[self.row[done]] = self.best[done]
        left = torch.ones_like(self.row, dtype=torch.bool).index_fill_(0, done, False)
        for name in ("row", "x0", "y", "best", "value"):
            setattr(self, name, getattr(self, name)[left])
        return left


def judge(f: Classifier, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The margin of the true class (N,), and whether the sample is misclassified."""
    z = torch.as_tensor(f(x)).to(x)
    return -losses.margin(z, y), fooled(z, y)


def better(margin: Tensor, value: Tensor, miss: Tensor) -> Tensor:
    """Where a proposal is kept: it fools the classifier, or its margin has fallen by more than rounding."""
    return miss | (margin < value - ROUNDING * torch.finfo(value.dtype).eps * (1 + value.abs()))


def in_step(f: Classifier, s: Search, how: How, few: int) -> int:
    """Query by query, all samples at once, until at most ``few`` are left; returns the number of queries made."""
    for q in range(how.queries):
        if len(s.row) <= few:
            return q
        if q % BLOCK == 0:
            draws = how.draws(s.row, q, s.out.shape[1])
        new, moved = propose(how.norm, s.x0, s.best, how.eps, how.side(q, s.out.shape), draws[:, q % BLOCK])
        at = moved.nonzero().squeeze(1)
        if len(at) == 0:
            continue
        new, y, value = (v if len(at) == len(v) else v[at] for v in (new, s.y, s.value))
        margin, miss = judge(f, new, y)
        s.cost[s.row[at], 0] += 1
        s.asked[s.row[at]] += 1
        kept = better(margin, value, miss)
        s.best[at[kept]], s.value[at[kept]] = new[kept], margin[kept]
        if bool(miss.any()):
            draws = draws[s.leave(at[miss])]
    return how.queries


@dataclass
class _Place:
    """Where a sample is in its sequence of proposals."""

    q: int  # the next one
    refused: int = 0  # in a row
    draws: Tensor | None = None  # of the block that holds q

    def step(self, width: int, how: How, row: Tensor, channels: int) -> tuple[Tensor, list[int]]:
        """The draws and numbers of the next proposals: one more than were refused, within the block and the budget."""
        if self.draws is None or self.q % BLOCK == 0:
            self.draws = how.draws(row, self.q - self.q % BLOCK, channels)[0]
        count = min(1 + self.refused, width, BLOCK - self.q % BLOCK, how.queries - self.q)
        return self.draws[self.q % BLOCK :][:count], list(range(self.q, self.q + count))


def ahead(f: Classifier, s: Search, how: How, first: int) -> None:
    """From query ``first`` on each sample at its own pace. Decisions are those of ``in_step``; rows judged in vain cost passes."""
    places = [_Place(first) for _ in s.row] if first < how.queries else []
    while places:
        width = max(WIDE // len(places), 1)
        steps = [p.step(width, how, s.row[i : i + 1], s.out.shape[1]) for i, p in enumerate(places)]
        counts = [len(numbers) for _, numbers in steps]
        who = torch.arange(len(places), device=s.row.device).repeat_interleave(torch.tensor(counts, device=s.row.device))
        new, moved = _proposals(s, how, who, torch.cat([u for u, _ in steps]), [q for _, numbers in steps for q in numbers])
        margin, miss = s.value[who], torch.zeros_like(moved)
        if bool(moved.any()):
            margin[moved], miss[moved] = judge(f, new[moved], s.y[who[moved]])
        s.cost[:, 0].index_add_(0, s.row[who], moved.to(s.cost.dtype))
        kept, used, took, begin = better(margin, s.value[who], miss).tolist(), torch.zeros_like(moved), list[int](), 0
        for place, count in zip(places, counts, strict=True):
            chosen = next((j for j in range(begin, begin + count) if kept[j]), None)
            last = begin + count - 1 if chosen is None else chosen
            used[begin : last + 1] = True
            took += [] if chosen is None else [chosen]
            place.q += last + 1 - begin
            place.refused = 0 if chosen is not None else place.refused + count
            begin += count
        s.asked.index_add_(0, s.row[who], (used & moved).to(s.asked.dtype))
        s.best[who[took]], s.value[who[took]] = new[took], margin[took]
        over = torch.tensor([place.q >= how.queries for place in places], device=miss.device)
        over[who[took]] |= miss[took]
        if bool(over.any()):
            left = s.leave(over.nonzero().squeeze(1)).tolist()
            places = [p for p, stays in zip(places, left, strict=True) if stays]


def _proposals(s: Search, how: How, who: Tensor, u: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """The proposals with these numbers, for the samples ``who``, from where each is: points, and which of them are new."""
    sides = torch.tensor([how.side(q, s.out.shape) for q in numbers], device=who.device)
    new, moved = torch.empty_like(s.x0[who]), torch.empty_like(who, dtype=torch.bool)
    for size in sides.unique().tolist():
        at = (sides == size).nonzero().squeeze(1)
        new[at], moved[at] = propose(how.norm, s.x0[who[at]], s.best[who[at]], how.eps, size, u[at])
    return new, moved
