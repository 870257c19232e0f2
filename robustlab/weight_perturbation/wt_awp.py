"""Weighted truncated adversarial weight perturbation (Wu, Bojchevski, Huang, AAAI 2023, arXiv:2212.04983), algorithm 1.

    min_w  (1 - lam) L(w) + lam max_{v in V} L(w + v),     V = { v : ||v_l|| <= gamma ||w_l|| for l in S, v_l = 0 elsewhere }
    v_l = gamma * ||w_l|| * g_l / ||g_l||  for l in S,     g = dL/dw at w

    gamma   relative radius, without unit     lam   weight of the loss at the worst weights
    S       the perturbed layers: weights with more than one dimension, the last (the classifier's) left out

Both cure what the paper finds at large gamma: at w + v logits saturate and gradients vanish. *Weighted*: the loss at w itself
stays in the objective. *Truncated*: only some layers are perturbed, in their code all but the last. The gradient at w serves
twice, in v and in the mix, so a step costs what one of AWP does. Running statistics are updated by the pass at w + v, as in AWP.

The paper is about graph networks (lam 0.5 to 0.7, gamma 0.7 to 1); on images gamma is AWP's.
Differences from the authors' code: one ascent step, which is what their notebooks use (with k steps the direction would depend on
the learning rate 1 / k); they add 1e-5 to ||g_l||, which shrinks v where the gradient is small; they draw new dropout masks for
the second loss, here both losses see the same; weights are restored by copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from robustlab.modes import perturbed
from robustlab.outer import backward
from robustlab.registry import register
from robustlab.rng import Rng
from robustlab.types import Fraction, GradientRule, NonNegative, Shard, UserError
from robustlab.weight_perturbation.awp import matrices, worst


@register("wt-awp", cite="Wu, Bojchevski, Huang, AAAI 2023, arXiv:2212.04983")
class WtAwp(GradientRule):
    """A mix of the gradients at the weights and at the worst weights nearby, of chosen layers.

    The terms that it reports are mixed alike.

    Attributes:
        gamma: the radius as a share of each layer's norm.
        lam: the share of the gradient at the worst weights: 0 is plain training, 1 is AWP on the chosen layers.
        layers: names of the weights to perturb, with * and ?; empty means all that have more than one dimension.
        last: whether the model's last such weight may be among them.
    """

    gamma: NonNegative = 0.01
    lam: Fraction = 0.5
    layers: tuple[str, ...] = ()
    last: bool = False

    def __call__(self, f: nn.Module, loss: Any, shards: Sequence[Shard], rng: Rng) -> dict[str, Tensor]:
        here = backward(loss, shards, stats=False, sync=False)  # every trained parameter's .grad, of this process
        leaves = list(self.chosen(f).values())
        grads = loss.world.mean_([p.grad.clone() for p in leaves])
        for p in loss.outer.parameters():
            if p.grad is not None:
                p.grad.mul_(1 - self.lam)
        with perturbed(leaves, worst(leaves, grads, self.gamma)):
            there = backward(loss, shards, scale=self.lam)  # adds to .grad, then synchronises the sum
        return {name: (1 - self.lam) * here[name] + self.lam * there[name] for name in there}

    def chosen(self, f: nn.Module) -> dict[str, Tensor]:
        """The weights to perturb, by name.

        Raises:
            UserError: there are none.
        """
        known = matrices(f)
        for pattern in self.layers:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise UserError(f"{self.name}: layers: no weight matrix is called '{pattern}'; here are: {', '.join(known)}")
        chosen = {n: p for n, p in known.items() if not self.layers or any(fnmatchcase(n, pattern) for pattern in self.layers)}
        final = next(reversed(known))
        if list(chosen) == [final] and not self.last:
            raise UserError(f"{self.name}: only {final} is left and it is the last layer; set last: true to perturb it")
        return {n: p for n, p in chosen.items() if self.last or n != final}
