"""The words of robustlab: views, taps, terms, parts, threat models, and the classifier contract.

A classifier maps images in [0, 1] of shape (N, C, H, W) to logits (N, K); normalisation is its first layer.
A target ``y`` is a matrix of class probabilities (N, K); integer labels become one-hot at the door.
Every configurable thing is a *part*: a frozen dataclass whose fields are its configuration. The base classes below
say what each kind of part must be able to do; the registry finds them by name.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from robustlab.modes import frozen
from robustlab.rng import Rng

Norm = Literal["linf", "l2", "l1", "l0"]
BnMode = Literal["eval", "train-noupdate", "train-update"]
Fidelity = Literal["code-verified", "paper-verified", "reconstructed"]

# Ranges that fields use; pydantic reads the annotations, nothing else does.
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
OpenFraction = Annotated[float, Ge(0), Lt(1)]
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]

Classifier = Callable[[Tensor], Tensor]


class UserError(ValueError):
    """Something the user gave is wrong: one clear line each, never a traceback. The command line exits with 2."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


# ----------------------------------------------------------------------------------------------------------- threats


@dataclass(frozen=True)
class Threat:
    """What the adversary may do to an image.

    Attributes:
        norm: the p-norm of the perturbation.
        eps: its radius, in units of [0, 1] pixels (``8/255`` is accepted in YAML).
    """

    norm: Norm = "linf"
    eps: float = 8 / 255
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_radius(self.norm, self.eps)


def check_radius(norm: str, eps: float | None) -> None:
    """Raise ``ValueError`` unless ``eps`` is a possible radius of ``norm`` for pixels in [0, 1]."""
    if eps is None or not isinstance(eps, int | float):
        return
    if not math.isfinite(eps) or eps < 0:
        raise ValueError(f"eps must be a finite number >= 0, got {eps}")
    if norm == "linf" and eps > 1:
        raise ValueError(f"eps is in [0, 1] pixel units: for linf {eps:g} is more than the whole range; did you mean {eps:g}/255?")


# ------------------------------------------------------------------------------------------------------- views, terms


@dataclass(frozen=True)
class Tap:
    """A function that acts inside one forward pass.

    Attributes:
        site: the name of a layer (a unique dotted suffix is enough), or ``"input"``, or ``"features"`` (what the last
            linear layer is given).
        fn: acts on the layer's output or its first input, which arrive in float32, or on ``(args, kwargs)`` as they are.
        where: ``"output"``, ``"input"`` or ``"kwargs"``.
    """

    site: str
    fn: Callable[..., Any]
    where: Literal["output", "input", "kwargs"] = "output"


@dataclass(frozen=True)
class View:
    """One version of the batch.

    Attributes:
        x: images (N, C, H, W) in [0, 1].
        y: class probabilities (N, K).
        key: tickets (N,), int64: the samples' positions in the seeded sample stream. Random draws are keyed by them.
        index: positions in the data set (N,), int64, for stores; None where rows are no longer samples.
        weight: per-sample loss weights (N,), or None.
        taps: what acts inside a forward of this view.
        info: by-products of a stage, such as the attack's last gradient.
    """

    x: Tensor
    y: Tensor
    key: Tensor
    index: Tensor | None = None
    weight: Tensor | None = None
    taps: tuple[Tap, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)


Views = dict[str, View]


@dataclass(frozen=True)
class Term:
    """A named piece of the loss. Only ``Outer`` reduces it, to ``coef * mean(weight * value)``.

    Attributes:
        value: per-sample losses (N,), or a scalar () for losses that couple the batch.
        coef: its coefficient.
        weight: per-sample weights (N,), not renormalised.
    """

    value: Tensor
    coef: float = 1.0
    weight: Tensor | None = None


Terms = dict[str, Term]
Shard = tuple[Views, Rng]  # one micro-batch and its randomness


@dataclass(frozen=True)
class Context:
    """What a part with memory is given to make its state.

    Attributes:
        f: the classifier in training.
        num_classes: K.
        num_samples: size of the training set.
        image_shape: (C, H, W).
        create_model: builds another model from a name and keyword arguments.
        batch_size: images per optimizer step, over all processes and micro-batches; None where there is no loop.
        steps, epochs: length of the whole run in optimizer steps and in epochs; None outside a run.
    """

    f: nn.Module
    num_classes: int
    num_samples: int
    image_shape: tuple[int, int, int]
    create_model: Callable[..., nn.Module] | None = None
    batch_size: int | None = None
    steps: int | None = None
    epochs: int | None = None


@runtime_checkable
class World(Protocol):
    """The processes that train together. On one process every method is the identity."""

    rank: int
    size: int

    def mean_(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Average the tensors over the processes, in place."""
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensor over the processes along the first dimension."""
        ...


class Alone:
    """The world of a single process."""

    rank = 0
    size = 1

    def mean_(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor


class Forward(Protocol):
    """How losses call the classifier; see ``robustlab.outer.Forward``."""

    rng: Rng

    def __call__(self, view: str | View, *, params: Mapping[str, Tensor] | None = None) -> Tensor: ...

    def features(self, name: str) -> Tensor: ...


class Loss(Protocol):
    """The whole loss of one micro-batch. It may be evaluated again: same taps, same noise, same dropout."""

    world: World

    def __call__(self, shard: Shard, *, stats: bool, sync: bool) -> tuple[Tensor, Terms]: ...


# -------------------------------------------------------------------------------------------------------------- parts


class Part:
    """Base of everything that has a name in a configuration: a frozen dataclass, registered under its kind.

    A part with memory defines ``init_state(ctx) -> nn.Module``; it then gets that module as its last argument, may read
    it and stage values in it, and writes only in ``commit(state, world)``, once per step.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""  # set by the registry
    cite: ClassVar[str] = ""  # set by the registry


class Attack(Part):
    """Searches for a perturbation. Subclasses define :meth:`run`.

    Attributes:
        norm, eps: the threat model; ``None`` takes the one of the surrounding configuration.
        coupled: True when the result for a sample depends on the other samples of its batch.
        minimal: True for attacks that look for the smallest perturbation. They need no eps (``info["distance"]`` (N,) is the norm
            found, infinite where nothing was); with one they return a point of its ball.
    """

    kind: ClassVar[str] = "attack"
    coupled: ClassVar[bool] = False
    minimal: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    norm: Norm | None
    eps: float | None

    def __post_init__(self) -> None:
        if self.norm is not None and self.norm not in self.norms:
            raise ValueError(f"{self.name}: norm '{self.norm}' is not supported; expected one of {', '.join(self.norms)}")
        check_radius(self.norm or "", self.eps)

    def run(self, f: Classifier, x: Tensor, y: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Any]]:
        """Attack a batch.

        Args:
            f: the classifier, in the mode in which it is to be attacked.
            x: images (N, C, H, W) in [0, 1].
            y: class probabilities (N, K).
            rng: randomness bound to the samples' tickets.

        Returns:
            The adversarial images and a dict of by-products (``grad``: the last input gradient (N, C, H, W) if the attack
            computed one; whatever else the attack documents).
        """
        raise NotImplementedError

    def __call__(self, f: Classifier, x: Tensor, y: Tensor, *, seed: int = 0, index: Tensor | None = None) -> Tensor:
        """Attack images and return the adversarial ones.

        Args:
            f: classifier; put it in eval mode first.
            x: images (N, C, H, W) in [0, 1], floating point.
            y: labels (N,) or probabilities (N, K).
            seed: of all draws.
            index: (N,) identities of the samples, by which draws are keyed; 0, 1, 2, ... if not given.

        Raises:
            ValueError: images outside [0, 1] or not four-dimensional, labels out of range, no radius.
        """
        if self.norm is None or (self.eps is None and not self.minimal):
            raise ValueError(f"{self.name}: give norm and eps, for example norm='linf', eps=8/255")
        check_images(x)
        if isinstance(f, nn.Module) and f.training:
            warnings.warn(f"{self.name}: the model is in training mode; call model.eval() first", stacklevel=2)
        if len(x) == 0:
            return x.clone()
        with frozen(f):
            if y.ndim == 1:
                with torch.no_grad():
                    y = one_hot(y, f(x[:1]).shape[-1], x.dtype)
            tickets = torch.arange(len(x), device=x.device) if index is None else index
            return self.run(f, x, y, Rng(seed).child("attack", self.name).at(tickets))[0]


class Stage(Part):
    """Turns views into views: crafting, mixing, augmenting, refining labels. Fields ``on`` and ``to`` name views.

    Attributes:
        crafts: True where it is the inner maximisation, so that another attack could stand in its place.
        mixes: True where a row of the new view is no longer the sample of that row.
        taps: True where the new view has perturbed or mixed layers.
    """

    kind: ClassVar[str] = "stage"
    crafts: ClassVar[bool] = False
    coupled: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    taps: ClassVar[bool] = False

    def __call__(self, f: Classifier, views: Views, rng: Rng) -> Views:
        raise NotImplementedError


class Objective(Part):
    """The main loss: ``(forward, views) -> {name: Term}``, pure."""

    kind: ClassVar[str] = "objective"
    coupled: ClassVar[bool] = False
    pairs: ClassVar[bool] = True  # compares the views in its fields `clean` and `adv` row by row
    features: ClassVar[tuple[str, ...]] = ()  # views whose pre-logits are needed
    double_backward: ClassVar[bool] = False

    def __call__(self, forward: Forward, views: Views) -> Terms:
        raise NotImplementedError


class Regularizer(Objective):
    """A further loss, added to any objective."""

    kind: ClassVar[str] = "regularizer"


class GradientRule(Part):
    """Fills ``.grad``: at the weights, at the worst weights nearby, as a mix of both, or per shard."""

    kind: ClassVar[str] = "gradient"

    def __call__(self, f: nn.Module, loss: Loss, shards: Sequence[Shard], rng: Rng) -> dict[str, Tensor]:
        """Returns the named terms' values, detached, averaged over the shards; ``"loss"`` is their total."""
        raise NotImplementedError


class Averaging(Part):
    """What is evaluated instead of the live weights.

    A part with a field ``refresh`` gets BatchNorm statistics of its own, from that many training batches, before each look.
    """

    kind: ClassVar[str] = "averaging"

    def init_state(self, ctx: Context) -> nn.Module:
        raise NotImplementedError

    def update(self, state: nn.Module, f: nn.Module) -> None:
        """Called after each optimizer step."""
        raise NotImplementedError

    def averaged(self, state: nn.Module, f: nn.Module) -> nn.Module:
        """The module to evaluate, export and rank."""
        raise NotImplementedError


class Schedule(Part):
    """A number that depends on time."""

    kind: ClassVar[str] = "schedule"

    def at(self, epoch: float, epochs: float) -> float:
        """The value after ``epoch`` of ``epochs`` epochs (fractions allowed)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Trainer(Part):
    """A training method: a named composition. One paper is one subclass that sets the defaults.

    Attributes:
        inner: stages run once per step, in order: ``x~ = mix(x); x' = argmax L(f(x~ + d), y~)``.
        objective: the loss on the views that the stages left.
        regularizers: further losses, added up.
        gradient: where the gradient is taken (plain, AWP, ...).
        averaging: what is evaluated instead of the live weights (EMA), or none.
        attack_bn: BatchNorm mode during ``inner``.
        bn_updates: the views whose forward passes update BatchNorm's running statistics.
        joint: groups of views that share one forward pass, and so their batch statistics.
        replays: optimizer steps on each batch, which stays as it is: its augmentation, mixing and dropout too.
        allow_shards: accept micro-batches or several processes although a part couples the batch.
    """

    kind: ClassVar[str] = "trainer"
    fidelity: ClassVar[Fidelity] = "reconstructed"
    passes: ClassVar[str] = ""  # cost per sample, in the words of `explain`

    inner: tuple[Stage, ...] = ()
    objective: Objective
    regularizers: tuple[Regularizer, ...] = ()
    gradient: GradientRule
    averaging: Averaging | None = None
    attack_bn: BnMode = "eval"
    bn_updates: tuple[str, ...] = ("clean",)
    joint: tuple[tuple[str, ...], ...] = ()
    replays: Count = 1
    allow_shards: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "fidelity" not in cls.__dict__:  # what verifies a method does not verify what is made from it
            cls.fidelity = "reconstructed"

    def __post_init__(self) -> None:
        rows: dict[str, object] = {"clean": None}  # which samples the rows of each view are: the stage that last mixed them
        tapped: set[str] = set()  # views whose layers are perturbed or mixed: their rows are tied to their places
        for i, stage in enumerate(self.inner):
            on, to = getattr(stage, "on", "clean"), getattr(stage, "to", "clean")
            self._check(f"inner.{i}.on", on, set(rows))
            if on in tapped and (stage.mixes or (stage.crafts and not stage.taps)):
                raise ValueError(f"inner.{i}: {stage.name} cannot work on the view '{on}', which has perturbed or mixed layers")
            rows[to] = i if stage.mixes else rows.get(on)
            tapped = tapped | {to} if stage.taps or on in tapped else tapped - {to}
        views = set(rows)
        for where, part in [("objective", self.objective), *((f"regularizers.{i}", r) for i, r in enumerate(self.regularizers))]:
            for name in ("on", "clean", "adv"):
                self._check(f"{where}.{name}", getattr(part, name, ()), views)
            clean, adv = getattr(part, "clean", None), getattr(part, "adv", None)
            if part.pairs and isinstance(clean, str) and isinstance(adv, str) and rows[clean] != rows[adv]:
                raise ValueError(
                    f"{where}: {part.name} compares the views '{clean}' and '{adv}' row by row, but they were mixed apart; "
                    "mix before the attack, or name other views"
                )
        self._check("gradient.on", getattr(self.gradient, "on", ()), views)
        self._check("bn_updates", self.bn_updates, views)
        for group in self.joint:
            self._check("joint", group, views)
            if len(group) > 1 and tapped.intersection(group):
                raise ValueError(f"joint: {', '.join(group)} cannot share a pass: one has perturbed or mixed layers")

    def _check(self, where: str, wanted: str | tuple[str, ...], views: set[str]) -> None:
        for name in (wanted,) if isinstance(wanted, str) else wanted:
            if name not in views:
                made = ", ".join(sorted(views))
                raise ValueError(f"{where} asks for the view '{name}', but the stages make only: {made}")

    def at(self, epoch: float, epochs: float) -> Trainer:
        """This trainer with every scheduled number at its value of that time."""
        return resolve_schedules(self, epoch, epochs)


@dataclass(frozen=True, kw_only=True)
class Model(Part):
    """An architecture: ``build()`` makes the classifier, its normalisation inside.

    Attributes:
        init: weights to start from: a checkpoint or state-dict file, ``pretrained`` where the source has such weights, or None.
    """

    kind: ClassVar[str] = "model"

    init: str | None = None

    def build(self) -> nn.Module:
        raise NotImplementedError


class Corruption(Part):
    """A common corruption: ``(x, severity, rng) -> x``, batched, seeded, on the device of ``x``."""

    kind: ClassVar[str] = "corruption"

    def __call__(self, x: Tensor, severity: int, rng: Rng) -> Tensor:
        """Corrupt images (N, C, H, W) in [0, 1] at a severity of 1 to 5; the result lies on the uint8 grid."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Suite(Part):
    """An ordered list of attacks and corruptions. A sample is robust when it survives every attack.

    Attributes:
        attacks: run in order; a sample that one of them breaks is not given to the next.
        corruptions: each is scored by itself, at every severity.
        severities: of the corruptions, 1 to 5.
        norms, eps: threat models to run the attacks under; empty means the one that the caller names.
        num_examples: how many test images, from the first; None means all, or what the caller names.
        seed: of all draws; None means what the caller names.
    """

    kind: ClassVar[str] = "suite"

    attacks: tuple[Attack, ...] = ()
    corruptions: tuple[Corruption, ...] = ()
    severities: tuple[Annotated[int, Ge(1), Le(5)], ...] = (1, 2, 3, 4, 5)
    norms: tuple[Norm, ...] = ()
    eps: tuple[NonNegative, ...] = ()
    num_examples: Count | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class CorruptionSuite(Suite):
    """A suite that scores corruptions by themselves: made from the test images, or read from the published files.

    Attributes:
        files: folder of the published files (CIFAR-10-C, ImageNet-C, C-bar, 3DCC, ...); None makes the images here. The two are
            different images, and their scores never stand in one table.
        published: names of corruptions that exist only as files.
        size: pixels at which images are corrupted, a multiple of theirs: each pixel is repeated, the result averaged back, so that
            the model sees its own size. None corrupts them as they are.
        attack: also attack the corrupted images that are classified correctly; under its own norm and radius, the suite's, or those
            that the caller names.
        baselines: AlexNets that mCE divides by, for published files; see ``evaluation.corruption_scores``.
    """

    files: str | None = None
    published: tuple[str, ...] = ()
    size: Count | None = None
    attack: Attack | None = None
    baselines: tuple[Literal["alexnet-50k", "alexnet-5k"], ...] = ()

    def __post_init__(self) -> None:
        if self.files is not None and self.size is not None:
            raise ValueError("size: published files are what they are; it is for images that are made here")


@dataclass(frozen=True, kw_only=True)
class BoundSuite(Suite):
    """A suite that stands in for a dearer one: its robust accuracy is an upper bound on that of the dearer one.

    Attributes:
        exact: the name of the dearer suite.
        leading: how many of the attacks every sample gets. The last of them reports ``info["nearness"]`` (N,): how far a survivor
            is from being broken, in radii; not finite where that cannot be told.
        near: survivors nearer than this, or where it is not finite, go on to the other attacks; the rest count as survivors.
        audit: how many random survivors that did not get the exact suite's attacks get them in the end.
    """

    exact: str
    leading: Count = 1
    near: Positive = 0.25
    audit: Whole = 0


class ImageSet(Protocol):
    """Labelled images that can be visited in any order."""

    labels: Tensor  # (N,), int64, on the CPU

    def __len__(self) -> int: ...

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each vector of positions: images (n, C, H, W) float32 in [0, 1], labels (n,) int64, the positions (n,) int64."""
        ...


@dataclass(frozen=True)
class Splits:
    """A data set, loaded.

    Attributes:
        train, validation, test: disjoint; training never sees test.
        class_names: K names.
        image_shape: (C, H, W).
        mean, std: per channel, of the training images in [0, 1].
        fingerprint: a hash of the test images and labels, for provenance.
        extra: further training images; their targets are class probabilities (n, K).
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    extra: ImageSet | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Further training images: generated ones, or others with pseudo-labels.

    Attributes:
        path: an .npz file or a folder of .npy files with ``image`` (M, H, W, C) or (M, C, H, W), uint8, and ``label``, classes (M,)
            or probabilities (M, K); ``x_train`` and ``y_train`` serve too. A relative path is looked for here, then under the root.
        ratio: their share of each batch; 0 uses none.
        smoothing: label smoothing of these images alone.
        layout: of the images; auto finds it from the number of channels.
    """

    path: str
    ratio: Fraction = 0.7
    smoothing: Fraction = 0.1
    layout: Literal["auto", "NHWC", "NCHW"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Dataset(Part):
    """A source of images.

    Attributes:
        root: folder with the files; None takes ``--data-root``, then ``$ROBUSTLAB_DATA``, then ``~/.cache/robustlab``.
        augment: stages applied to the training batch before everything else, such as ``flip_crop``.
        extra: further training images, such as generated ones, at a fixed share of each batch.
    """

    kind: ClassVar[str] = "dataset"

    root: str | None = None
    augment: tuple[Stage, ...] = ()
    extra: Extra | None = None

    def load(self) -> Splits:
        """Read (where torchvision offers it: download) the data.

        Raises:
            UserError: files missing, damaged or of the wrong shape; one line that says what was expected where.
        """
        raise NotImplementedError


class Optimizer(Part):
    """Updates the weights: ``build(params) -> torch.optim.Optimizer``."""

    kind: ClassVar[str] = "optimizer"

    lr: float

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        raise NotImplementedError


# -------------------------------------------------------------------------------------------------------------- trees


def is_part(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def rebuild(part: Any, change: Callable[[str, Any], Any]) -> Any:
    """Copy a tree of parts, replacing the value of each field by ``change(field name, value)``, leaves first.

    A part in which nothing changes is returned as it is.
    """
    if isinstance(part, tuple):
        new = tuple(rebuild(p, change) for p in part)
        return part if all(a is b for a, b in zip(new, part, strict=True)) else new
    if not is_part(part):
        return part
    updates = {}
    for f in dataclasses.fields(part):
        old = getattr(part, f.name)
        new = change(f.name, rebuild(old, change))
        if new is not old:
            updates[f.name] = new
    return dataclasses.replace(part, **updates) if updates else part


def resolve_schedules(part: Any, epoch: float, epochs: float) -> Any:
    """The tree with every ``Schedule`` replaced by its value."""
    return rebuild(part, lambda _, v: v.at(epoch, epochs) if isinstance(v, Schedule) else v)


def with_threat(part: Any, threat: Threat) -> Any:
    """The tree with every open ``norm`` and ``eps`` (None) filled from the threat model."""
    fill = {"norm": threat.norm, "eps": threat.eps}
    return rebuild(part, lambda name, v: fill[name] if v is None and name in fill else v)


def with_rows(attack: Attack, rows: int | None) -> Any:
    """The attack, and those inside it, told how many images may go through the classifier at once, where that is open."""
    return rebuild(attack, lambda name, v: rows if v is None and name == "rows" else v)


def speculating(attack: Attack, lookahead: int | None = None) -> Any:
    """The attack, and those inside it, told that there are few images to fill a pass with, and how many points of each would.

    ``lookahead`` is for those that have none of their own.
    """
    told = {"speculate": lambda v: True, "lookahead": lambda v: lookahead if v is None else v}
    return rebuild(attack, lambda name, v: told[name](v) if name in told else v)


def walk(part: Any) -> Iterator[Any]:
    """All parts of a tree, the root first."""
    if isinstance(part, tuple):
        for p in part:
            yield from walk(p)
    elif is_part(part):
        yield part
        for f in dataclasses.fields(part):
            yield from walk(getattr(part, f.name))


# ------------------------------------------------------------------------------------------------------------ at the door


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Labels (N,) as probabilities (N, K).

    Raises:
        ValueError: a label outside 0 .. K-1, or labels that are not whole numbers.
    """
    if labels.is_floating_point() or labels.ndim != 1:
        raise ValueError(f"labels must be a vector of whole numbers, got shape {tuple(labels.shape)} of {labels.dtype}")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    return torch.nn.functional.one_hot(labels.long(), num_classes).to(dtype)


def check_images(x: Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` holds images (N, C, H, W), floating point, in [0, 1], without NaN."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"images must be floating point of shape (N, C, H, W), got {tuple(x.shape)} of {x.dtype}")
    if x.numel() and not (float(x.amin()) >= 0.0 and float(x.amax()) <= 1.0):
        low, high = float(x.amin()), float(x.amax())
        hint = " (divide by 255?)" if high > 1.5 else " (normalisation belongs inside the model)"
        raise ValueError(f"images must lie in [0, 1], got values in [{low:.4g}, {high:.4g}]{hint}")
