"""robustlab: train, attack, score and rank robust image classifiers.

>>> import robustlab as rl
>>> f = rl.create_model("small_cnn", num_classes=10, in_channels=1).eval()
>>> attack = rl.create_attack("pgd", norm="linf", eps=8/255, steps=20)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from torch import Tensor, nn

    from robustlab.evaluation.result import Result
    from robustlab.types import Attack


def create_model(name: str, **fields: Any) -> nn.Module:
    """A new classifier; see ``robustlab explain NAME`` for its fields.

    Args:
        name: an architecture: ``"preact_resnet18"``, ``"timm:resnet18"``, ...
        fields: of the architecture; ``num_classes`` at least.

    Raises:
        UserError: no such name or field, or a value out of range.
    """
    from robustlab.models import create_model

    return create_model(name, **fields)


def load_model(spec: str, device: str = "cpu") -> nn.Module:
    """A trained classifier, in eval mode: a checkpoint, ``timm:NAME``, ``torchvision:NAME`` or ``package.module:callable``.

    Raises:
        UserError: one line: no such file, not a checkpoint, no such model.
    """
    from robustlab.models.checkpoint import load_model

    return load_model(spec, device)


def create_attack(name: str, **fields: Any) -> Attack:
    """An attack: ``attack(f, x, y, seed=0)`` returns adversarial images.

    Args:
        name: ``"pgd"``, ``"apgd"``, ...
        fields: of the attack; ``norm`` and ``eps`` ([0, 1] pixel units) before it is called.

    Raises:
        UserError: no such name or field, or a value out of range.
    """
    from robustlab.config import build

    return build("attack", name, **fields)


def evaluate(
    f: Any,
    data: Any,
    suite: Any = "autoattack-reference",
    *,
    norm: str | None = None,
    eps: float | None = None,
    seed: int | None = None,
    reliability: bool = True,
    **options: Any,
) -> Result:
    """Score a classifier under a suite; every adversarial image is projected and scored again in full precision.

    Args:
        f: the classifier.
        data: ``(x, y)`` tensors, a Dataset or a DataLoader; images in [0, 1].
        suite: a name, a YAML file, or a ``types.Suite``.
        norm, eps: the threat model.
        seed: of all draws.
        reliability: examine afterwards whether the attacks' verdicts can be believed, for at most 10 % of their passes more
            (nothing where that is too few to say anything).
        options: of ``robustlab.evaluation.runner.evaluate``: ``batch_size device precision num_examples out resume shard
            save_adversarial audit audit_bound progress``. A shard is not examined.

    Returns:
        ``clean_accuracy robust_accuracy interval per_attack robust cost reliability`` and more.

    Raises:
        UserError: bad images, labels, radius or model; one line.
    """
    from robustlab.config import load_suite
    from robustlab.evaluation.runner import evaluate
    from robustlab.types import Threat, UserError

    if (norm is None) != (eps is None):
        raise UserError("give norm and eps together, for example norm='linf', eps=8/255")
    threat = Threat(norm, eps) if norm is not None and eps is not None else None  # type: ignore[arg-type]
    plan = load_suite(suite) if isinstance(suite, str) else suite
    examined = reliability and options.get("shard") is None  # a merge would drop it
    return evaluate(f, data, plan, threat=threat, seed=seed, reliability=examined, **options)


def corrupt(x: Tensor, name: str, severity: int, table: str = "cifar", seed: int = 0) -> Tensor:
    """Corrupted images (N, C, H, W) in [0, 1]; the same seed gives the same image in any batch.

    Args:
        x: images (N, C, H, W) in [0, 1].
        name: ``"gaussian_noise"``, ...
        severity: 1 to 5.
        table: ``"cifar"`` or ``"imagenet"`` severities.
        seed: of all draws.

    Raises:
        UserError: no such name; images, severity or table out of range.
    """
    from robustlab.corruptions import corrupt

    return corrupt(x, name, severity, table, seed)


def train(config: str, out: str | None = None, *, settings: tuple[str, ...] = (), resume: bool = False) -> Any:
    """Train as a YAML file says; ``settings`` are ``"key.key=value"``.

    Returns:
        ``training.loop.Outcome``: epochs, metrics, best, stopped.

    Raises:
        UserError: one line for each mistake in the file.
    """
    from pathlib import Path

    from robustlab import commands
    from robustlab.config import load_config

    folder = Path(out) if out is not None else commands.default_out(Path(config))
    return commands.train(load_config(config, settings), folder, resume=resume, config_path=str(config))


def _names(kind: str) -> list[str]:
    from robustlab.registry import entries

    return list(entries(kind))


def list_attacks() -> list[str]:
    """Names of all attacks."""
    return _names("attack")


def list_trainers() -> list[str]:
    """Names of all trainers."""
    return _names("trainer")


def list_corruptions() -> list[str]:
    """Names of all corruptions."""
    return _names("corruption")


def list_suites() -> list[str]:
    """Names of all suites."""
    return _names("suite")


def list_models() -> list[str]:
    """Names of all architectures; ``timm`` and ``torchvision`` take ``:NAME``."""
    return _names("model")


def list_datasets() -> list[str]:
    """Names of all data sets."""
    return _names("dataset")
