"""PGD with 20 steps: the quick look at a model, not a verdict on it.

Step 2.5 eps / 20 (1/255 at 8/255), a uniform start, cross-entropy. Of the 20 points the best is kept, one that fools the classifier
before all others; papers that return the last point report slightly higher robust accuracies.
"""

from __future__ import annotations

from robustlab.attacks.pgd import PGD
from robustlab.registry import register
from robustlab.types import Attack, Suite


@register("pgd-20", cite="Madry et al., ICLR 2018, arXiv:1706.06083")
class Pgd20(Suite):
    """PGD, 20 steps of eps / 8, one start: quick, and blind to masked gradients.

    Costs about 20 forwards and 20 backwards per sample.
    """

    attacks: tuple[Attack, ...] = (PGD(steps=20, keep="best"),)
