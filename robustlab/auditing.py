"""The audit of a model that we did not train: every part of it, one after the other, each kept on disk as soon as it is done.

    suite         clean and robust accuracy with intervals, the reliability report, the adversarial images
    corruptions   accuracy under corruptions
    distances     one run of a minimum-norm attack: robust accuracy at every radius; APGD at eps/2, eps and 2 eps checks it
    steps         loss and accuracy against the number of PGD steps
    calibration   of the confidences on clean, adversarial and corrupted images

What was done is not repeated: with ``resume`` an interrupted audit goes on with the part (in a suite: with the batch) it was in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustlab import commands
from robustlab import config as configuration
from robustlab.files import exclusive, write_json
from robustlab.rng import Rng
from robustlab.types import Threat, UserError, one_hot, with_threat

Progress = Callable[[dict[str, Any]], None]
STEPS = (1, 2, 5, 10, 20, 50)
RADII = 25
MINIMUM = {"linf": "fmn", "l2": "ddn", "l1": "fmn"}
SUITES = ("corruptions-quick",)
SEVERITY = 3
PASSES = {"corruptions": (26, 0), "distances": (270, 250), "steps": (94, 88), "calibration": (7, 0)}  # about, for each image


@dataclass(frozen=True)
class Subject:
    """What is audited: the classifier in eval mode, its first images and labels, the threat model, K."""

    f: Any
    x: Tensor
    y: Tensor
    threat: Threat
    num_classes: int
    class_names: tuple[str, ...]
    seed: int
    batch_size: int


def audit(
    spec: str,
    *,
    data: str | None,
    data_root: str | None = None,
    norm: str = "linf",
    eps: float,
    suite: str = "autoattack",
    num_examples: int = 100,
    seed: int = 0,
    batch_size: int = 128,
    device: str = "auto",
    out: Path = Path("audits"),
    resume: bool = False,
    progress: Progress = lambda event: None,
) -> tuple[dict[str, Any], Path]:
    """Audit a model and write ``report.html`` and ``audit.json``.

    Args:
        spec: a checkpoint, ``timm:NAME``, ``torchvision:NAME`` or ``package.module:callable``.
        data, data_root, num_examples, seed, batch_size, device: as in ``commands.evaluate_one``.
        norm, eps: the threat model; linf, l2 or l1.
        suite: what the robust accuracy is measured with.
        out: everything lies in ``out/<model>``.
        resume: go on with what is there.
        progress: takes the suites' events, and ``{"part": name, "number": i, "of": n, "seconds": about}`` when a part begins;
            of the suite nobody knows in advance.

    Returns:
        What was found, and the report's path.

    Raises:
        UserError: something asked for is impossible, or the folder holds an audit with other settings.
    """
    from robustlab.report.audit_page import audit_page

    if norm not in MINIMUM:
        raise UserError(f"audit: norm {norm}: expected one of {', '.join(MINIMUM)}")
    folder = out / commands.model_label(spec).replace(":", "-").replace("/", "-")
    settings = {"model": spec, "data": data, "norm": norm, "eps": eps, "suite": suite, "n": num_examples, "seed": seed}
    _begin(folder, settings, resume)
    common: dict[str, Any] = {
        "data": data,
        "data_root": data_root,
        "norm": norm,
        "eps": eps,
        "seed": seed,
        "num_examples": num_examples,
        "batch_size": batch_size,
        "device": device,
        "out": folder / "evaluations",
        "resume": True,
    }
    with exclusive(folder):
        kept = folder / "adversarial.npz"
        found: dict[str, Any] = {"settings": settings, "command": commands.command_line()}

        def run(name: str, number: int, make: Callable[[], Any]) -> None:
            forward, backward = speed
            passes = PASSES.get(name)
            seconds = None if passes is None else len(subject.x) * (passes[0] * forward + passes[1] * backward)
            progress({"part": name, "number": number, "of": 5, "seconds": seconds})
            path = folder / "parts" / f"{name}.json"
            if not path.exists():
                write_json(path, make())
            found[name] = json.loads(path.read_text(encoding="utf-8"))

        def evaluate(names: tuple[str, ...], keep: Path | None) -> list[Any]:
            suites = [configuration.load_suite(name) for name in names]
            return commands.evaluate_one(spec, suites, **common, save_adversarial=keep, progress=progress)

        def record_of(names: tuple[str, ...], keep: Path | None = None) -> dict[str, Any]:
            record, path = evaluate(names, keep)[0]
            return {"record": record.model_dump(mode="json"), "ledger": str(path.with_name("ledger.jsonl").relative_to(folder))}

        subject = _subject(spec, data, data_root, device, num_examples, Threat(norm, eps), seed, batch_size)  # type: ignore[arg-type]
        speed = _speed(subject)
        run("suite", 1, lambda: record_of((suite,), kept))
        run("corruptions", 2, lambda: record_of(SUITES))
        run("distances", 3, lambda: distances(subject))
        run("steps", 4, lambda: loss_against_steps(subject))
        run("calibration", 5, lambda: calibrations(subject, kept))
        page = audit_page(_finish(found, subject, folder), _pictures(subject, kept, found, folder))
    from robustlab.files import atomic_write

    write_json(folder / "audit.json", found)
    atomic_write(folder / "report.html", page)
    return found, folder / "report.html"


def _begin(folder: Path, settings: Mapping[str, Any], resume: bool) -> None:
    path = folder / "settings.json"
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        if not resume:
            raise UserError(f"{folder}: holds an audit already; go on with it with --resume, or choose another --out")
        if different := [key for key in settings if old.get(key) != settings[key]]:
            key = different[0]
            raise UserError(
                f"{folder}: an audit with another {key}: {old.get(key)} there, {settings[key]} here; choose another --out"
            )
    write_json(path, dict(settings))


def _subject(
    spec: str, data: str | None, root: str | None, device: str, n: int, threat: Threat, seed: int, batch_size: int
) -> Subject:
    from robustlab.modes import unwrap

    where = commands.torch_device(device)
    f, _, _, splits = commands.load_pair(spec, data, root, where)
    x, y, _ = next(iter(splits.test.batches([torch.arange(min(n, len(splits.test)))], where)))
    module = unwrap(f)
    if isinstance(module, torch.nn.Module):
        module.eval()
    return Subject(f, x, y, threat, splits.num_classes, tuple(splits.class_names), seed, batch_size)


def _speed(s: Subject) -> tuple[float, float]:
    """Seconds for an image forward, and back; the second is 0 where no gradient comes through."""
    x = s.x[: s.batch_size].clone()
    _logits(s, x)  # warm
    start = time.perf_counter()
    _logits(s, x)
    forward = time.perf_counter() - start
    start = time.perf_counter()
    z = s.f(x.requires_grad_())
    if not z.requires_grad:
        return forward / len(x), 0.0
    torch.autograd.grad(z.sum(), x, allow_unused=True)
    return forward / len(x), max(time.perf_counter() - start - forward, 0.0) / len(x)


def _attacked(s: Subject, attack: Any, threat: Threat, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and per-sample by-products of an attack on all images, batch by batch."""
    images, infos = [], []
    for rows in torch.arange(len(s.x)).split(s.batch_size):
        rng = Rng(s.seed).child("audit", name).at(rows.to(s.x.device))
        x_adv, info = with_threat(attack, threat).run(s.f, s.x[rows], one_hot(s.y[rows], s.num_classes), rng)
        images.append(x_adv.detach())
        infos.append({k: v for k, v in info.items() if isinstance(v, Tensor) and len(v) == len(rows)})
    return torch.cat(images), {k: torch.cat([i[k] for i in infos]) for k in infos[0]}


@torch.no_grad()
def _logits(s: Subject, x: Tensor) -> Tensor:
    return torch.cat([torch.as_tensor(s.f(part)) for part in x.split(s.batch_size)])


def distances(s: Subject) -> dict[str, Any]:
    """Robust accuracy at every radius from one run of a minimum-norm attack, and APGD's at three of them."""
    from robustlab.evaluation.statistics import wilson
    from robustlab.modes import frozen

    norm, eps, n = s.threat.norm, s.threat.eps, len(s.x)
    with frozen(s.f):
        right = _logits(s, s.x).argmax(1) == s.y
        attack = configuration.build("attack", MINIMUM[norm], norm=norm)
        info: dict[str, Any] = {}
        parts = []
        for rows in torch.arange(n).split(s.batch_size):
            rng = Rng(s.seed).child("audit", "distances").at(rows.to(s.x.device))
            _, info = attack.run(s.f, s.x[rows], one_hot(s.y[rows], s.num_classes), rng)
            parts.append(info["distance"].detach())
        far = torch.where(right, torch.cat(parts), 0.0)
        checks = []
        for radius in (eps / 2, eps, 2 * eps):
            if norm == "linf" and radius > 1:
                continue
            apgd = configuration.build("attack", "apgd", steps=50)
            x_adv, _ = _attacked(s, apgd, Threat(norm, radius), f"apgd {radius!r}")
            k = int(((_logits(s, x_adv).argmax(1) == s.y) & right).sum())
            checks.append(
                {"eps": radius, "apgd": k / n, "interval": wilson(k, n), "distance": float((far > radius).double().mean())}
            )
    radii = [3 * eps * i / (RADII - 1) for i in range(RADII)]
    curve = [{"eps": r, "accuracy": float(((far > r) if r else right).double().mean())} for r in radii]
    median = float(far[right].median()) if bool(right.any()) else 0.0
    return {"attack": MINIMUM[norm], "curve": curve, "checks": checks, "median": median if median != float("inf") else None}


def loss_against_steps(s: Subject) -> list[dict[str, float]]:
    """Mean cross-entropy and accuracy under PGD with 1 to 50 steps. The loss of an honest model grows with the steps."""
    from robustlab import losses
    from robustlab.modes import frozen

    out = []
    with frozen(s.f):
        for steps in STEPS:
            pgd = configuration.build("attack", "pgd", steps=steps, rel_step=min(1.0, 2.5 / steps))
            x_adv, _ = _attacked(s, pgd, s.threat, f"pgd {steps}")
            z = _logits(s, x_adv)
            value = losses.cross_entropy(z.float(), one_hot(s.y, s.num_classes)).nan_to_num(posinf=1e4).mean()
            out.append({"steps": steps, "loss": float(value), "accuracy": float((z.argmax(1) == s.y).double().mean())})
    return out


def calibrations(s: Subject, kept: Path) -> dict[str, Any]:
    """Of the confidences on clean images, on those that the suite's attacks left, and on corrupted ones."""
    from robustlab.evaluation.adversarial import Images
    from robustlab.evaluation.calibration import calibration

    suite = configuration.load_suite(SUITES[0])
    sets = {"clean": s.x, "adversarial": torch.as_tensor(Images(kept).x[:]).float().to(s.x.device)}
    index = torch.arange(len(s.x), device=s.x.device)
    rng = Rng(s.seed)
    sets["corrupted"] = torch.cat(
        [c(s.x, SEVERITY, rng.child("corruption", c.name, SEVERITY).at(index)) for c in suite.corruptions]
    )
    found = {name: calibration(_logits(s, x), s.y.repeat(len(x) // len(s.y))).to_dict() for name, x in sets.items()}
    return {k: {name: value if value != float("inf") else None for name, value in c.items()} for k, c in found.items()}


def _finish(found: dict[str, Any], s: Subject, folder: Path) -> dict[str, Any]:
    """Add what follows from the parts: the verdict, the classes, where the two ways of measuring disagree."""
    from robustlab.evaluation.rederive import rederive
    from robustlab.evaluation.statistics import wilson
    from robustlab.evaluation.verdict import verdict
    from robustlab.results.record import Record

    record = Record.model_validate(found["suite"]["record"])
    notes = [
        f"At {c['eps']:.4g} APGD leaves {100 * c['apgd']:.1f} %, the minimum-norm attack {100 * c['distance']:.1f} %: "
        "one of them is too weak."
        for c in found["distances"]["checks"]
        if not c["interval"][0] - 0.02 <= c["distance"] <= c["interval"][1] + 0.02
    ]
    told = rederive(folder / found["suite"]["ledger"])
    assert told.robust is not None
    classes = []
    for k in range(s.num_classes):
        rows = (s.y == k).cpu()
        n, right, robust = int(rows.sum()), int(told.clean[rows].sum()), int(told.robust[rows].sum())
        name = s.class_names[k] if k < len(s.class_names) else str(k)
        classes.append({"name": name, "n": n, "clean": right, "robust": robust, "interval": wilson(robust, n)})
    found["classes"] = sorted(classes, key=lambda c: (c["robust"] / max(c["n"], 1), c["name"]))
    found["verdict"] = asdict(verdict(record, s.num_classes, notes))
    return found


def _pictures(s: Subject, kept: Path, found: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Up to eight images that an attack broke: clean, adversarial, and what both are taken for."""
    from robustlab.evaluation.adversarial import Images

    x_adv = torch.as_tensor(Images(kept).x[:]).float().to(s.x.device)
    before, after = _logits(s, s.x).argmax(1), _logits(s, x_adv).argmax(1)
    rows = ((before == s.y) & (after != s.y)).nonzero().squeeze(1)[:8]

    def name(k: int) -> str:
        return s.class_names[k] if k < len(s.class_names) else str(k)

    return {
        "clean": s.x[rows].cpu().numpy(),
        "adversarial": x_adv[rows].cpu().numpy(),
        "before": [name(int(k)) for k in before[rows]],
        "after": [name(int(k)) for k in after[rows]],
    }
