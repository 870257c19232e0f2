"""`krylov-at` steps written out straight: whole Hessians, the quadratic model maximised over a circle by search."""

import math

import pytest
import straight_line as paper
import torch
from stepwise import follow

EPS = 0.1


def direction(g, hessian, radius):
    """The point of the circle of that radius in span{g, Hg} with the largest <g, d> + d'Hd/2."""
    v, _ = torch.linalg.qr(torch.stack([g, hessian @ g], 1))
    slope, t = v.T @ g, v.T @ hessian @ v
    low, high = 0.0, 2 * math.pi
    for _ in range(12):  # ever finer, around the best
        angle = torch.linspace(low, high, 2001, dtype=g.dtype)
        q = radius * torch.stack([angle.cos(), angle.sin()])
        value = slope @ q + 0.5 * (q * (t @ q)).sum(0)
        best, width = float(angle[value.argmax()]), (high - low) / 1000
        low, high = best - width, best + width
    return v @ (radius * torch.tensor([math.cos(best), math.sin(best)], dtype=g.dtype))


def one_step(steps, norm):
    def step(w, stats, velocity, x, label, draws, number):
        alpha, x_k = min(EPS, 2.5 * EPS / steps), x
        for _ in range(steps):
            moved = []
            for image, k in zip(x_k, label, strict=True):

                def loss(v, image=image, k=k):
                    return paper.cross_entropy(paper.logits(v.view(1, *image.shape), w, stats, "eval"), k[None])

                flat = image.flatten()
                g = torch.autograd.functional.jacobian(loss, flat)
                h = torch.autograd.functional.hessian(loss, flat)
                if norm == "l2":
                    d = direction(g, h, alpha)
                else:
                    d = alpha * direction(g, h, alpha * math.sqrt(len(flat))).sign()
                moved.append((flat + d).view_as(image))
            x_k = into_box(torch.stack(moved), x, norm)
        here = paper.leaves(w)
        loss = paper.cross_entropy(paper.logits(x_k, here, stats, "update"), label)
        paper.sgd(w, paper.gradient(loss, here), velocity)
        return float(loss.detach())

    return step


def into_box(x_new, x, norm):
    """The nearest point of ball and box; in l2 x + P, P = clip((x_new - x) * s), s by bisection."""
    if norm == "linf":
        return paper.into_ball(x_new, x, EPS)
    out = []
    for a, b in zip(x_new, x, strict=True):
        low, high = 0.0, 1.0  # b + s (a - b), clipped: s = 1 is the point itself
        inside = (a.clamp(0, 1) - b).square().sum().sqrt() <= EPS
        for _ in range(100):
            middle = (low + high) / 2
            longer = ((b + middle * (a - b)).clamp(0, 1) - b).square().sum().sqrt() > EPS
            low, high = (low, middle) if longer else (middle, high)
        out.append(a.clamp(0, 1) if inside else (b + low * (a - b)).clamp(0, 1))
    return torch.stack(out)


@pytest.mark.parametrize(("norm", "steps"), [("linf", None), ("l2", None), ("linf", 1)])
def test_krylov_at_is_the_algorithm(norm, steps):
    """``None``: the preset as shipped."""
    fields = {"inner": {"craft": {"attack": {"steps": steps}}}} if steps else {}
    follow("krylov-at", fields, one_step(steps or 3, norm), norm=norm, batch=4)
