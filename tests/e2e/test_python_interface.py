"""The public functions, used as the README shows them."""

import pytest
import torch

import robustlab as rl
from robustlab.types import UserError


@pytest.fixture(scope="module")
def digits():
    from robustlab.data.digits import Digits

    (batch,) = Digits().load().test.batches([torch.arange(24)])
    return batch[0], batch[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "pgd-at"
    outcome = rl.train("configs/digits/pgd-at.yaml", str(out), settings=("training.epochs=4", "training.probe.every=4"))
    assert outcome.epochs == 4
    return out / "best.safetensors"


def test_a_checkpoint_alone_gives_the_model_back_and_it_can_be_attacked_and_scored(trained, digits):
    x, y = digits
    f = rl.load_model(str(trained))
    assert f.robustlab_meta["trainer"] == "pgd-at"
    attack = rl.create_attack("pgd", norm="linf", eps=0.1, steps=5)
    x_adv = attack(f, x, y, seed=0)
    assert float((x_adv - x).abs().amax()) <= 0.1 + 1e-6
    assert torch.equal(x_adv, attack(f, x, torch.nn.functional.one_hot(y, 10).float(), seed=0))
    result = rl.evaluate(f, (x, y), suite="pgd-20", norm="linf", eps=0.1, seed=0)
    clean = float((f(x).argmax(1) == y).float().mean())
    assert result.clean_accuracy == pytest.approx(clean)
    assert result.robust_accuracy <= clean
    assert result.interval[0] <= result.robust_accuracy <= result.interval[1]
    assert int(result.robust.sum()) == round(result.robust_accuracy * 24)
    assert list(result.per_attack) == ["pgd"]
    assert result.cost["backwards"] > 0


def test_the_reliability_report_is_made_unless_asked_otherwise_and_costs_a_tenth_at_most(trained, digits):
    f, rows = rl.load_model(str(trained)), 0

    def count(module, args, out):
        nonlocal rows
        rows += len(out)

    f.register_forward_hook(count)

    def cost(suite, **options):
        nonlocal rows
        rows = 0
        return rl.evaluate(f, digits, suite, norm="linf", eps=0.1, **options), rows

    result, with_report = cost("pgd-50-10")
    plain, without = cost("pgd-50-10", reliability=False)
    assert torch.equal(result.robust, plain.robust)
    assert result.reliability["verdict"] is not None
    assert plain.reliability is None
    assert with_report - without == result.reliability["forwards"] > 0
    assert sum(result.reliability[k] for k in ("forwards", "backwards")) <= 0.1 * (plain.cost["forwards"] + plain.cost["backwards"])
    result, with_report = cost("pgd-20", num_examples=1)
    assert with_report == cost("pgd-20", num_examples=1, reliability=False)[1]
    assert result.reliability["verdict"] is None
    assert cost("pgd-20", batch_size=8, shard=(1, 3))[0].reliability is None


def test_data_may_be_a_dataset_or_a_loader_and_the_verdicts_are_the_same(trained, digits):
    x, y = digits
    f = rl.load_model(str(trained))
    dataset = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(dataset, batch_size=5)
    ways = [rl.evaluate(f, d, suite="pgd-20", norm="linf", eps=0.1).robust for d in ((x, y), dataset, loader)]
    assert torch.equal(ways[0], ways[1])
    assert torch.equal(ways[0], ways[2])


def test_corrupt_is_seeded(digits):
    x, _ = digits
    a, b, c = (rl.corrupt(x, "gaussian_noise", severity=3, table="cifar", seed=s) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_lists_name_what_exists():
    assert {"fgsm", "pgd", "apgd", "autoattack-reference"} <= set(rl.list_attacks())
    assert {"standard", "pgd-at", "trades", "awp"} <= set(rl.list_trainers())
    assert {"pgd-20", "pgd-50-10", "autoattack-reference", "corruptions-quick"} <= set(rl.list_suites())
    assert {"small_cnn", "preact_resnet18", "wide_resnet", "timm", "torchvision"} <= set(rl.list_models())
    assert {"digits", "cifar10", "imagenet", "npz", "gaussians"} <= set(rl.list_datasets())
    assert len(rl.list_corruptions()) >= 5


def net(num_classes):
    return rl.create_model("small_cnn", num_classes=num_classes, in_channels=1)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda x, y: rl.create_attack("pdg"), "did you mean 'pgd'"),
        (lambda x, y: rl.create_attack("pgd", norm="linf", eps=8), "did you mean 8/255"),
        (lambda x, y: rl.create_attack("pgd", norm="linf", eps=float("nan")), "expected a number >= 0"),
        (lambda x, y: rl.create_model("small_cnn"), "num_classes"),
        (lambda x, y: rl.load_model("nothing.safetensors"), "no such file"),
        (
            lambda x, y: rl.evaluate(net(10), (x * 255, y), "pgd-20", norm="linf", eps=0.1),
            "0, 1",
        ),
        (
            lambda x, y: rl.evaluate(net(10), (x, y), "pgd-20", norm="linf"),
            "together",
        ),
        (
            lambda x, y: rl.evaluate(net(5), (x, y), "pgd-20", norm="linf", eps=0.1),
            "0..4",
        ),
        (
            lambda x, y: rl.evaluate(net(10), (x[:0], y[:0]), "pgd-20", norm="linf", eps=0.1),
            "no images",
        ),
        (lambda x, y: rl.corrupt(x, "gausian_noise", severity=1), "did you mean 'gaussian_noise'"),
    ],
)
def test_what_is_wrong_is_one_line(call, line, digits):
    with pytest.raises((UserError, ValueError)) as caught:
        call(*digits)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
