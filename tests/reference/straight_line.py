"""A small net, attacks and SGD written out from the papers' formulas with torch alone; nothing of robustlab is called.

The net: conv 3x3 - BatchNorm - relu - conv 3x3, stride 2 - BatchNorm - relu - flatten - linear - relu - linear.
"""

import torch
from torch import nn
from torch.nn import functional as F

MOMENTUM, NU = 0.1, 1e-5  # BatchNorm: weight of the newest statistics; added to the variance
LR, MU, DECAY = 0.05, 0.9, 5e-3  # SGD: learning rate, momentum, weight decay


def module():
    """The same net as a torch module, its names being those of :func:`logits`."""
    f = nn.Sequential()
    f.add_module("c1", nn.Conv2d(2, 4, 3, padding=1, bias=True))
    f.add_module("b1", nn.BatchNorm2d(4, eps=NU, momentum=MOMENTUM))
    f.add_module("r1", nn.ReLU())
    f.add_module("c2", nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False))
    f.add_module("b2", nn.BatchNorm2d(6, eps=NU, momentum=MOMENTUM))
    f.add_module("r2", nn.ReLU())
    f.add_module("flat", nn.Flatten())
    f.add_module("l1", nn.Linear(6 * 3 * 3, 8))
    f.add_module("r3", nn.ReLU())
    f.add_module("l2", nn.Linear(8, 5))
    for m in (f.b1, f.b2):  # away from the identity, so that a forgotten factor shows
        nn.init.uniform_(m.weight, 0.5, 1.5)
        nn.init.uniform_(m.bias, -0.5, 0.5)
        m.running_mean.uniform_(-0.5, 0.5)
        m.running_var.uniform_(0.5, 2.0)
    return f.double()


def batch_norm(h, w, stats, layer, mode):
    """``mode``: ``eval`` uses the running statistics; ``train`` those of the batch; ``update`` renews the running ones too."""
    mean, var = stats[f"{layer}.running_mean"], stats[f"{layer}.running_var"]
    if mode != "eval":
        n = h.shape[0] * h.shape[2] * h.shape[3]
        batch_mean = h.sum((0, 2, 3)) / n
        batch_var = ((h - batch_mean[None, :, None, None]) ** 2).sum((0, 2, 3)) / n
        if mode == "update":
            stats[f"{layer}.running_mean"] = (1 - MOMENTUM) * mean + MOMENTUM * batch_mean.detach()
            stats[f"{layer}.running_var"] = (1 - MOMENTUM) * var + MOMENTUM * batch_var.detach() * n / (n - 1)
            stats[f"{layer}.num_batches_tracked"] = stats[f"{layer}.num_batches_tracked"] + 1
        mean, var = batch_mean, batch_var
    out = (h - mean[None, :, None, None]) / (var[None, :, None, None] + NU).sqrt()
    return out * w[f"{layer}.weight"][None, :, None, None] + w[f"{layer}.bias"][None, :, None, None]


def logits(x, w, stats, mode):
    h = F.conv2d(x, w["c1.weight"], w["c1.bias"], padding=1)
    h = batch_norm(h, w, stats, "b1", mode).clamp_min(0)
    h = F.conv2d(h, w["c2.weight"], stride=2, padding=1)
    h = batch_norm(h, w, stats, "b2", mode).clamp_min(0)
    h = (h.reshape(len(x), -1) @ w["l1.weight"].T + w["l1.bias"]).clamp_min(0)
    return h @ w["l2.weight"].T + w["l2.bias"]


def cross_entropy(z, label):
    """Mean over the samples of -log softmax(z)[label]."""
    total = 0
    for i in range(len(z)):
        total = total - (z[i, label[i]] - z[i].exp().sum().log())
    return total / len(z)


def divergence(p, z):
    """Mean over the samples of KL(p || softmax z) = sum_k p_k (log p_k - log softmax(z)_k)."""
    q = z.exp() / z.exp().sum(1, keepdim=True)
    return (p * (p.log() - q.log())).sum() / len(z)


def softmax(z):
    return z.exp() / z.exp().sum(1, keepdim=True)


def into_ball(x_new, x, eps):
    """The linf ball around x, then the pixel range."""
    return torch.min(torch.max(x_new, x - eps), x + eps).clamp(0, 1)


def sgd(w, grad, velocity):
    """g + decay w;  v <- mu v + g;  w <- w - lr v."""
    for name in w:
        g = grad[name] + DECAY * w[name]
        velocity[name] = g if name not in velocity else MU * velocity[name] + g
        w[name] = (w[name] - LR * velocity[name]).detach()


def gradient(loss, w):
    return dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))


def leaves(w):
    return {name: value.detach().clone().requires_grad_(True) for name, value in w.items()}


def assert_same(f, optimizer, w, stats, velocity):
    """Weights, momentum buffers and BatchNorm's buffers agree to 1e-6 relative."""
    for name, p in f.named_parameters():
        torch.testing.assert_close(p.detach(), w[name], rtol=1e-6, atol=1e-10)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], velocity[name], rtol=1e-6, atol=1e-10)
    for name, b in f.named_buffers():
        torch.testing.assert_close(b, stats[name], rtol=1e-6, atol=0)
