"""`augrmixat` steps written out straight. The augmented images are given; tests/unit/test_augmix.py has them against Pillow."""

import straight_line as paper
import torch
from stepwise import CLASSES, SHAPE, follow, pgd, soft_cross_entropy

from robustlab.augment.augmix import AugMix
from robustlab.types import View

EPS, STEPS = 0.1, 10
seen = set()


def mixed(x, y, draws, stage):
    """mixup, CutMix or ResizeMix, by the draws of the stage's place."""
    source, n = draws.child("inner", stage), torch.tensor([draws.number])
    which = int(source.child("which").at(n).integers((), 3))
    seen.add(which)
    source = source.child("stage", which)
    j = source.child("partner").permutation(len(x))
    if which == 0:
        lam = float(source.child("lam").at(n).beta((), 1.0, 1.0))
        return lam * x + (1 - lam) * x[j], lam * y + (1 - lam) * y[j]
    if which == 1:
        cut = (1 - float(source.child("lam").at(n).beta((), 1.0, 1.0))) ** 0.5
        out, half, kept = x.clone(), int(6 * cut) // 2, 36
        centre = source.child("centre").at(n).integers((2,), torch.tensor([6, 6]))[0].tolist()
        for a in range(max(0, centre[0] - half), min(6, centre[0] + half)):
            for b in range(max(0, centre[1] - half), min(6, centre[1] + half)):
                out[:, :, a, b] = x[j][:, :, a, b]
                kept -= 1
        return out, kept / 36 * y + (1 - kept / 36) * y[j]
    tau = float(source.at(n).child("tau").uniform((), 0.1, 0.8))
    side = int(tau * 6)
    if side == 0:
        return x, y
    top, left = (int(source.at(n).child(a).integers((), 6 - side + 1)) for a in ("top", "left"))
    out, small = x.clone(), torch.nn.functional.interpolate(x[j], (side, side), mode="bilinear", antialias=True)
    for a in range(side):
        for b in range(side):
            out[:, :, top + a, left + b] = small[:, :, a, b]
    lam = 1 - side * side / 36
    return out, lam * y + (1 - lam) * y[j]


def step(w, stats, velocity, x, label, draws, number):
    start = draws.child("inner", 0).child("restart", 0).child("start").uniform(SHAPE, -EPS, EPS, torch.float64)
    x_adv, _ = pgd(x, label, start, EPS, STEPS, EPS / 4, w, stats, "eval")
    y = torch.eye(CLASSES, dtype=torch.float64)[label]
    key = torch.arange(len(x)) + number * len(x)
    x_aug = AugMix()(None, {"clean": View(x=x, y=y, key=key)}, draws.child("inner", 1))["clean"].x
    here, loss = paper.leaves(w), 0
    for stage, images in ((2, x), (3, x_aug), (4, x_adv)):
        x_mix, y_mix = mixed(images, y, draws, stage)
        loss = loss + soft_cross_entropy(paper.logits(x_mix, here, stats, "update"), y_mix) / 3
    paper.sgd(w, paper.gradient(loss, here), velocity)
    return float(loss.detach())


def test_augrmixat_is_the_composition():
    follow("augrmixat", {}, step, count=5)
    assert seen == {0, 1, 2}
