"""Run the authors' code of single-step methods and MART on tiny inputs; write what it gives to tests/golden.

    python scripts/make_golden_single_step.py CLONES

CLONES holds checkouts, or bare repositories, called ``<owner>+<name>``. Nothing of theirs is kept: functions and training loops are
taken out of the files by their names, run on the net of tests/reference/public.py on the CPU, and thrown away. Random numbers are
replaced by closed forms.
"""

from __future__ import annotations

import ast
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import Variable
from torch.nn import functional as F

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE / "tests" / "reference"))
import public  # noqa: E402

COMMITS = {
    "YisenWang/MART": "2d83e17b381dd2ee52223695e517bf6d5ff09c2c",
    "jinghuichen/BackwardSmoothing": "6ad21f8c32223c0e78e1b848164d4eb59301f727",
    "locuslab/fast_adversarial": "54f728755e71857b632882ba6d6cef22f56e2172",
    "locuslab/robust_overfitting": "c47a25c5e00c8b2bb35488d962c04dd771b7e9af",
    "pdejorge/N-FGSM": "0a9e4f040b89a4bcd85763a34dea7866416927a2",
    "tml-epfl/understanding-fast-adv-training": "ceed49440bfc35a676375b783eaba5940e583bcc",
}


def source(clones: Path, repository: str, path: str) -> ast.Module:
    folder = clones / repository.replace("/", "+")
    git = next(p for p in (folder / "repo", folder / "repo" / ".git", folder) if (p / "HEAD").exists() or (p / ".git").exists())
    command = ["git", "--git-dir" if (git / "HEAD").exists() else "-C", str(git), "show", f"{COMMITS[repository]}:{path}"]
    return ast.parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def functions(tree: ast.Module, names: list[str], scope: dict[str, Any]) -> dict[str, Any]:
    """The functions of a file, defined in ``scope``."""
    wanted = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    assert len(wanted) == len(names)
    exec(compile(ast.Module(wanted, []), "theirs", "exec"), scope)
    return scope


def loop(tree: ast.Module, over: str, scope: dict[str, Any]) -> None:
    """Run the training loop of a program: the ``for`` over ``over``."""
    loops = [n for n in ast.walk(tree) if isinstance(n, ast.For) and ast.unparse(n.iter) == over]
    exec(compile(ast.Module(loops[:1], []), "theirs", "exec"), scope)


@contextlib.contextmanager
def on_the_cpu() -> Any:
    """Calls of .cuda() do nothing, and noise is in closed form, a new one at every call."""
    saved = torch.Tensor.cuda, torch.Tensor.uniform_, torch.randn, torch.cuda.FloatTensor
    call = [0]

    def uniform_(self: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        call[0] += 1
        return self.copy_(low + (high - low) * public.unit(self.shape, call[0] - 1))

    torch.Tensor.cuda = lambda self, *args, **more: self  # type: ignore[method-assign]
    torch.Tensor.uniform_ = uniform_  # type: ignore[method-assign]
    torch.randn = lambda shape: public.normal(shape)  # type: ignore[assignment]
    torch.cuda.FloatTensor = torch.FloatTensor  # type: ignore[misc]
    try:
        yield
    finally:
        torch.Tensor.cuda, torch.Tensor.uniform_, torch.randn, torch.cuda.FloatTensor = saved  # type: ignore[method-assign, misc]


def numbers(t: torch.Tensor) -> list[float]:
    return [float(f"{v:.9g}") for v in t.detach().double().flatten().tolist()]


def write(name: str, repository: str, what: str, **values: Any) -> None:
    block = {"repository": f"https://github.com/{repository}", "commit": COMMITS[repository], "ran": what, **values}
    (HERE / "tests" / "golden" / f"{name}.json").write_text(json.dumps(block) + "\n")


def parameters(f: nn.Module) -> dict[str, list[float]]:
    return {name: numbers(p) for name, p in f.named_parameters()}


def gradients(f: nn.Module, loss: torch.Tensor) -> dict[str, list[float]]:
    grads = torch.autograd.grad(loss, list(f.parameters()))
    return {name: numbers(g) for (name, _), g in zip(f.named_parameters(), grads, strict=True)}


def sgd(f: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(f.parameters(), lr=public.LR, momentum=public.MU, weight_decay=public.DECAY)


NAMES = {"torch": torch, "nn": nn, "F": F, "Variable": Variable, "np": np, "time": time}


def mart(clones: Path, f: nn.Module) -> None:
    tree = source(clones, "YisenWang/MART", "mart.py")
    x, y = public.images()
    loss = functions(tree, ["mart_loss"], dict(NAMES))["mart_loss"](f, x, y, sgd(f), beta=5.0)
    write("mart", "YisenWang/MART", "mart.mart_loss, beta 5", loss=loss.item(), gradient=gradients(f, loss))


def backward_smoothing(clones: Path, f: nn.Module) -> None:
    tree = source(clones, "jinghuichen/BackwardSmoothing", "trades_backward.py")
    (x, y), seen = public.images(), []
    f.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    loss = functions(tree, ["training_loss"], dict(NAMES))["training_loss"](f, x, y, sgd(f), beta=10.0)
    assert len(seen) == 5  # x twice, the start, x and x'
    values = {"start": numbers(seen[2]), "loss": loss.item(), "gradient": gradients(f, loss)}
    write("backward_smoothing", "jinghuichen/BackwardSmoothing", "trades_backward.training_loss, beta 10", **values)


def clamp(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return torch.max(torch.min(x, high), low)


def single(f: nn.Module, batches: list[Any], **more: Any) -> dict[str, Any]:
    """What a program's training loop reads."""
    eps = torch.full((2, 1, 1), public.EPS, dtype=torch.float64)
    amp = SimpleNamespace(scale_loss=lambda loss, opt: contextlib.nullcontext(loss))
    limits = {"lower_limit": torch.zeros(2, 1, 1).double(), "upper_limit": torch.ones(2, 1, 1).double()}
    tally = dict.fromkeys(("train_loss", "train_acc", "train_n", "iter_count"), 0)
    scope = {"model": f, "opt": sgd(f), "amp": amp, "scheduler": SimpleNamespace(step=lambda: None), "clamp": clamp}
    return {**NAMES, **limits, **tally, **scope, "criterion": F.cross_entropy, "train_loader": batches, "epsilon": eps, **more}


def fast(clones: Path, f: nn.Module) -> None:
    batches = [public.images(b) for b in range(3)]
    scope = single(f, batches, args=SimpleNamespace(delta_init="random"))
    scope["alpha"] = 1.25 * scope["epsilon"]
    loop(source(clones, "locuslab/fast_adversarial", "CIFAR10/train_fgsm.py"), "enumerate(train_loader)", scope)
    write("fast_at", "locuslab/fast_adversarial", "loop of CIFAR10/train_fgsm.py, 3 batches", weights=parameters(f))


def n_fgsm(clones: Path, f: nn.Module) -> None:
    batches = [(*public.images(b), None) for b in range(3)]
    utils = SimpleNamespace(clamp=clamp, lower_limit=torch.zeros(2, 1, 1).double(), upper_limit=torch.ones(2, 1, 1).double())
    scope = single(f, batches, args=SimpleNamespace(dataset="CIFAR10", unif=2.0, clip=-1), attack_utils=utils)
    scope["alpha"] = scope["epsilon"]
    loop(source(clones, "pdejorge/N-FGSM", "train.py"), "enumerate(train_loader)", scope)
    write("n_fgsm", "pdejorge/N-FGSM", "loop of train.py, 3 batches", weights=parameters(f))


def free(clones: Path, f: nn.Module) -> None:
    batches = [public.images(b, 0.4) for b in range(2)]  # away from black and white, where their port leaves the pixel range
    scope = single(f, batches, args=SimpleNamespace(minibatch_replays=4))
    scope["delta"] = torch.zeros(public.BATCH, *public.SHAPE, dtype=torch.float64, requires_grad=True)
    loop(source(clones, "locuslab/fast_adversarial", "CIFAR10/train_free.py"), "enumerate(train_loader)", scope)
    write("free_at", "locuslab/fast_adversarial", "loop of CIFAR10/train_free.py, 2 batches of 4 replays", weights=parameters(f))


def rice(clones: Path, f: nn.Module) -> None:
    tree, values = source(clones, "locuslab/robust_overfitting", "train_cifar.py"), {}
    scope = {**NAMES, "lower_limit": 0, "upper_limit": 1, "normalize": lambda x: x}
    scope["clamp"] = lambda x, low, high: torch.max(torch.min(x, torch.as_tensor(high)), torch.as_tensor(low))
    attack = functions(tree, ["attack_pgd"], scope)["attack_pgd"]
    x, y = public.images()
    delta = attack(f, x, y, public.EPS, public.EPS / 4, 10, 1, "l_inf")
    values["delta"] = numbers(delta)
    write("rice_at", "locuslab/robust_overfitting", "train_cifar.attack_pgd, linf, 10 steps of eps / 4", **values)


def gradalign(clones: Path, f: nn.Module) -> None:
    repository = "tml-epfl/understanding-fast-adv-training"
    names = ["get_input_grad", "get_uniform_delta", "sign", "clamp", "l2_norm_batch", "backward"]
    utils = functions(source(clones, repository, "utils.py"), names, dict(NAMES))
    args = SimpleNamespace(minibatch_replay=1, attack="fgsm", attack_init="zero", dataset="cifar10", fgsm_alpha=1.25, batch_size=4)
    args.grad_align_cos_lambda, args.eval_iter_freq = 0.2, 10**9
    scope = single(f, [], train_batches=[public.images(b) for b in range(3)], args=args, utils=SimpleNamespace(**utils))
    scope |= {k: utils[k] for k in ("clamp", "get_input_grad", "l2_norm_batch")}
    scope |= {"eps": public.EPS, "epoch": 1, "iteration": 1, "half_prec": False, "double_bp": True, "time_train": 0.0}
    scope |= {
        "lr_schedule": lambda t: public.LR,
        "loss_function": F.cross_entropy,
        "data": SimpleNamespace(shapes_dict={"cifar10": [1]}),
    }
    scope |= dict.fromkeys(("train_reg", "grad_norm_x", "avg_delta_l2"), 0)
    loop(source(clones, repository, "train.py"), "enumerate(train_batches)", scope)
    write("gradalign", repository, "loop of train.py, 3 batches, lambda 0.2", weights=parameters(f))


def main() -> None:
    clones = Path(sys.argv[1])
    for make in (mart, backward_smoothing, fast, n_fgsm, free, rice, gradalign):
        f = public.net()  # its initialisation draws too
        with on_the_cpu():
            make(clones, f)


if __name__ == "__main__":
    main()
