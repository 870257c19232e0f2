"""AutoAttack (Croce and Hein, ICML 2020; l1: ICML 2021), by our own attacks: the algorithms and budgets of the paper.

    autoattack        APGD-CE, targeted APGD-DLR, targeted FAB, Square                  100 steps, 5000 queries
    autoattack-plus   APGD-CE x 5, APGD-DLR x 5, FAB x 5, Square, targeted APGD-DLR, targeted FAB
    autoattack-rand   APGD-CE, APGD-DLR with gradients averaged over 20 passes: for classifiers that draw at random

Targets: the nine most likely wrong classes, or all of them where there are fewer. In l1 APGD-CE runs five times and the targeted
one has five targets, each run in three shrinking balls. Passes for a sample that stays robust (ten classes, linf or l2), and
those of the authors' code, which also passes the clean image at the start of each attack and target, and the result at the end:

                   ours, forward / backward     theirs
    APGD-CE            101 /   101              102 /   101
    APGD-T             910 /   909              919 /   909
    FAB-T            1,801 /   900            1,828 /   900
    Square           5,001 /     0            5,003 /     0      ours less one for each proposal that changes nothing
    FAB x 5          1,001 / 4,500            1,011 / 5,000      one of ten differences of logits is zero

A sample leaves an attack as soon as it is fooled. All draws are keyed by the sample: no verdict depends on batches, shards or
resuming.
"""

from __future__ import annotations

from robustlab.attacks.apgd import APGD
from robustlab.attacks.apgd_t import APGDTargeted
from robustlab.attacks.fab import FAB
from robustlab.attacks.square import Square
from robustlab.registry import register
from robustlab.types import Attack, Suite


@register("autoattack", cite="Croce, Hein, ICML 2020, arXiv:2003.01690")
class AutoAttack(Suite):
    """AutoAttack, standard version: four attacks with their published budgets, none with a parameter to tune.

    Costs about 7,800 forwards and 1,900 backwards per sample that stays robust (ten classes), and little for others.
    """

    attacks: tuple[Attack, ...] = (APGD(), APGDTargeted(), FAB(targeted=True), Square())


@register("autoattack-plus", cite="Croce, Hein, ICML 2020, arXiv:2003.01690")
class AutoAttackPlus(Suite):
    """AutoAttack, plus version: five restarts, and the untargeted attacks too.

    Costs about 9,700 forwards and 7,300 backwards per sample that stays robust (ten classes).
    """

    attacks: tuple[Attack, ...] = (
        APGD(restarts=5),
        APGD(loss="dlr", restarts=5),
        FAB(restarts=5),
        Square(),
        APGDTargeted(n_targets=9),
        FAB(targeted=True),
    )


@register("autoattack-rand", cite="Croce, Hein, ICML 2020, arXiv:2003.01690")
class AutoAttackRand(Suite):
    """AutoAttack, version for classifiers with random components: gradients are averaged over 20 passes.

    Costs 4,040 forwards and backwards per sample that stays robust. One draw decides the final verdict.
    """

    attacks: tuple[Attack, ...] = (APGD(restarts=1, eot=20), APGD(loss="dlr", restarts=1, eot=20))
