"""PGD adversarial training with early stopping (Rice, Wong, Kolter, ICML 2020, arXiv:2002.11569).

    min_w  E[ max_{|d| <= eps}  CE(f(x + d), y) ],     then the weights of the epoch that is most robust on held-out images

The step is that of ``pgd-at``: 10 steps of eps / 4 from a uniform start, in train mode (in l2 the paper steps 15/255 at 128/255, a
share of 0.117). What is theirs is the recipe, ``configs/cifar10/rice-at.yaml``: 200 epochs, the learning rate divided by 10 after a
half and three quarters, and ``best``, chosen by PGD on the validation split, in place of ``last``. Robust overfitting sets in after
the first drop of the learning rate and costs 8 to 9 points by the end; the closing line of every run shows it.

Differences from the authors' code: theirs runs two more forward passes in train mode, one to compare restarts of which there is
one and one for a log, and both update BatchNorm's running statistics; its l2 start has its radius uniform in [0, eps], ours is
uniform in the ball.
"""

from __future__ import annotations

from robustlab.registry import register
from robustlab.trainers.pgd_at import PgdAt


@register("rice-at", cite="Rice, Wong, Kolter, ICML 2020, arXiv:2002.11569")
class RiceAt(PgdAt):
    """PGD adversarial training, long, with the best epoch chosen on held-out images."""

    fidelity = "code-verified"
