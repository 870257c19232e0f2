"""Square's walk with each sample at its own pace, several proposals at a time (see ``square``)."""

from __future__ import annotations

import torch
from torch import Tensor

from robustlab.attacks.square_proposals import Move, propose
from robustlab.attacks.square_walk import BLOCK, How, Search, better, judge
from robustlab.types import Classifier


class _Pace:
    """Where each sample is in its own sequence of proposals: kept on the CPU, but for the moves of the block that it is in."""

    def __init__(self, s: Search, how: How, lookahead: int):
        n, self.how, self.lookahead, self.shape = len(s.row), how, lookahead, s.out.shape
        self.query, self.refused = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
        self.block = torch.zeros(n, dtype=torch.long)  # that the moves are of
        self.moves = how.moves(s.row, 0, self.shape)

    def counts(self, rows: int) -> Tensor:
        """How many proposals the next pass judges of each of the first samples, which is as many as fit into ``rows``."""
        most = torch.minimum(BLOCK - self.query % BLOCK, self.how.queries - self.query)
        count = (1 + self.refused).clamp_max(self.lookahead).minimum(most)
        return count[: max(int((count.cumsum(0) <= rows).sum()), 1)]

    def moves_of(self, row: Tensor, who: Tensor, query: Tensor) -> Move:
        """The moves at these queries of the samples ``who``, the first of which stand at ``row`` in the batch."""
        block = self.query[: int(who[-1]) + 1] // BLOCK
        stale = block != self.block[: len(block)]
        for b in block[stale].unique().tolist():
            at = (stale & (block == b)).nonzero().squeeze(1).to(row.device)
            for old, new in zip(self.moves, self.how.moves(row[at], b * BLOCK, self.shape), strict=True):
                old[at, : new.shape[1]] = new
        self.block[: len(block)] = block
        who, query = who.to(row.device), (query % BLOCK).to(row.device)
        return tuple(v[who, query] for v in self.moves)

    def advance(self, count: Tensor, first: Tensor) -> Tensor:
        """Take in which proposal of each sample was kept, of so many; returns for which samples one was."""
        n, hit = len(count), first < count
        self.query[:n] += torch.where(hit, first + 1, count)
        self.refused[:n] = torch.where(hit, 0, self.refused[:n] + count)
        return hit

    def keep(self, left: Tensor) -> None:
        self.query, self.refused, self.block = self.query[left], self.refused[left], self.block[left]
        self.moves = tuple(v[left.to(v.device)] for v in self.moves)


def ahead(f: Classifier, s: Search, how: How, rows: int, lookahead: int) -> None:
    """Each sample at its own pace: as many proposals at once as it has refused in a row, and one, but at most ``lookahead``.

    It decides as ``in_step`` does. Proposals behind the first that is kept were judged in vain. A pass takes the first samples
    whose proposals fit into ``rows``; what a sample costs does not depend on the others.
    """
    pace, device = _Pace(s, how, lookahead), s.row.device
    sides = torch.tensor([how.side(q, s.out.shape) for q in range(how.queries)])
    while len(s.row):
        count = pace.counts(rows)
        before = count.cumsum(0) - count
        who = torch.arange(len(count)).repeat_interleave(count)
        j = torch.arange(len(who)) - before[who]  # the how manieth proposal of its sample
        query, lane = pace.query[who] + j, who.to(device)
        new, moved = _proposals(s, how, lane, pace.moves_of(s.row, who, query), sides[query])
        margin, miss, at = s.value[lane], torch.zeros_like(moved), moved.nonzero().squeeze(1)
        if len(at):
            margin[at], miss[at] = judge(f, new[at], s.c[lane[at]])
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


def _proposals(s: Search, how: How, who: Tensor, move: Move, sides: Tensor) -> tuple[Tensor, Tensor]:
    """Proposals for the samples ``who`` from where each is: points, and which are new. ``sides`` (on the CPU) of the windows."""
    base, best = tuple(v[who] for v in s.base), s.best[who]
    if how.norm == "linf" or len(sizes := sides.unique().tolist()) == 1:
        return propose(how.norm, base, best, how.eps, int(sides[0]), move)
    new, moved = torch.empty_like(best), torch.empty_like(who, dtype=torch.bool)
    for size in sizes:
        at = (sides == size).nonzero().squeeze(1).to(who.device)
        some, there = (tuple(v[at] for v in group) for group in (base, move))
        new[at], moved[at] = propose(how.norm, some, best[at], how.eps, size, there)
    return new, moved
