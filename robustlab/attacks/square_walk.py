"""Square's walk with all samples in step (see ``square``), and what it shares with ``square_ahead``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustlab.attacks.square_proposals import Ground, Move, moves, propose
from robustlab.attacks.square_windows import side
from robustlab.rng import Rng
from robustlab.types import Classifier

BLOCK = 100  # queries whose draws are made at once
ROUNDING = 64  # units in the last place: a margin that falls by less has not fallen


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

    def moves(self, row: Tensor, q: int, shape: torch.Size) -> Move:
        """Of the block of queries from ``q`` on, for some samples: each (n, up to BLOCK, ...)."""
        count = min(BLOCK, self.queries - q)
        u = self.rng.select(row).child("queries", q // BLOCK).uniform((count, 5 + shape[1]), dtype=torch.float64)
        sides = torch.tensor([self.side(q + i, shape) for i in range(count)], device=u.device)
        return moves(self.norm, u, sides, shape)


@dataclass
class Search:
    """The samples still searched, a row for each; and for the whole batch what was found and what it cost."""

    row: Tensor  # position in the batch
    base: Ground  # what proposals are made from
    c: Tensor  # class (n, 1)
    best: Tensor
    value: Tensor  # its margin
    out: Tensor
    cost: Tensor  # (N, 2), passes
    asked: Tensor  # (N,), points compared

    def leave(self, done: Tensor) -> Tensor:
        """Take samples out; returns the mask of those that stay."""
        self.out[self.row[done]] = self.best[done]
        left = torch.ones_like(self.row, dtype=torch.bool).index_fill_(0, done, False)
        for name in ("row", "c", "best", "value"):
            setattr(self, name, getattr(self, name)[left])
        self.base = tuple(v[left] for v in self.base)
        return left


def judge(f: Classifier, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the class c (N, 1) is ahead (N,), and whether the sample is misclassified."""
    z = torch.as_tensor(f(x)).to(x)
    return z.gather(1, c).squeeze(1) - z.scatter(1, c, -torch.inf).amax(1), z.argmax(1) != c.squeeze(1)


def better(margin: Tensor, value: Tensor, miss: Tensor) -> Tensor:
    """Where a proposal is kept: it fools the classifier, or its margin has fallen by more than rounding."""
    return miss | (margin < value - ROUNDING * torch.finfo(value.dtype).eps * (1 + value.abs()))


def in_step(f: Classifier, s: Search, how: How) -> None:
    """Query by query, all samples at once."""
    for q in range(how.queries):
        if len(s.row) == 0:
            return
        if q % BLOCK == 0:
            block = how.moves(s.row, q, s.out.shape)
        move = tuple(v[:, q % BLOCK] for v in block)
        new, moved = propose(how.norm, s.base, s.best, how.eps, how.side(q, s.out.shape), move)
        at = moved.nonzero().squeeze(1)
        if len(at) == 0:
            continue
        new, c, value, row = (v if len(at) == len(v) else v[at] for v in (new, s.c, s.value, s.row))
        margin, miss = judge(f, new, c)
        s.cost[row, 0] += 1
        kept = better(margin, value, miss).nonzero().squeeze(1)
        if len(kept) == 0:
            continue
        s.best[at[kept]], s.value[at[kept]] = new[kept], margin[kept]
        if bool(miss.any()):
            left = s.leave(at[miss])
            block = tuple(v[left] for v in block)
