"""Upper bounds on AutoAttack's robust accuracy, for a fraction of its passes.

    autoattack-fast    screen; survivors nearer than a tenth of a radius: all of AutoAttack; 60 others audited
    autoattack-quick   screen; survivors nearer than that: APGD-CE and targeted APGD-DLR
    screen             the screen alone: a monitor, for instance of a training

Most of AutoAttack's passes go into samples that nothing breaks. The screen (``robustlab explain screen``) breaks nearly all that
can be broken, and says of each survivor how far it is from that; those that a full budget would still break were the nearest in
trials. The others are believed, which an audit checks: a random sample of them gets the exact suite, every one that breaks counts
as broken, and from the number that did follows a bound on how many are left (one-sided, 95 %, hypergeometric).

A tenth: of the samples that a full budget broke and the screen did not, in trials before it was set, the farthest was at 0.012.
Square speculates, since near misses are few; it decides as it does one by one.

Behind the screen the draws are AutoAttack's own: a sample that it gives all of AutoAttack gets the verdict of AutoAttack with this
seed, or is broken by the screen already.
"""

from __future__ import annotations

from robustlab.attacks.screen import Screen
from robustlab.attacks.square import Square
from robustlab.registry import register
from robustlab.suites.autoattack import AutoAttack
from robustlab.types import Attack, BoundSuite, Positive, Whole


@register("autoattack-fast", cite="Croce, Hein, ICML 2020, arXiv:2003.01690")
class AutoAttackFast(BoundSuite):
    """A screen of all samples, AutoAttack's full budgets on the near misses, an audit of the rest: an upper bound.

    Costs 211 forwards and 219 backwards per sample that stays robust (ten classes), and AutoAttack's 7,800 and 1,900 for each near
    miss and each of the 60 audited.
    """

    exact: str = "autoattack"
    attacks: tuple[Attack, ...] = (Screen(), *AutoAttack.attacks[:3], Square(speculate=True, lookahead=16))
    near: Positive = 0.1
    audit: Whole = 60


@register("autoattack-quick", cite="Croce, Hein, ICML 2020, arXiv:2003.01690")
class AutoAttackQuick(BoundSuite):
    """A screen of all samples and APGD's full budgets on the near misses; no FAB, no Square: an upper bound, and not AutoAttack.

    Costs 211 forwards and 219 backwards per sample that stays robust (ten classes), and 1,010 more of each for a near miss.
    """

    exact: str = "autoattack"
    attacks: tuple[Attack, ...] = (Screen(), *AutoAttack.attacks[:2])
    near: Positive = 0.1


@register("screen", cite="Croce, Hein, ICML 2020, arXiv:2003.01690")
class ScreenAlone(BoundSuite):
    """The screen alone: a monitor for training, and an upper bound.

    Costs 211 forwards and 219 backwards per sample that stays robust (ten classes).
    """

    exact: str = "autoattack"
    attacks: tuple[Attack, ...] = (Screen(),)
