"""Any attack of the package torchattacks (Kim, 2020, arXiv:2010.01950) under this package's threat model and seeds.

``eps``, ``norm``, ``seed`` and ``n_classes`` are handed over where the attack takes them. A step size ``alpha`` that is not given
is the package's own, in proportion to the radius: PGD's 2/255 at 8/255 becomes eps / 4. Around the attack: it sees a module without
weights; the generators of torch, NumPy and Python are forked and seeded; it computes in float32; what it returns is projected.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from robustlab.attacks.shield import Shielded, lawful, quarantine
from robustlab.attacks.steps import threat_of
from robustlab.registry import nearest, register
from robustlab.rng import Rng
from robustlab.types import Attack, Classifier, NonNegative, Norm, UserError

NORM_NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}
NORMS = {
    **dict.fromkeys(("CW", "PGDL2", "PGDRSL2", "DeepFool", "EADEN"), ("l2",)),
    **dict.fromkeys(("OnePixel", "Pixle", "JSMA", "SparseFool"), ("l0",)),
    **dict.fromkeys(("FAB", "APGD", "APGDT", "AutoAttack", "Square"), ("linf", "l2")),
    "EADL1": ("l1",),
    "VANILA": ("linf", "l2", "l1", "l0"),
}
RADII = ("eps", "max_epsilon")  # what constructors call the radius
FILLED = ("model", *RADII, "norm", "seed", "n_classes")


@register("torchattacks", cite="Kim, Torchattacks, 2020, arXiv:2010.01950")
class Torchattacks(Attack):
    """An attack of the package torchattacks, written ``torchattacks:PGD``; it needs that package installed.

    Attributes:
        norm, eps: the threat model; None takes the surrounding one. Attacks that look for a small perturbation of their own
            accord (CW, DeepFool, JSMA, ...) are projected on it.
        arch: the class in torchattacks: ``PGD``, ``MIFGSM``, ``Square``, ``CW``, ...
        options: its other arguments, such as ``{steps: 20, alpha: 0.01}``.
    """

    coupled = True
    norms = ("linf",)

    norm: Norm | None = None
    eps: NonNegative | None = None
    arch: str = "PGD"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = inspect.signature(self._make().__init__).parameters
        for name in self.options:
            if name not in known or name in FILLED:
                free = [k for k in known if k not in ("self", *FILLED)]
                raise ValueError(
                    f"options: torchattacks:{self.arch} takes no '{name}'{nearest(name, free)}; it takes {', '.join(free)}"
                )
        object.__setattr__(self, "norms", NORMS.get(self.arch, ("linf",)))
        super().__post_init__()

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        """As every attack; of y only the most probable class counts. ``info``: ``flags``, what it did that it should not.

        Raises:
            ValueError: the attack failed; its first line.
        """
        norm, eps = threat_of(self)
        if eps == 0 or len(x) == 0:
            return x.detach().clone(), {"flags": []}
        seed = rng.child("torchattacks").key % 2**31
        model = Shielded(f, x.dtype, torch.float32, x.device)
        with quarantine(seed), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            try:
                attack = self._make()(model, **self._arguments(norm, eps, seed, y.shape[-1]))
                x_adv = attack(x.detach().float(), y.argmax(-1))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of many types, few of them meant for the user
                raise ValueError(f"torchattacks:{self.arch} failed: {type(error).__name__}: {error}".splitlines()[0]) from error
        x_adv, flags = lawful(x_adv, x.detach(), norm, eps, f"torchattacks:{self.arch}")
        return x_adv, {"flags": flags}

    def _make(self) -> Callable[..., Any]:
        try:
            import torchattacks
        except ImportError:
            raise UserError("torchattacks is not installed: pip install 'robustlab[torchattacks]'") from None
        base = torchattacks.attack.Attack
        known = {n: c for n, c in vars(torchattacks).items() if isinstance(c, type) and issubclass(c, base)}
        known = {n: c for n, c in known.items() if n not in ("Attack", "MultiAttack", "LGV")}  # these attack nothing by themselves
        if self.arch not in known:
            raise ValueError(
                f"arch: torchattacks has no '{self.arch}'{nearest(self.arch, known)}; it has {', '.join(sorted(known))}"
            )
        return known[self.arch]

    def _arguments(self, norm: str, eps: float, seed: int, num_classes: int) -> dict[str, Any]:
        known = inspect.signature(self._make().__init__).parameters
        given = {"eps": eps, "max_epsilon": eps, "norm": NORM_NAMES.get(norm), "seed": seed, "n_classes": num_classes}
        if "alpha" in known and (radius := next((r for r in RADII if r in known), None)):
            given["alpha"] = known["alpha"].default * eps / known[radius].default
        return {name: value for name, value in given.items() if name in known} | dict(self.options)
