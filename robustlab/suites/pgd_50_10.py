"""PGD with 50 steps and 10 restarts, after Madry et al. (ICLR 2018, section 5), who used up to 100 steps and 20 restarts.

Step 2.5 eps / 50, uniform starts, cross-entropy. A sample that one start fools is not attacked again; the best point is kept.
"""

from __future__ import annotations

from robustlab.attacks.pgd import PGD
from robustlab.registry import register
from robustlab.types import Attack, Suite


@register("pgd-50-10", cite="Madry et al., ICLR 2018, arXiv:1706.06083")
class Pgd5010(Suite):
    """PGD, 50 steps of eps / 20, 10 restarts: a thorough search along one loss.

    Costs about 510 forwards and 500 backwards per sample that stays robust.
    """

    attacks: tuple[Attack, ...] = (PGD(steps=50, restarts=10, keep="best"),)
