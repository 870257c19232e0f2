"""The outer minimisation: a classifier with its trainer's loss and memory as one module.

``Outer`` owns the classifier and every part's state: its forward is the whole loss, its parameters are what is
trained, its ``state_dict`` is the checkpoint, and a distributed wrapper wraps it. The loss may be evaluated again (AWP,
SAM) for the same shard: same views, same taps, same noise, same dropout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustlab.modes import ambient, bn_mode, unwrap
from robustlab.rng import Rng
from robustlab.taps import tapped
from robustlab.types import (
    Alone,
    Context,
    Part,
    Shard,
    Tap,
    Term,
    Terms,
    Trainer,
    UserError,
    View,
    Views,
    World,
    is_part,
)


class Precise:
    """A classifier called in a precision: float32 as it is, bfloat16 under autocast; the logits come out in float32.

    The autocast cache stays off: it would keep low-precision copies of the weights from before a perturbation.
    """

    def __init__(self, module: nn.Module, precision: str = "fp32"):
        self.module = module
        self.precision = precision

    def __call__(self, x: Tensor) -> Tensor:
        if self.precision == "fp32":
            return self.module(x)
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return self.module(x).float()


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Forwards inside can be differentiated twice: compiled models run eager, attention takes its plain formula."""
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
        yield


def paths(part: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """The parts below a trainer with their paths, in an order that does not depend on values (schedules)."""
    if isinstance(part, tuple):
        for i, p in enumerate(part):
            yield from paths(p, f"{at}_{i}" if at else str(i))
    elif is_part(part):
        yield at, part
        for name in part.__dataclass_fields__:
            yield from paths(getattr(part, name), f"{at}_{name}" if at else name)


class Forward:
    """What losses call. Each view runs once per evaluation of the loss; later calls return the same logits."""

    def __init__(self, f: Precise, views: Views, rng: Rng, trainer: Trainer, stats: bool):
        self.rng = rng
        self._f, self._views, self._trainer, self._stats = f, views, trainer, stats
        self._logits: dict[str, Tensor] = {}
        self._features: dict[str, Tensor] = {}
        parts = (trainer.objective, *trainer.regularizers)
        self._wanted = {name for part in parts for name in part.features}

    def __call__(self, view: str | View, *, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (N, K) of a named view, or of a view made on the spot (its pass never updates statistics)."""
        if isinstance(view, View) or params is not None:
            chosen = view if isinstance(view, View) else self._view(view)
            with bn_mode(self._f, "train-noupdate"), tapped(self._f, chosen.taps):
                if params is None:
                    return self._f(chosen.x)
                functional = _Functional(self._f.module, params)
                return Precise(functional, self._f.precision)(chosen.x)  # type: ignore[arg-type]
        if view not in self._logits:
            self._run(view)
        return self._logits[view]

    def features(self, name: str) -> Tensor:
        """What the last linear layer was given for a named view (N, D); the part must list it in ``features``."""
        self(name)
        if name not in self._features:
            raise ValueError(f"the features of '{name}' were not kept: list the view in the part's `features`")
        return self._features[name]

    def _view(self, name: str) -> View:
        if name not in self._views:
            made = ", ".join(self._views)
            raise UserError(f"the loss asks for the view '{name}', but the stages made only: {made}")
        return self._views[name]

    def _run(self, name: str) -> None:
        group = next((g for g in self._trainer.joint if name in g), (name,))
        views = [self._view(n) for n in group]
        taps = views[0].taps
        if len(group) > 1 and any(v.taps for v in views):
            raise UserError(f"views with taps cannot share a pass: {', '.join(group)}")
        kept: list[Tensor] = []
        if self._wanted.intersection(group):
            taps = (*taps, Tap("features", lambda h: (kept.append(h), h)[1]))
        update = self._stats and any(n in self._trainer.bn_updates for n in group)
        with bn_mode(self._f, "train-update" if update else "train-noupdate"), tapped(self._f, taps):
            z = self._f(torch.cat([v.x for v in views]) if len(views) > 1 else views[0].x)
        sizes = [len(v) for v in views]
        self._logits.update(zip(group, z.split(sizes), strict=True))
        if kept:
            self._features.update(zip(group, kept[-1].flatten(1).split(sizes), strict=True))


class _Functional:
    def __init__(self, module: nn.Module, params: Mapping[str, Tensor]):
        self.module, self.params = module, dict(params)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.module, self.params, (x,))


class Outer(nn.Module):
    """Classifier, trainer and the state of its parts.

    Attributes:
        f: the classifier.
        state: the parts' memory, by their path in the trainer.
        trainer: the composition, its schedules resolved for the present epoch.
        loss: evaluates the whole loss of a shard; see ``types.Loss``.
    """

    def __init__(self, f: nn.Module, trainer: Trainer, ctx: Context, precision: str = "fp32", world: World | None = None):
        super().__init__()
        self.f = f
        self.callee = Precise(f, precision)
        self.trainer = trainer
        self.state = nn.ModuleDict({at: p.init_state(ctx) for at, p in paths(trainer) if hasattr(p, "init_state")})
        self.loss = OuterLoss(self, world or Alone())

    def call(self, part: Part, *args: Any) -> Any:
        """Call a part, with its state as last argument if it has one."""
        state = self.state_of(part)
        return part(*args) if state is None else part(*args, state)  # type: ignore[operator]

    def state_of(self, part: Part) -> nn.Module | None:
        if not hasattr(part, "init_state"):
            return None
        return next(self.state[at] for at, p in paths(self.trainer) if p is part)

    def forward(self, views: Views, rng: Rng, stats: bool) -> tuple[Tensor, Terms]:
        """The total loss () and its named terms."""
        forward = Forward(self.callee, views, rng.child("loss"), self.trainer, stats)
        parts = (self.trainer.objective, *self.trainer.regularizers)
        terms: Terms = {}
        with twice_differentiable() if any(p.double_backward for p in parts) else contextlib.nullcontext():
            for part in parts:
                for name, term in self.call(part, forward, views).items():
                    if name in terms:
                        raise UserError(f"two losses name a term '{name}'; a regularizer stands twice?")
                    terms[name] = term
        return total(terms), terms

    def commit(self) -> None:
        """Let the parts with memory write, once per step."""
        for at, part in paths(self.trainer):
            if hasattr(part, "commit"):
                part.commit(self.state[at], self.loss.world)

    def average(self) -> None:
        """Update the averaged weights."""
        averaging = self.trainer.averaging
        if averaging is not None:
            averaging.update(self.state_of(averaging), self.f)  # type: ignore[arg-type]

    def averaged(self) -> nn.Module:
        """What is evaluated and exported: the averaged model, or the live one."""
        averaging = self.trainer.averaging
        if averaging is None:
            return self.f
        return averaging.averaged(self.state_of(averaging), self.f)  # type: ignore[arg-type]


def total(terms: Terms) -> Tensor:
    """sum of coef * mean(weight * value); the only place where losses are reduced."""
    if not terms:
        raise UserError("the objective returned no terms")
    return torch.stack([reduce(t) for t in terms.values()]).sum()


def reduce(term: Term) -> Tensor:
    value = term.value if term.weight is None else term.value * term.weight
    return term.coef * value.mean()


class OuterLoss:
    """The loss of a shard, evaluated as often as a gradient rule wants.

    ``sync=True`` goes through the distributed wrapper, so that the backward that follows synchronises gradients, except inside
    :meth:`no_sync`. ``stats=False`` leaves BatchNorm's running statistics alone.
    """

    def __init__(self, outer: Outer, world: World):
        self._outer, self.world = (outer,), world  # in a tuple: a module must not become its own child
        self.wrapped: Any = None

    @property
    def outer(self) -> Outer:
        return self._outer[0]

    def __call__(self, shard: Shard, *, stats: bool, sync: bool) -> tuple[Tensor, Terms]:
        views, rng = shard
        outer = self.outer
        call = self.wrapped if sync and self.wrapped is not None else outer
        with ambient(rng.batch_seed()):
            return call(views, rng, stats)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        return self.wrapped.no_sync() if self.wrapped is not None else contextlib.nullcontext()


def gradient_at(loss: Any, shards: Sequence[Shard], leaves: Sequence[Tensor], only: Sequence[str] = ()) -> list[Tensor]:
    """The gradient of the mean loss over the shards at ``leaves``, averaged over the processes.

    ``.grad`` and BatchNorm's statistics stay as they are. ``only`` selects terms by name.
    """
    out: list[Tensor] = []
    for shard in shards:
        value, terms = loss(shard, stats=False, sync=False)
        if only:
            value = total({k: t for k, t in terms.items() if k in only})
        grads = torch.autograd.grad(value / len(shards), leaves, allow_unused=True, materialize_grads=True)
        out = [o + g for o, g in zip(out, grads, strict=True)] if out else list(grads)
    return out if loss.world.size == 1 else list(loss.world.mean_([g.clone() for g in out]))  # in place: autograd may share memory


class SampleForward:
    """What losses call while one sample is looked at alone: other weights, the running statistics of BatchNorm."""

    def __init__(self, f: nn.Module, params: Mapping[str, Tensor], views: Views, rng: Rng):
        self.rng = rng
        self._f, self._module, self._views = _Functional(f, params), f, views
        self._logits: dict[str, Tensor] = {}
        self._features: dict[str, Tensor] = {}

    def __call__(self, view: str | View, *, params: Mapping[str, Tensor] | None = None) -> Tensor:
        if isinstance(view, View):
            return self._f(view.x)
        if view not in self._logits:
            kept: list[Tensor] = []
            with tapped(self._module, (Tap("features", lambda h: (kept.append(h), h)[1]),)):
                self._logits[view] = self._f(self._views[view].x)
            self._features[view] = kept[-1].flatten(1)
        return self._logits[view]

    def features(self, name: str) -> Tensor:
        self(name)
        return self._features[name]


def sample_gradient_norms(loss: Any, shard: Shard, chunk: int = 32) -> Tensor:
    """The Euclidean length (N,) of the gradient of each sample's own loss at the trained weights, exactly.

    Each sample is taken alone, in the precision of the weights, by the running statistics of BatchNorm and without dropout. Its
    loss is the sum of the terms that have one value for each sample, without the samples' weights. Where a layer is perturbed or
    mixed, or a loss contains a gradient, samples cannot be taken alone: then each costs a backward pass through the whole batch,
    as it is in the step.

    Args:
        loss: of the step.
        shard: its views and randomness.
        chunk: how many gradients are held in memory at once.

    Raises:
        UserError: every term couples the batch.
    """
    views, rng = shard
    outer = loss.outer
    parts = (outer.trainer.objective, *outer.trainer.regularizers)
    if any(v.taps for v in views.values()) or any(p.double_backward for p in parts):
        return _row_gradient_norms(loss, shard, chunk)
    params = {name: p.detach() for name, p in outer.f.named_parameters() if p.requires_grad}
    rows = {name: _rows(view) for name, view in views.items()}

    def value(params: Mapping[str, Tensor], row: dict[str, dict[str, Tensor]]) -> Tensor:
        one = {name: View(**{k: v[None] for k, v in fields.items()}) for name, fields in row.items()}  # type: ignore[arg-type]
        forward = SampleForward(outer.f, params, one, rng.child("loss"))
        terms = [t for part in parts for t in outer.call(part, forward, one).values()]
        return sample_losses(terms).sum()

    def length(row: dict[str, dict[str, Tensor]]) -> Tensor:
        grads = torch.func.grad(value)(params, row)
        return torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()

    with bn_mode(outer.f, "eval"), twice_differentiable():
        return torch.func.vmap(length, chunk_size=chunk)(rows).detach()


def _row_gradient_norms(loss: Any, shard: Shard, chunk: int) -> Tensor:
    _, terms = loss(shard, stats=False, sync=False)
    each, leaves = sample_losses(list(terms.values())), [p for p in loss.outer.f.parameters() if p.requires_grad]

    def length(row: Tensor) -> Tensor:
        grads = torch.autograd.grad(each, leaves, row, retain_graph=True, allow_unused=True)
        return torch.stack([g.square().sum() for g in grads if g is not None]).sum().sqrt()

    with twice_differentiable():
        return torch.func.vmap(length, chunk_size=chunk)(torch.eye(len(each), dtype=each.dtype, device=each.device)).detach()


def _rows(view: View) -> dict[str, Tensor]:
    return {k: v for k in ("x", "y", "key", "index", "weight") if (v := getattr(view, k)) is not None}


def sample_losses(terms: Sequence[Term]) -> Tensor:
    """Each sample's own loss (N,): the terms that have one value for each sample, without the samples' weights."""
    own = [t.coef * t.value for t in terms if t.value.ndim]
    if not own:
        raise UserError("the gradient of each sample: every term of this loss couples the batch")
    return torch.stack(own).sum(0)


def weighted(terms: Terms, share: Tensor) -> Terms:
    """The terms with every sample's values multiplied by its share (N,); terms that couple the batch stay as they are."""
    both = {k: share if t.weight is None else share * t.weight for k, t in terms.items()}
    return {k: replace(t, weight=both[k]) if t.value.ndim else t for k, t in terms.items()}


def backward(
    loss: Any,
    shards: Sequence[Shard],
    *,
    scale: float = 1.0,
    stats: bool = True,
    sync: bool = True,
    shares: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of ``scale`` times the mean loss to ``.grad``, synchronised once.

    ``shares`` (N,) for each shard multiply the samples' losses.

    Returns:
        The named terms' values and ``"loss"``, detached, averaged over the shards.
    """
    out: dict[str, Tensor] = {}
    for i, shard in enumerate(shards):
        last = i == len(shards) - 1
        with contextlib.nullcontext() if last and sync else loss.no_sync():
            value, terms = loss(shard, stats=stats, sync=True)
            if shares is not None:
                terms = weighted(terms, shares[i])
                value = total(terms)
            (value * (scale / len(shards))).backward()
        for name, v in {"loss": value, **{k: reduce(t) for k, t in terms.items()}}.items():
            out[name] = out.get(name, 0.0) + v.detach() / len(shards)
    return out


def context_of(f: nn.Module, num_classes: int, num_samples: int, image_shape: tuple[int, int, int], **more: Any) -> Context:
    return Context(f=unwrap(f), num_classes=num_classes, num_samples=num_samples, image_shape=image_shape, **more)
