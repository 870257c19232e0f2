"""Whether everything runs on a device, in less than a minute: `python scripts/smoke.py --device cuda`.

Every attack in every norm, trainer, gradient rule and corruption runs on tiny problems, and is compared with the CPU where the
answer is determined: draws and images bit for bit, weights and corrupted images to rounding, verdicts of attacks in float64 and of
evaluations sample by sample. A check that fails says so in one line, its traceback goes to the log, and the next one runs.

    --only PART     checks whose name contains PART; may be repeated
    --compile       also trains a compiled model, which takes long
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import math
import platform
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robustlab import commands, config, geometry, registry
from robustlab.augment.flip_crop import FlipCrop
from robustlab.data.images import MemoryImages
from robustlab.evaluation.prepare import prepare
from robustlab.evaluation.runner import evaluate
from robustlab.models.checkpoint import load_checkpoint
from robustlab.modes import full_precision
from robustlab.outer import Outer, context_of
from robustlab.rng import Rng
from robustlab.training.step import train_step
from robustlab.types import Threat, View, one_hot, rebuild, with_threat

EPS = {"linf": 0.06, "l2": 0.6, "l1": 4.0, "l0": 5.0}
CHEAP = {"steps": 4, "queries": 40, "attacks": ("apgd-ce",), "n_targets": 2}  # of the fields of these names
N, K, SHAPE = 12, 5, (3, 8, 8)
CPU = torch.device("cpu")
Check = tuple[str, Callable[[], Any]]


class Wrong(Exception):
    """A check's finding."""


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        f = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(128, K)),
        )
        f(torch.rand(64, *SHAPE))  # running statistics that are not the defaults
    return f.eval()


def images(n: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return (Rng(1).at(torch.arange(n)).uniform(shape).mul(1.4).sub(0.2).clamp(0, 1)).to(dtype)


# -------------------------------------------------------------------------------------------------------------------- draws


def draws(device: torch.device) -> str:
    tickets = torch.tensor([0, 1, 5, 2**40 + 7, 2**62])
    here, there = (Rng(3).child("a", 1).at(t) for t in (tickets, tickets.to(device)))
    for name, draw in (
        ("bits", lambda r: r.bits((3, 50))),
        ("uniform", lambda r: r.uniform((1000,), -0.1, 0.3)),
        ("uniform float64", lambda r: r.uniform((1000,), dtype=torch.float64)),
        ("integers", lambda r: r.integers((1000,), 9)),
        ("sign", lambda r: r.bits((100,)) & 1),
    ):
        demand(torch.equal(draw(here), draw(there).cpu()), f"{name} differ")
    worst = 0.0
    for draw in (lambda r: r.normal((2000,)), lambda r: r.beta((500,), 0.4, 0.7), lambda r: r.gamma((500,), 2.5)):
        a, b = draw(here), draw(there).cpu()
        worst = max(worst, float(((a - b).abs() / (a.abs() + 1e-3)).max()))
    demand(worst < 1e-4, f"normal, beta or gamma differ by {worst:.1e}")
    return f"normal, beta, gamma to {worst:.0e}"


def data(device: torch.device) -> None:
    levels = (images(40) * 255).round().to(torch.uint8)
    held = MemoryImages(levels, torch.arange(40) % K, K)
    order = Rng(0).permutation(40)
    for (x, y, i), (x_0, y_0, i_0) in zip(held.batches(order.split(16), device), held.batches(order.split(16)), strict=True):
        demand(x.device.type == device.type, f"the images lie on {x.device}")
        for a, b in ((x, x_0), (y, y_0), (i, i_0)):
            demand(torch.equal(a.cpu(), b), "images, labels or positions differ")
        moved, moved_0 = (
            FlipCrop()(None, {"clean": View(x=v, y=one_hot(w, K), key=k)}, Rng(2))["clean"].x  # type: ignore[arg-type]
            for v, w, k in ((x, y, i), (x_0, y_0, i_0))
        )
        demand(torch.equal(moved.cpu(), moved_0), "flip-crop differs")


# ------------------------------------------------------------------------------------------------------------------- attacks


def attack_of(name: str, norm: str) -> Any:
    cls = registry.lookup("attack", name)
    known = {f.name for f in dataclasses.fields(cls)} - ({"attacks"} if name == "best-of" else set())
    return rebuild(
        cls(norm=norm, eps=EPS[norm], **{k: v for k, v in CHEAP.items() if k in known}),  # type: ignore[call-arg]
        lambda field, v: min(v, CHEAP[field]) if field in ("steps", "queries", "n_targets") and isinstance(v, int) else v,
    )


def attack(name: str, norm: str, device: torch.device) -> str:
    """In float64 on both: an attack that is not coupled finds the same points but for the rounding of normal draws."""
    x, f = images(N, dtype=torch.float64), net().double()
    with torch.no_grad():
        y = f(x).argmax(1)
    found, coupled = [], attack_of(name, norm).coupled  # coupled ones may draw from the device's own generator
    for where in (device,) if coupled else (CPU, device):
        here = copy.deepcopy(f).to(where)
        x_adv = attack_of(name, norm)(here, x.to(where), y.to(where), seed=0)
        demand(x_adv.device.type == where.type and x_adv.dtype == x.dtype, f"returned {x_adv.dtype} on {x_adv.device}")
        size = float(geometry.norm_of(x_adv - x.to(where), norm).max())
        demand(size <= EPS[norm] * (1 + 1e-6) + 1e-6, f"leaves the ball: {size:.6g}")
        demand(float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1, "leaves the box")
        with torch.no_grad():
            found.append((here(x_adv).argmax(1) == y.to(where)).cpu())
    differ = int((found[0] != found[-1]).sum())
    demand(differ <= 1, f"{differ} of {N} verdicts differ from the CPU's")
    if coupled:
        return f"{int(found[-1].sum())} of {N} survive"
    x_32 = attack_of(name, norm)(net().to(device), x.float().to(device), y.to(device), seed=0)
    demand(bool(x_32.isfinite().all()), "not finite in float32")
    return f"{int(found[1].sum())} of {N} survive" + (f", {differ} differ" if differ else "")


# ------------------------------------------------------------------------------------------------------------------ training


def trained(trainer: Any, device: torch.device, precision: str, steps: int = 2, compiled: bool = False) -> nn.Module:
    torch.manual_seed(0)
    f = net().to(device, memory_format=torch.channels_last)
    outer = Outer(f, trainer, context_of(f, K, 64, SHAPE, batch_size=16), precision).to(device)
    if compiled:
        f.compile()
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    x = images(16 * steps)
    y = one_hot(torch.arange(16 * steps) % K, K)
    for s in range(steps):
        rows = torch.arange(16 * s, 16 * (s + 1))
        key = rows.to(device)
        view = View(x=x[rows].to(device, memory_format=torch.channels_last), y=y[rows].to(device), key=key, index=key)
        terms = train_step(outer, [{"clean": view}], trainer, optimizer, Rng(5), first=s)
        demand(all(math.isfinite(float(v)) for v in terms.values()), "a term of the loss is not finite")
    return outer.averaged() if trainer.averaging is not None else f


def trainer_of(name: str, **fields: Any) -> Any:
    found = with_threat(config.build("trainer", name, **fields), Threat("linf", 0.06))
    return rebuild(found, lambda field, v: min(v, 2) if field == "steps" else v)


def training(trainer: Any, device: torch.device, precision: str, compiled: bool = False) -> str:
    """Weights after two steps, beside those of the CPU in float32: how far apart, over how far they have moved."""
    with full_precision():
        here = dict(trained(trainer, device, precision, compiled=compiled).named_parameters())
        there = dict(trained(trainer, CPU, "fp32").named_parameters())
    start = dict(net().named_parameters())
    gap = sum(float((here[k].cpu() - there[k]).square().sum()) for k in there) ** 0.5
    way = sum(float((there[k] - start[k]).square().sum()) for k in there) ** 0.5
    demand(all(p.dtype == torch.float32 for p in here.values()), "weights are not float32")
    demand(way > 0, "nothing was trained")
    most = 0.05 if precision == "fp32" else 0.7
    demand(gap <= most * way, f"the weights are {gap / way:.2g} of their way from the CPU's")
    return f"off by {gap / way:.0e} of the way"


def resume(device: torch.device) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        x, y = rng.integers(0, 256, (96, 8, 8, 3), dtype=np.uint8), np.arange(96) % K
        np.savez(folder / "set.npz", x_train=x, y_train=y, x_test=x[:16], y_test=y[:16])
        run = config.config_from(
            {
                "trainer": "rice-at",
                "model": {"name": "small_cnn", "width": 8},
                "data": {"name": "npz", "path": str(folder / "set.npz"), "validation": 16, "augment": [{"name": "flip-crop"}]},
                "threat": {"norm": "linf", "eps": 0.03},
                "optimizer": {"name": "sgd", "lr": 0.05},
                "schedule": {"name": "constant"},
                "training": {
                    "epochs": 2,
                    "batch_size": 16,
                    "device": str(device),
                    "precision": "bf16",
                    "channels_last": True,
                    "probe": {"every": 1, "num_examples": 16, "steps": 2},
                },
            }
        )

        def stop(event: dict[str, Any]) -> None:
            if event["kind"] == "step" and event["epoch"] == 1:
                raise KeyboardInterrupt

        commands.train(run, folder / "whole")
        try:
            commands.train(run, folder / "cut", progress=stop)
        except KeyboardInterrupt:
            commands.train(run, folder / "cut", resume=True)
        states = [load_checkpoint(folder / k / "last.safetensors").state_dict() for k in ("whole", "cut")]
    gap = max(float((states[0][k].float() - states[1][k].float()).abs().max()) for k in states[0])
    demand(gap < 1e-2, f"the resumed run's weights differ by {gap:.1e}")
    return "bit for bit" if gap == 0 else f"to {gap:.0e}"


# ---------------------------------------------------------------------------------------------------------------- evaluation


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f = config.build("model", {"name": "small_cnn", "num_classes": K, "in_channels": 3}).build()
    x = images(48, (3, 16, 16))
    f.train()(x)
    f.eval()
    with torch.no_grad():
        return f, x, f(x).argmax(1)


def short(name: str) -> Any:
    found = config.build("suite", name)
    few = {"steps": 6, "queries": 60, "n_targets": 2, "targets": 2}
    attacks = tuple(rebuild(a, lambda field, v: few[field] if field in few and isinstance(v, int) else v) for a in found.attacks)
    if name == "autoattack-reference":
        attacks = tuple(dataclasses.replace(a, attacks=("apgd-ce",)) for a in attacks)
    return dataclasses.replace(found, attacks=attacks, **({"audit": 0} if hasattr(found, "audit") else {}))


@functools.cache
def verdicts(name: str, precision: str, device: torch.device) -> Tensor:
    f, x, y = problem()
    threat = Threat("linf", 0.01)
    result = evaluate(f.to(device), (x, y), short(name), threat=threat, device=device, precision=precision)  # type: ignore[arg-type]
    return torch.as_tensor(result.robust).flatten()


def suite(name: str, precision: str, device: torch.device) -> str:
    here, there = verdicts(name, precision, device), verdicts(name, "fp32", CPU)
    differ = int((here != there).sum())
    demand(differ <= 2, f"{differ} of {len(here)} verdicts differ from the CPU's")
    return f"{int(here.sum())} of {len(here)} robust" + (f", {differ} differ" if differ else "")


def copies(device: torch.device) -> str:
    """Whether there is a faster copy to search on."""
    f, x, _ = problem()
    f = f.to(device)
    for precision in ("fp32", "bf16"):
        demand(prepare(f, x.to(device), precision) is not f, f"no copy to be trusted in {precision}")
    return "trusted in fp32 and bf16"


def full(device: torch.device) -> str:
    """Scores in float32 do not go through TF32."""
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3, padding=1).to(device)
    x = torch.randn(32, 64, 16, 16, device=device)
    with torch.no_grad():
        exact = layer.double()(x.double())
        layer.float()
        with full_precision():
            own = float((layer(x).double() - exact).abs().max() / exact.abs().max())
        default = float((layer(x).double() - exact).abs().max() / exact.abs().max())
    demand(own < 1e-5, f"float32 is off by {own:.1e}")
    return f"off by {own:.0e}; as the caller has it {default:.0e}"


def corruption(name: str, device: torch.device) -> str:
    part, x = config.build("corruption", name), images(16, (3, 32, 32))
    rng = Rng(0).child(name)
    tickets = torch.arange(16)
    here, there = (part(v.clone(), 3, rng.at(t)) for v, t in ((x, tickets), (x.to(device), tickets.to(device))))
    demand(there.device.type == device.type, f"the images lie on {there.device}")
    off = float(((here - there.cpu()).abs() > 1.5 / 255).float().mean())
    demand(off < 0.02, f"{off:.1%} of the values differ by more than a level")
    return "" if off == 0 else f"{off:.2%} of the values differ by more than a level"


# ---------------------------------------------------------------------------------------------------------------------- all


def checks(device: torch.device, compiled: bool) -> Iterator[Check]:
    yield "draws", lambda: draws(device)
    yield "data", lambda: data(device)
    yield "full precision", lambda: full(device)
    yield "copies to search on", lambda: copies(device)
    for name in ("autoattack", "autoattack-fast", "autoattack-quick", "screen", "autoattack-reference"):
        for precision in ("fp32", "bf16"):
            yield f"suite {name} {precision}", lambda name=name, p=precision: suite(name, p, device)
    for name in registry.entries("trainer"):
        for precision in ("fp32", "bf16"):
            yield f"trainer {name} {precision}", lambda name=name, p=precision: training(trainer_of(name), device, p)
    for name in registry.entries("gradient"):
        rule = {"gradient": {"name": name}}
        yield f"gradient {name} fp32", lambda rule=rule: training(trainer_of("trades", **rule), device, "fp32")
        yield f"gradient {name} bf16", lambda rule=rule: training(trainer_of("trades", **rule), device, "bf16")
    for name in ("ema", "swa"):
        rule = {"averaging": {"name": name}}
        yield f"averaging {name}", lambda rule=rule: training(trainer_of("pgd-at", **rule), device, "fp32")
    yield "resume", lambda: resume(device)
    for name, cls in registry.entries("attack").items():
        for norm in cls.norms:
            yield f"attack {name} {norm}", lambda name=name, norm=norm: attack(name, norm, device)
    for name in registry.entries("corruption"):
        yield f"corruption {name}", lambda name=name: corruption(name, device)
    for name in ("pgd-at", "trades", "awp") if compiled else ():
        for precision in ("fp32", "bf16"):
            yield f"compile {name} {precision}", lambda n=name, p=precision: training(trainer_of(n), device, p, compiled=True)


def describe(device: torch.device) -> str:
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = [flag for flag in ("amx_tile", "avx512_bf16") if re.search(rf"\b{flag}\b", cpu)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    versions = f"torch {torch.__version__}, python {platform.python_version()}, {torch.get_num_threads()} threads"
    return f"{device}: {name}; {versions}; CPU with {', '.join(fast) or 'neither amx nor avx512_bf16'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log", type=Path, default=Path("smoke.log"), help="the tracebacks go there")
    parser.add_argument("--only", action="append", default=[], metavar="PART")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="only failures and the sum")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    device, begun, failed, count = torch.device(args.device), time.perf_counter(), 0, 0
    print(describe(device), flush=True)
    with open(args.log, "w", encoding="utf-8") as log:
        for name, check in checks(device, args.compile):
            if args.only and not any(part in name for part in args.only):
                continue
            start, count = time.perf_counter(), count + 1
            try:
                line = f"ok   {name}: {check() or ''}".rstrip(": ")
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # whatever it is: the other checks still run
                failed += 1
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                line = f"FAIL {name}: {reason if isinstance(error, Wrong) else f'{type(error).__name__}: {reason}'}"
                log.write(f"{line}\n{traceback.format_exc()}\n")
                log.flush()
            if not args.quiet or line.startswith("FAIL"):
                print(f"{line}  [{time.perf_counter() - start:.2f} s]", flush=True)
    print(
        f"{count - failed} of {count} checks passed in {time.perf_counter() - begun:.1f} s"
        + (f"; see {args.log}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
