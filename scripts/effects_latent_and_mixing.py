"""What the papers claim of IAT, AdvLC, SLAT, ENGM, AugRmixAT and Krylov, measured on digits against ``pgd-at``.

    python scripts/effects_latent_and_mixing.py --seeds 3 --out runs/effects

Each configuration of ``configs/digits`` is trained once for each seed (a finished run is reused); the figures are of the 500 test
images, by the last weights, in eval mode. x' is PGD-10 at the threat model of the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

import robustlab as rl
from robustlab import commands, config, losses
from robustlab.attacks.krylov import Krylov
from robustlab.attacks.pgd import PGD
from robustlab.latent.slat import gradients
from robustlab.models.checkpoint import load_model
from robustlab.types import View, one_hot

HERE = Path(__file__).parents[1]
NAMES = ("pgd-at", "iat", "manifold-iat", "augrmixat", "advlc", "slat", "krylov-at", "engm", "engm-approx")
SITES = ("conv1", "act2")  # those that configs/digits/slat.yaml perturbs


def trained(name: str, seed: int, out: Path) -> nn.Module:
    run = dataclasses.replace(config.load_config(HERE / "configs" / "digits" / f"{name}.yaml"), seed=seed)
    folder = out / f"{name}-{seed}"
    if not (folder / "last.safetensors").exists():
        commands.train(run, folder)
    return load_model(folder / "last.safetensors").eval()


def measured(f: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    eps = 0.1
    x_adv = PGD(norm="linf", eps=eps, steps=10)(f, x, y)
    stronger = PGD(norm="linf", eps=eps, steps=50)(f, x, y)
    with torch.no_grad():
        z, z_adv, z_50 = f(x), f(x_adv), f(stronger)
    view = View(x=x, y=one_hot(y, z.shape[1]), key=torch.arange(len(x)))
    _, latent = gradients(f, view, SITES)
    norms = sample_norms(f, x_adv, view.y)
    out = {
        "clean %": 100 * float((z.argmax(1) == y).float().mean()),
        "PGD-50 %": 100 * float((z_50.argmax(1) == y).float().mean()),
        "|z - z'|": float((z - z_adv).abs().mean()),
        "latent L1": sum(float(g.flatten(1).abs().sum(1).mean()) for g in latent.values()),
        "gradient norm": float(norms.mean()),
        "its variance": float(norms.var()),
    }
    out["corruptions %"] = 100 * statistics.mean(
        float((f(rl.corrupt(x, name, severity=s, seed=0)).argmax(1) == y).float().mean())
        for name in rl.list_corruptions()
        for s in (2, 4)
    )
    return out


def sample_norms(f: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The length of each sample's gradient in the weights, (N,)."""
    params = {k: p.detach() for k, p in f.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return losses.cross_entropy(torch.func.functional_call(f, params, (x[None],)), y[None]).sum()

    def length(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([g.square().sum() for g in torch.func.grad(loss)(params, x, y).values()]).sum().sqrt()

    return torch.func.vmap(length, chunk_size=50)(x, y)


def inner_losses(f: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """Mean loss that an attack reaches, beside its passes."""
    target, lines = one_hot(y, 10), []
    attacks = {f"PGD-{k}": PGD(norm="linf", eps=0.1, steps=k) for k in (1, 2, 3, 5, 7, 10)}
    attacks |= {
        f"krylov {k} x m={m}": Krylov(norm="linf", eps=0.1, steps=k, m=m) for k, m in ((1, 2), (2, 2), (3, 2), (3, 1), (5, 1))
    }
    for name, attack in attacks.items():
        x_adv, info = attack.run(f, x, target, rl.rng.Rng(0).at(torch.arange(len(x))))
        with torch.no_grad():
            value = float(losses.cross_entropy(f(x_adv), target).mean())
        lines.append(f"  {name:<16} passes {info['passes'].sum(1).float().mean():5.1f}   loss {value:.4f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/effects"))
    parser.add_argument("--only", nargs="*", default=NAMES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    test = config.load_config(HERE / "configs" / "digits" / "pgd-at.yaml").data.load().test
    x, y, _ = next(iter(test.batches([torch.arange(len(test))])))
    for name in args.only:
        rows = [measured(trained(name, seed, args.out), x, y) for seed in range(args.seeds)]
        means = {k: statistics.mean(r[k] for r in rows) for k in rows[0]}
        spread = {k: max(r[k] for r in rows) - min(r[k] for r in rows) for k in rows[0]}
        print(f"{name:<14}", "  ".join(f"{k} {v:.3f} (range {spread[k]:.3f})" for k, v in means.items()), flush=True)
    print("inner loss on pgd-at")
    print("\n".join(inner_losses(trained("pgd-at", 0, args.out), x, y)))


if __name__ == "__main__":
    main()
