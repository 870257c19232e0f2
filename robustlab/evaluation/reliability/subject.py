"""The model under examination: some images, the passes spent on them, and attacks that no broken gradient can stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from robustlab import config, geometry, losses
from robustlab.evaluation.counting import Counter
from robustlab.modes import unwrap
from robustlab.rng import Rng
from robustlab.types import Classifier, Threat, one_hot

GRADIENT_CALLS = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


@dataclass
class Subject:
    """A classifier and the images to examine it on.

    Attributes:
        f: the classifier, counting; in eval mode.
        x: images (n, C, H, W) that it classifies correctly.
        labels: (n,).
        threat: where its robustness is claimed.
        rng: with one ticket for each image.
    """

    f: Counter
    x: Tensor
    labels: Tensor
    threat: Threat
    rng: Rng
    _once: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, f: Classifier, x: Tensor, labels: Tensor, threat: Threat, seed: int) -> Subject:
        rng = Rng(seed).child("reliability").at(torch.arange(len(x), device=x.device))
        return cls(Counter(f, unwrap(f)), x, labels, threat, rng)

    def once(self, key: Any, work: Callable[[], Any]) -> Any:
        """The result of ``work``, computed at the first call with this key."""
        if key not in self._once:
            self._once[key] = work()
        return self._once[key]

    @property
    def z(self) -> Tensor:
        """Logits (n, K) of the clean images."""
        return self.once("z", lambda: self.logits(self.x))

    @property
    def y(self) -> Tensor:
        """Targets (n, K)."""
        return one_hot(self.labels, self.z.shape[1], self.x.dtype)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        return self.f(x)

    def margin(self, x: Tensor) -> Tensor:
        """How far each image is on the wrong side (n,); positive where it is misclassified, or where the logits are no numbers."""
        m = losses.margin(self.logits(x), self.y)
        return torch.where(m.isnan(), torch.full_like(m, torch.inf), m)

    def differentiable(self, x: Tensor) -> Tensor:
        """As ``f``, with a gradient of zero where there is no way back to the images."""
        z = self.f(x)
        return z + 0 * x.flatten(1).sum(1, keepdim=True) if x.requires_grad and not z.requires_grad else z

    def slope(self, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The gradient of a loss with respect to the images as autograd has it; zero where there is no way back to them."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            try:
                z = self.f(x)
                found = torch.autograd.grad(loss(z, self.y).sum(), x, allow_unused=True)[0] if z.requires_grad else None
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                found = None
        return torch.zeros_like(x) if found is None else found.detach()

    def pgd(self, steps: int, radius: float | None = None, f: Classifier | None = None) -> Tensor:
        """Where PGD with ``steps`` steps ends, inside the ball and the box; ``radius`` other than the threat's if given."""
        norm, eps = self.threat.norm, self.threat.eps if radius is None else radius
        attack = config.build("attack", "pgd", norm=norm, eps=eps, steps=steps)
        return attack.run(f or self.differentiable, self.x, self.y, self.rng.child("pgd", steps, repr(eps)))[0].detach()

    def attacked(self, steps: int, radius: float | None = None) -> tuple[Tensor, Tensor]:
        """The end points of PGD and the margins there, computed once."""

        def work() -> tuple[Tensor, Tensor]:
            x_adv = self.pgd(steps, radius)
            return x_adv, self.margin(x_adv)

        return self.once(("pgd", steps, radius), work)

    def knows(self, steps: Sequence[int]) -> bool:
        """Whether PGD within the threat has run for all these numbers of steps."""
        return all(("pgd", k, None) in self._once for k in steps)

    def unbounded_radius(self) -> float:
        """A radius whose ball holds the whole box."""
        return float(geometry.norm_of(torch.ones_like(self.x[:1]), self.threat.norm))


class Smoothed:
    """The mean log-probabilities over ``draws`` uniform draws from the ball around each image: what flat spots and steps of the
    model hide from its gradient, the mean over a neighbourhood shows."""

    def __init__(self, subject: Subject, draws: int):
        self.subject, self.draws, self.calls = subject, draws, 0

    def __call__(self, x: Tensor) -> Tensor:
        s, total = self.subject, torch.zeros((), device=x.device, dtype=x.dtype)
        for i in range(self.draws):
            noise = geometry.sample_ball(x.detach(), s.threat.norm, s.threat.eps, s.rng.child("smoothed", self.calls, i))
            total = total + s.differentiable(x + noise).log_softmax(-1)
        self.calls += 1
        return total / self.draws


class Spy(TorchFunctionMode):
    """Counts, inside a forward without gradients, the operations that build a graph all the same and the calls that go back.

    Attributes:
        graph: operations with gradients switched on.
        calls: of ``autograd.grad`` and ``backward``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.graph += torch.is_grad_enabled()
        self.calls += func in GRADIENT_CALLS
        return func(*args, **(kwargs or {}))


def random_search(subject: Subject, queries: int) -> Tensor:
    """The margins (n,) after a random search that sees logits alone, ``queries`` forwards.

    In the manner of Square (Andriushchenko et al., ECCV 2020): it starts from random vertical stripes, then tries a square of
    random signs at a random place, smaller and smaller, and keeps it where the margin grows. It stops for no image.
    """
    norm, eps, x = subject.threat.norm, subject.threat.eps, subject.x
    _, c, h, w = x.shape
    size = torch.arange(h, device=x.device), torch.arange(w, device=x.device)

    def moved(delta: Tensor, shape: Tensor, reach: float) -> Tensor:
        unit = shape / geometry.norm_of(shape, norm).clamp_min(torch.finfo(x.dtype).tiny).view(-1, 1, 1, 1)
        return geometry.project(x + delta + reach * eps * unit, x, norm, eps) - x

    def signs(name: str, number: int, shape: tuple[int, ...]) -> Tensor:
        return subject.rng.child("search", name, number).bits(shape).bitwise_and(1).to(x.dtype) * 2 - 1

    delta = moved(torch.zeros_like(x), signs("stripes", 0, (c, 1, w)).expand(-1, -1, h, -1), 1.0)
    best = subject.margin(x + delta)
    for q in range(1, queries):
        side = max(1, round(min(h, w) * (0.8 * (1 - q / queries)) ** 0.5))
        u = subject.rng.child("search", "corner", q).uniform((2,))
        top, left = (u[:, 0] * (h - side + 1)).long(), (u[:, 1] * (w - side + 1)).long()
        rows = (size[0] >= top[:, None]) & (size[0] < top[:, None] + side)
        columns = (size[1] >= left[:, None]) & (size[1] < left[:, None] + side)
        window = (rows[:, None, :, None] & columns[:, None, None, :]) * signs("square", q, (c, 1, 1))
        new = moved(delta, window, 2.0)
        value = subject.margin(x + new)
        delta = torch.where((value > best).view(-1, 1, 1, 1), new, delta)
        best = torch.maximum(best, value)
    return best
