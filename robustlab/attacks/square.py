"""Square attack (Andriushchenko, Croce, Flammarion, Hein, ECCV 2020; l1: Croce and Hein, ICML 2021): random search, no gradients.

    x_0 = a striped (linf) or tiled (l2, l1) perturbation of radius eps
    each query proposes a change in a random square window of side s; it is kept where the margin z_c - max_{k != c} z_k falls
    s       = sqrt(p H W) rounded; p = p_init, halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 queries
    linf    the window becomes x + eps r, r = -1 or 1 for each channel
    l2, l1  the perturbation in a second window moves into the first one, where it is added to a peaked pattern of random sign and
            orientation; what the box has taken from the radius goes there too; then the radius is restored (l1: projected)

A query costs one forward pass. It is a comparison of numbers: the classifier may be anything that takes a tensor.

``speculate``: each sample walks the same sequence at its own pace. As many proposals as it has refused in a row, and one, are
judged in one forward pass; the first that is better counts, those behind it were in vain. Decisions are those of one by one.

Differences from the authors' code:

- Windows, signs and orientations are drawn for every sample; theirs are shared by the batch.
- Windows reach the last row and column; theirs stop one short of both.
- A proposal that changes nothing, because the window has that value already, is not evaluated. It could not be kept.
- A margin that falls by rounding alone (64 units in the last place) has not fallen. Many proposals change nothing that the
  classifier sees; whether they are kept would otherwise depend on how the batch was cut.
- Images that are not square, of any size and number of channels: the tiles of the start are min(H, W) // 5 wide, at least 1,
  as many as fit, centred. Theirs fails for some sizes, such as 12 x 12.
- No clean pass, and none at the end.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from robustlab.attacks import square_ahead, square_proposals, square_walk
from robustlab.attacks.steps import passes, threat_of
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, Count, Fraction, NonNegative, Norm

SCHEDULE = 10_000  # queries that the window sizes were made for
LOOKAHEAD = 16  # proposals judged at once where a pass takes hardly longer for them than for one


@register("square", cite="Andriushchenko, Croce, Flammarion, Hein, ECCV 2020, arXiv:1912.00049")
class Square(Attack):
    """Square attack: random search with square patches; sees nothing but the logits.

    Costs at most ``queries + 1`` forward passes; a sample stops costing once it is fooled. ``info["queries"]`` (N,) counts the
    points that were compared; with ``speculate`` more rows than these go forward.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one.
        queries: proposals for each sample.
        p_init: the share of the image that the first windows cover.
        speculate: judge several proposals of a sample at once. The same results from a fraction of the forward passes, larger
            ones, with more rows in all: worth it where few samples are left to fill a pass. On a GPU it always does: a pass
            takes as long there for one row as for hundreds.
        lookahead: how many proposals at once, at most; None: 16 (a fifth of the passes, about a sixth more rows).
        rows: images in one pass when speculating, at most (but one sample's proposals stay together); None: as many as there are
            samples.
        rescale: run through the schedule of window sizes, which was made for 10,000 queries, in the queries there are; AutoAttack
            does not.
    """

    norms = ("linf", "l2", "l1")

    norm: Norm | None = None
    eps: NonNegative | None = None
    queries: Count = 5000
    p_init: Fraction = 0.8
    speculate: bool = dataclasses.field(default=False, compare=False)  # how, not what: verdicts are the same
    lookahead: Count | None = dataclasses.field(default=None, compare=False)
    rows: Count | None = dataclasses.field(default=None, compare=False)
    rescale: bool = False

    @torch.no_grad()
    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        norm, eps = threat_of(self)
        x = x.detach()
        out = square_proposals.start(x, norm, eps, rng.child("start"))
        c = y.argmax(1, keepdim=True)
        value, miss = square_walk.judge(f, out, c)
        row = (~miss).nonzero().squeeze(1)
        cost = passes(x, 1, 0)
        asked = cost[:, 0].clone()
        base = square_proposals.ground(x[row], norm, eps)
        s = square_walk.Search(row, base, c[row], out[row], value[row], out, cost, asked)
        how = square_walk.How(norm, eps, self.queries, self.p_init, SCHEDULE / self.queries if self.rescale else 1.0, rng)
        if self.speculate or x.device.type != "cpu":
            square_ahead.ahead(f, s, how, self.rows or len(x), self.lookahead or LOOKAHEAD)
        else:
            square_walk.in_step(f, s, how)
            asked = cost[:, 0]
        out[s.row] = s.best
        return out, {"passes": cost, "queries": asked}
