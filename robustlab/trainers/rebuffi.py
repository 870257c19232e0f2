"""TRADES with CutMix and weight averaging (Rebuffi et al., 2021, arXiv:2103.01946), sections 3 and 4.

    min_w  E[ CE(f(x~), y~) + beta * KL(softmax f(x~) || softmax f(x')) ],     beta = 6
    x~, y~ CutMix of the batch, one box for all, before the attack
    x'     10 steps of Adam on CE(f(x'), y~) from a uniform start: away from the mixed target, not from the prediction
    evaluated: EMA of the weights, decay 0.995 with the ramp min(0.995, (1 + t) / (10 + t))

BatchNorm normalises by batch statistics throughout; only the pass of the adversarial images updates the running ones, and the
average takes them from the live model. With extra data (``data.extra``: 0.7 of the batch, smoothing 0.1) they leave CutMix away:
``inner: [{name: craft, attack: {name: pgd-adam, loss: kl}, toward: clean}]``.

Micro-batches and processes are allowed, although CutMix couples the batch: theirs draws one box per worker too, of four.
Differences from the authors' code: theirs decays BatchNorm's statistics with 0.99, starting from the first batch's own; here that
is the model's momentum. Their weight decay, a part of the loss, is the optimizer's with decay_vectors false (theirs decays the last
layer's bias too).
"""

from __future__ import annotations

from robustlab.attacks.craft import Craft
from robustlab.attacks.pgd_adam import PgdAdam
from robustlab.averaging.ema import Ema
from robustlab.mixing.cutmix import CutMix
from robustlab.objectives.trades import TradesLoss
from robustlab.registry import register
from robustlab.types import Averaging, BnMode, GradientRule, Objective, Stage, Trainer
from robustlab.weight_perturbation.plain import Plain


@register("rebuffi", cite="Rebuffi, Gowal, Calian, Stimberg, Wiles, Mann, 2021, arXiv:2103.01946")
class Rebuffi(Trainer):
    """TRADES on CutMix images, evaluated with averaged weights."""

    fidelity = "code-verified"
    passes = "12 forwards, 10 input gradients, 2 backwards"

    inner: tuple[Stage, ...] = (CutMix(), Craft(attack=PgdAdam(steps=10, rate=0.1)))
    objective: Objective = TradesLoss(beta=6.0)
    gradient: GradientRule = Plain()
    averaging: Averaging | None = Ema(decay=0.995)
    attack_bn: BnMode = "train-noupdate"
    bn_updates: tuple[str, ...] = ("adv",)
    allow_shards: bool = True
