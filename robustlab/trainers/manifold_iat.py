"""Interpolated adversarial training with manifold mixup (Lamb, Verma et al., Neural Networks 154, 2022).

    min_w  1/2 E[ CE(f_k(x), y~) ] + 1/2 E[ CE(f_k'(x'), y~') ],    f_k mixes what layer k gives, as IAT mixes images

The layer is drawn anew for each half of each step. On a PreAct-ResNet use ``sites: [input, layer1, layer2]``, the layers of
the manifold mixup paper; the default names places that every net has. alpha = 2 is that paper's too.
"""

from __future__ import annotations

from robustlab.attacks.craft import Craft
from robustlab.attacks.pgd import PGD
from robustlab.mixing.manifold_mixup import ManifoldMixup
from robustlab.registry import register
from robustlab.trainers.iat import Iat
from robustlab.types import Stage


@register("manifold-iat", cite="Lamb, Verma et al., Neural Networks 154, 2022, arXiv:1906.06784")
class ManifoldIat(Iat):
    """Trains on clean and adversarial images that are mixed at a random layer, half and half."""

    inner: tuple[Stage, ...] = (
        Craft(attack=PGD(steps=7, rel_step=0.25)),
        ManifoldMixup(alpha=2.0, on="clean", to="clean_mix"),
        ManifoldMixup(alpha=2.0, on="adv", to="adv_mix"),
    )
