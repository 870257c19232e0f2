"""Architectures: against straight-line references, over sizes and channels, and the mistakes one can make."""

import pytest
import torch
from torch.nn.functional import batch_norm, conv2d, dropout, linear, relu, silu

from robustlab import config
from robustlab.models import create_model
from robustlab.models.layers import Fit, Normalize
from robustlab.types import UserError

SMALL = [
    ("small_cnn", {}),
    ("small_cnn", {"norm": "group", "activation": "silu", "width": 8}),
    ("small_cnn", {"norm": "none", "width": 3}),
    ("preact_resnet18", {}),
    ("wide_resnet", {"depth": 10, "width": 1}),
    ("wide_resnet", {"depth": 16, "width": 2, "activation": "silu", "dropout": 0.3}),
]


@pytest.mark.parametrize("size", [8, 28, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "fields"), SMALL)
def test_sizes_channels_and_gradients(name, fields, size, channels):
    f = create_model(name, num_classes=7, in_channels=channels, mean=(0.4,) * channels, std=(0.2,) * channels, **fields)
    x = torch.rand(2, channels, size, size, requires_grad=True)
    z = f(x)
    assert z.shape == (2, 7)
    z.logsumexp(1).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in f.parameters())
    assert float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["preact_resnet34", "preact_resnet50", "timm:resnet10t", "torchvision:squeezenet1_1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_larger_ones_at_32_px(name, channels):
    f = create_model(name, num_classes=5, in_channels=channels).eval()
    with torch.no_grad():
        assert f(torch.rand(1, channels, 32, 32)).shape == (1, 5)


# Counts of the authors' and of the widely used implementations, for ten classes and colour images.
@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [
        ("wide_resnet", {"depth": 28, "width": 10}, 36_479_194),
        ("wide_resnet", {"depth": 34, "width": 10}, 46_160_474),
        ("wide_resnet", {"depth": 70, "width": 16}, 266_796_506),
        ("preact_resnet18", {}, 11_172_170),
    ],
)
def test_parameter_counts(name, fields, count):
    with torch.device("meta"):
        f = create_model(name, num_classes=10, **fields)
    assert sum(p.numel() for p in f.parameters()) == count


def randomized(f):
    """In float64, eval mode, with BatchNorm statistics and scales that matter."""
    f = f.double().eval()
    for m in f.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.1)
    return f


def bn(x, s, name):
    return batch_norm(x, *(s[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))


def test_preact_resnet18_from_its_formula():
    f = randomized(create_model("preact_resnet18", num_classes=4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1)))
    s, x = f.state_dict(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    h = (x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.1]).view(3, 1, 1)
    h = conv2d(h, s["conv1.weight"], padding=1)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            p, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            a = relu(bn(h, s, f"{p}.bn1"))
            skip = conv2d(a, s[f"{p}.shortcut.0.weight"], stride=stride) if stride == 2 else h
            a = conv2d(a, s[f"{p}.conv1.weight"], stride=stride, padding=1)
            h = skip + conv2d(relu(bn(a, s, f"{p}.bn2")), s[f"{p}.conv2.weight"], padding=1)
    z = linear(relu(bn(h, s, "bn")).mean((2, 3)), s["linear.weight"], s["linear.bias"])
    assert torch.allclose(f(x), z, rtol=1e-6)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_wide_resnet_from_its_formula(act):
    f = randomized(create_model("wide_resnet", num_classes=4, in_channels=1, depth=16, width=2, activation=act, dropout=0.4))
    s, x = f.state_dict(), torch.rand(2, 1, 16, 16, dtype=torch.float64)
    fn = {"relu": relu, "silu": silu}[act]
    h = conv2d(x, s["conv1.weight"], padding=1)
    for group in (1, 2, 3):
        for block in (0, 1):
            p, stride = f"block{group}.layer.{block}", 2 if group > 1 and block == 0 else 1
            a = fn(bn(h, s, f"{p}.bn1"))
            skip = conv2d(a, s[f"{p}.convShortcut.weight"], stride=stride) if block == 0 else h
            a = fn(bn(conv2d(a, s[f"{p}.conv1.weight"], stride=stride, padding=1), s, f"{p}.bn2"))
            h = skip + conv2d(dropout(a, 0.4, training=False), s[f"{p}.conv2.weight"], padding=1)
    z = linear(fn(bn(h, s, "bn1")).mean((2, 3)), s["fc.weight"], s["fc.bias"])
    assert torch.allclose(f(x), z, rtol=1e-6)
    f.train()
    assert not torch.equal(f(x), f(x))  # dropout is at work


def test_no_layer_works_in_place():
    for name, fields in SMALL:
        f = create_model(name, num_classes=3, in_channels=1, **fields)
        assert not any(getattr(m, "inplace", False) for m in f.modules()), name


# ------------------------------------------------------------------------------------------------------ normalisation


def test_normalisation_comes_first_and_is_saved():
    f = create_model("small_cnn", num_classes=3, mean=(0.3,), std=(0.5,))
    first = next(f.children())
    assert isinstance(first, Normalize)
    x = torch.rand(2, 1, 8, 8)
    assert torch.allclose(first(x), (x - 0.3) / 0.5)
    assert {"normalize.mean", "normalize.std"} <= set(f.state_dict())


def test_shift_and_scale_of_images_are_undone_by_mean_and_std():
    f = create_model("small_cnn", num_classes=3, in_channels=1).eval()
    g = create_model("small_cnn", num_classes=3, mean=(0.2,), std=(0.4,)).eval()
    g.load_state_dict(f.state_dict() | {k: v for k, v in g.state_dict().items() if k.startswith("normalize")})
    x = torch.rand(2, 1, 8, 8)
    assert torch.allclose(f(x), g(x * 0.4 + 0.2), atol=1e-5)


# ----------------------------------------------------------------------------------------------- timm and torchvision


def test_timm_normalises_and_fits_as_its_data_configuration_says():
    import timm

    f = create_model("timm:resnet10t", num_classes=4).eval()
    own = timm.data.resolve_model_data_config(f.net)
    assert f.normalize.mean.flatten().tolist() == pytest.approx(own["mean"])
    size = own["input_size"][-1]
    x = torch.rand(1, 3, size, size)
    mean, std = (torch.tensor(own[k]).view(3, 1, 1) for k in ("mean", "std"))
    assert torch.allclose(f(x), f.net((x - mean) / std), atol=1e-5)
    seen = []
    f.net.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    f(torch.rand(1, 3, 40, 60))
    assert seen == [(1, 3, size, size)]


def test_without_fit_images_keep_their_size():
    f = create_model("timm:resnet10t", num_classes=4, fit=False).eval()
    seen = []
    f.net.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    f(torch.rand(1, 3, 40, 40))
    assert seen == [(1, 3, 40, 40)]


def test_fit_agrees_with_torchvision():
    from torchvision.transforms import v2

    for shape in [(40, 60), (37, 20), (16, 16)]:
        for mode in ("bilinear", "bicubic"):
            x = torch.rand(1, 3, *shape)
            reference = v2.Compose([v2.Resize(20, v2.InterpolationMode(mode), antialias=True), v2.CenterCrop(16)])(x)
            out = Fit(16, 20, mode)(x)
            assert torch.allclose(out, x if shape == (16, 16) else reference, atol=1e-6)


def test_torchvision_repeats_grey_images():
    f = create_model("torchvision:squeezenet1_1", num_classes=4, in_channels=1).eval()
    grey = torch.rand(1, 1, 224, 224)
    with torch.no_grad():
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        assert torch.allclose(f(grey), f.net((grey.repeat(1, 3, 1, 1) - mean) / std), atol=1e-5)


def test_pretrained_torchvision_gets_a_new_head_for_other_classes(monkeypatch):
    from torchvision import models

    published = models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: published)
    whole = create_model("torchvision:resnet18", init="pretrained")
    assert torch.equal(whole.net.fc.weight, published["fc.weight"])
    other = create_model("torchvision:resnet18", init="pretrained", num_classes=7)
    assert other.net.fc.weight.shape == (7, 512)
    assert torch.equal(other.net.conv1.weight, published["conv1.weight"])


def test_weights_that_cannot_be_had_are_one_line(monkeypatch):
    import timm

    def offline(*args, **kwargs):
        raise OSError("no network here\nand more")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.setattr(timm, "create_model", offline)
    for name in ("timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(UserError) as error:
            create_model(name, init="pretrained")
        assert str(error.value) == f"{name}: its pretrained weights cannot be had: no network here"


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "fields", "line"),
    [
        ("smal_cnn", {"num_classes": 2}, "unknown model 'smal_cnn' (did you mean 'small_cnn'?)"),
        ("small_cnn", {}, "small_cnn: give num_classes"),
        ("small_cnn", {"num_classes": 2, "widht": 3}, "widht: unknown key (did you mean 'width'?)"),
        ("small_cnn", {"num_classes": 2, "width": 12, "norm": "group"}, "must be divisible by 8"),
        ("small_cnn", {"num_classes": 2, "in_channels": 2}, "in_channels: expected"),
        ("small_cnn", {"num_classes": 2, "in_channels": 3, "mean": (0.5,)}, "mean and std need 3 numbers each"),
        ("small_cnn", {"num_classes": 2, "mean": (0.5,), "std": (0.0,)}, "std positive"),
        ("small_cnn", {"num_classes": 2, "init": "pretrained"}, "there are no such weights"),
        ("wide_resnet", {"num_classes": 2, "depth": 29}, "must be 6n + 4"),
        ("timm:resnt18", {"num_classes": 2}, "unknown arch 'resnt18' (did you mean 'resnet18'?)"),
        ("torchvision:resnet81", {"num_classes": 2}, "unknown arch 'resnet81' (did you mean 'resnet18'?)"),
        ("torchvision:resnet18", {"num_classes": 2, "mean": (0.5,), "std": (0.5,)}, "mean and std need 3 numbers each"),
    ],
)
def test_mistakes_are_one_line(name, fields, line):
    with pytest.raises(ValueError) as error:
        create_model(name, **fields)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "fields"), SMALL)
def test_a_dumped_model_is_built_again(name, fields):
    part = config.build("model", name, num_classes=3, in_channels=1, **fields)
    again = config.build("model", config.dump(part))
    assert again == part
    assert again.build().state_dict().keys() == part.build().state_dict().keys()
