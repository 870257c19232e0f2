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
WIDE = 16  # proposals of a sample that are judged at once, at most


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


def in_step(f: Classifier, s: Search, how: How) -> None:
    """Query by query, all samples at once."""
    for q in range(how.queries):
        if len(s.row) == 0:
            return
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


class _Pace:
    """Where each sample is in its own sequence of proposals: kept on the CPU, but for the draws of the block that it is in."""

    def __init__(self, s: Search, how: How):
        n, self.how = len(s.row), how
        self.query, self.refused = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
        self.block = torch.full((n,), -1)  # that the draws are for
        self.draws = s.x0.new_empty((n, min(BLOCK, how.queries), 5 + s.out.shape[1]), dtype=torch.float64)

    def counts(self, rows: int) -> Tensor:
        """How many proposals the next pass judges of each of the first samples, which is as many as fit into ``rows``."""
        most = torch.minimum(BLOCK - self.query % BLOCK, self.how.queries - self.query)
        count = (1 + self.refused).clamp_max(WIDE).minimum(most)
        return count[: max(int((count.cumsum(0) <= rows).sum()), 1)]

    def draws_of(self, row: Tensor, who: Tensor, query: Tensor) -> Tensor:
        """The draws of these queries of the samples ``who``, the first of which stand at ``row`` in the batch."""
        block = self.query[: int(who[-1]) + 1] // BLOCK
        stale = block != self.block[: len(block)]
        for b in block[stale].unique().tolist():
            at = (stale & (block == b)).nonzero().squeeze(1).to(row.device)
            new = self.how.draws(row[at], b * BLOCK, self.draws.shape[2] - 5)
            self.draws[at, : new.shape[1]] = new
        self.block[: len(block)] = block
        return self.draws[who.to(row.device), (query % BLOCK).to(row.device)]

    def advance(self, count: Tensor, first: Tensor) -> Tensor:
        """Take in which proposal of each sample was kept, of so many; returns for which samples one was."""
        n, hit = len(count), first < count
        self.query[:n] += torch.where(hit, first + 1, count)
        self.refused[:n] = torch.where(hit, 0, self.refused[:n] + count)
        return hit

    def keep(self, left: Tensor) -> None:
        self.query, self.refused, self.block = self.query[left], self.refused[left], self.block[left]
        self.draws = self.draws[left.to(self.draws.device)]


def ahead(f: Classifier, s: Search, how: How, rows: int) -> None:
    """Each sample at its own pace: as many proposals at once as it has refused in a row, and one. It decides as ``in_step`` does.

    Proposals behind the first that is kept were judged in vain. A pass takes the first samples whose proposals fit into ``rows``;
    what a sample costs does not depend on the others.
    """
    pace, device = _Pace(s, how), s.row.device
    sides = torch.tensor([how.side(q, s.out.shape) for q in range(how.queries)])
    while len(s.row):
        count = pace.counts(rows)
        before = count.cumsum(0) - count
        who = torch.arange(len(count)).repeat_interleave(count)
        j = torch.arange(len(who)) - before[who]  # the how manieth proposal of its sample
        query, lane = pace.query[who] + j, who.to(device)
        new, moved = _proposals(s, how, lane, pace.draws_of(s.row, who, query), sides[query])
        margin, miss, at = s.value[lane], torch.zeros_like(moved), moved.nonzero().squeeze(1)
        if len(at):
            margin[at], miss[at] = judge(f, new[at], s.y[lane[at]])
        kept = better(margin, s.value[lane], miss).cpu()
        first = torch.full_like(count, BLOCK).scatter_reduce_(0, who, torch.where(kept, j, BLOCK), "amin")
        compared = moved & (j <= first[who]).to(device)
        s.cost[:, 0].index_add_(0, s.row[lane[at]], torch.ones_like(at))
        s.asked.index_add_(0, s.row[lane], compared.to(s.asked.dtype))
        hit = pace.advance(count, first)
        took = (before + first)[hit].to(device)
        s.best[lane[took]], s.value[lane[took]] = new[took], margin[took]
        over = pace.query >= how.queries
        over[: len(hit)][hit] |= miss[took].cpu()
        if bool(over.any()):
            pace.keep(s.leave(over.nonzero().squeeze(1).to(device)).cpu())


def _proposals(s: Search, how: How, who: Tensor, u: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """Proposals of these window sizes (on the CPU), for the samples ``who``, from where each is: points, and which are new."""
    x0, best = s.x0[who], s.best[who]
    if len(sizes := sides.unique().tolist()) == 1:
        return propose(how.norm, x0, best, how.eps, sizes[0], u)
    new, moved = torch.empty_like(x0), torch.empty_like(who, dtype=torch.bool)
    for size in sizes:
        at = (sides == size).nonzero().squeeze(1).to(who.device)
        new[at], moved[at] = propose(how.norm, x0[at], best[at], how.eps, size, u[at])
    return new, moved
