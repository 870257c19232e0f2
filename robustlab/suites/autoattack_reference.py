"""The standard AutoAttack of Croce and Hein (ICML 2020), run by its authors' code through the package pyautoattack.

APGD-CE, targeted APGD-DLR, targeted FAB, Square: 100 iterations and 5,000 queries; nine targets, or every other class where there
are fewer than ten.
"""

from __future__ import annotations

from robustlab.attacks.autoattack_reference import AutoAttackReference
from robustlab.registry import register
from robustlab.types import Attack, Suite


@register("autoattack-reference", cite="Croce, Hein, ICML 2020, arXiv:2003.01690")
class AutoAttackSuite(Suite):
    """The official AutoAttack, standard version: what robustness leaderboards rank by.

    Costs about 7,900 forwards and 1,900 backwards per sample that stays robust (ten classes).
    """

    attacks: tuple[Attack, ...] = (AutoAttackReference(),)
