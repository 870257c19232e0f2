"""Adversarial images on disk: what is kept of each sample, in which order, through kills; and scored again."""

import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from robustlab import config, geometry
from robustlab.evaluation import adversarial
from robustlab.evaluation.adversarial import Images
from robustlab.evaluation.rescore import rescore
from robustlab.evaluation.runner import evaluate
from robustlab.files import atomic_write
from robustlab.rng import Rng
from robustlab.types import Suite, Threat, UserError, one_hot, with_threat

N, BATCH, EPS = 23, 5, 0.06
HERE = Threat("linf", EPS)


def make_suite(*attacks, **fields):
    attacks = tuple(config.build("attack", a) for a in attacks)
    return type("Toy", (Suite,), {"name": "toy"})(attacks=attacks, **fields)


WEAK = {"name": "pgd", "steps": 1, "rel_step": 0.3, "start": "zero"}
SUITE = make_suite(WEAK, {"name": "spsa", "queries": 40, "pairs": 4}, {"name": "apgd", "steps": 5})


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    f = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(6 * 4 * 5, 4)).eval()
    x = torch.rand(N, 3, 6, 7, generator=torch.Generator().manual_seed(1))
    y = f(x).argmax(1)
    y[::6] = (y[::6] + 1) % 4
    return f, x, y


def go(problem, path, out=None, **options):
    f, x, y = problem
    fields = {"threat": HERE, "batch_size": BATCH, "out": out, **options}
    return evaluate(f, (x, y), fields.pop("suite", SUITE), save_adversarial=path, **fields)


@pytest.fixture(params=[".npz", ".safetensors"])
def path(request, tmp_path):
    return tmp_path / f"adv{request.param}"


def by_hand(problem):
    """What has to be kept, from attacks run on the whole batch at once by their rng."""
    kept = {}

    f, x, y = problem
    images, alive = x.clone(), f(x).argmax(1) == y
    for position, attack in enumerate(SUITE.attacks):
        rows = alive.nonzero().squeeze(1)
        rng = Rng(0).child("evaluate", "linf", repr(EPS), position, attack.name).at(rows)
        x_adv, _ = with_threat(attack, HERE).run(f, x[rows], one_hot(y[rows], 4), rng)
        images[rows] = geometry.project(x_adv, x[rows], "linf", EPS).clamp(0, 1)
        alive = alive.clone()
        alive[rows] = f(images[rows]).argmax(1) == y[rows]
        kept[attack.name] = int(alive.sum())
    return images, alive, kept


# ------------------------------------------------------------------------------------------------------ what is kept


def test_every_image_is_kept_in_order(problem, path):
    f, x, y = problem
    result = go(problem, path)
    file = Images(path)
    images, alive, kept = by_hand(problem)
    assert int(result.clean.sum()) > kept["pgd"] > kept["apgd"] > 0
    torch.testing.assert_close(file.between(0, N)[1], images, atol=1e-6, rtol=0)
    assert torch.equal(file.index, torch.arange(N))
    assert torch.equal(file.y, y)
    assert torch.equal(file.verdict.bool(), result.robust)
    assert torch.equal(result.robust, alive)
    x_adv = file.between(0, N)[1]
    wrong = ~result.clean
    assert torch.equal(x_adv[wrong], x[wrong])  # misclassified from the start: the clean image
    assert torch.equal(f(x_adv).argmax(1) == y, result.robust)
    assert file.threat() == HERE
    assert file.meta["suite"] == "toy"
    assert not list(path.parent.glob("*.part"))
    assert not list(path.parent.glob(".*.tmp"))


def test_a_shard_keeps_its_own_images(problem, path):
    go(problem, path)
    piece = path.with_name(f"piece{path.suffix}")
    go(problem, piece, shard=(2, 3))
    whole, own = Images(path), Images(piece)
    assert own.index.tolist() == [i for i in range(N) if i // BATCH % 3 == 1]
    assert torch.equal(own.between(0, N)[1], whole.between(0, N)[1][own.index])
    assert torch.equal(own.verdict, whole.verdict[own.index])


def test_plain_libraries_read_the_files(problem, tmp_path):
    y = problem[2]
    go(problem, tmp_path / "a.npz")
    go(problem, tmp_path / "a.safetensors")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        meta = json.loads(file.metadata()["robustlab"])
    assert json.loads(str(arrays.pop("meta"))) == meta
    assert set(arrays) == set(tensors) == {"x_adv", "y", "verdict", "index"}
    for name, value in arrays.items():
        assert value.dtype == tensors[name].dtype
        assert np.array_equal(value, tensors[name])
    assert (arrays["x_adv"].dtype, arrays["x_adv"].shape) == (np.float32, (N, 3, 6, 7))
    assert np.array_equal(arrays["y"], y.numpy())
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None


def test_the_search_is_the_same_with_and_without_a_file(problem, tmp_path):
    plain = go(problem, None, tmp_path / "a")
    kept = go(problem, tmp_path / "x.npz", tmp_path / "b")
    lines = [[json.loads(v) | {"seconds": 0} for v in (tmp_path / k / "ledger.jsonl").read_text().splitlines()] for k in "ab"]
    assert lines[0] == lines[1]
    assert torch.equal(plain.robust, kept.robust)


def test_a_large_file_is_copied_in_pieces(problem, path, monkeypatch):
    go(problem, path)
    whole = Images(path).between(0, N)[1]
    monkeypatch.setattr(adversarial, "CHUNK", 100)
    again = path.with_name(f"again{path.suffix}")
    go(problem, again)
    assert torch.equal(Images(again).between(0, N)[1], whole)


# ------------------------------------------------------------------------------------------------------------- kills


class Killed(Exception):
    pass


@pytest.mark.parametrize("every", [1, 3, 8])
def test_killed_and_resumed_it_holds_the_same_images(problem, path, tmp_path, every):
    straight = tmp_path / f"straight{path.suffix}"
    go(problem, straight, tmp_path / "s")
    out, runs = tmp_path / "k", 0
    while True:
        seen, before = [0], len((out / "ledger.jsonl").read_text().splitlines()) if out.exists() else 1

        def stop(event, seen=seen, moment=before - 1 + every):
            seen[0] += 1
            if seen[0] == moment:
                raise Killed

        try:
            go(problem, path, out, resume=True, progress=stop)
            break
        except Killed:
            runs += 1
            assert not path.exists()
            assert path.with_name(f"{path.name}.part").exists()
    assert runs >= 2
    a, b = Images(straight), Images(path)
    assert torch.equal(a.between(0, N)[1], b.between(0, N)[1])
    assert torch.equal(a.verdict, b.verdict)
    written = path.read_bytes()
    go(problem, path, out, resume=True)  # it is finished already
    assert path.read_bytes() == written
    path.with_name(f"{path.name}.part").write_bytes(b"left over")
    go(problem, path, out, resume=True)
    assert not path.with_name(f"{path.name}.part").exists()


def test_a_killed_search_between_image_and_ledger_is_repeated(problem, path, tmp_path, monkeypatch):
    """The images are there, the line is not: the search is run again and overwrites them."""
    from robustlab.evaluation.ledger import Ledger

    append, count = Ledger.append, [0]

    def failing(self, entry):
        count[0] += 1
        if count[0] == 7:
            raise Killed
        append(self, entry)

    monkeypatch.setattr(Ledger, "append", failing)
    with pytest.raises(Killed):
        go(problem, path, tmp_path / "k")
    monkeypatch.setattr(Ledger, "append", append)
    go(problem, path, tmp_path / "k", resume=True)
    straight = tmp_path / f"straight{path.suffix}"
    go(problem, straight)
    assert torch.equal(Images(path).between(0, N)[1], Images(straight).between(0, N)[1])


# ---------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_kept(problem, tmp_path):
    out = tmp_path / "out"
    for name, suite, message in (
        ("a.pt", SUITE, "adversarial images are saved as .npz or .safetensors"),
        ("a.npz", make_suite("fgsm", norms=("linf",), eps=(0.1, 0.2)), "saved for one threat model, and this suite has 2"),
        ("a.npz", make_suite(), "saved for one threat model, and this suite has none"),
    ):
        with pytest.raises(UserError, match=message):
            go(problem, tmp_path / name, out, suite=suite)
        assert not out.exists()
    atomic_write(tmp_path / "b.npz", b"mine")
    with pytest.raises(UserError, match=r"b\.npz: exists already"):
        go(problem, tmp_path / "b.npz", out)
    with pytest.raises(UserError, match=r"b\.npz: exists already"):
        go(problem, tmp_path / "b.npz", out, resume=True)
    assert (tmp_path / "b.npz").read_bytes() == b"mine"
    assert not out.exists()


def test_a_run_that_kept_nothing_cannot_begin_to(problem, tmp_path):
    go(problem, None, tmp_path / "a")
    with pytest.raises(UserError, match="the earlier run kept no adversarial images here"):
        go(problem, tmp_path / "late.npz", tmp_path / "a", resume=True)
    part = tmp_path / "late.npz.part"
    part.write_bytes(b"of another evaluation" * 100)
    with pytest.raises(UserError, match="the earlier run kept no adversarial images here"):
        go(problem, tmp_path / "late.npz", tmp_path / "a", resume=True)


# ----------------------------------------------------------------------------------------------------------- rescore


def test_rescored_it_says_what_the_run_said(problem, path):
    f, x, y = problem
    result = go(problem, path)
    for batch_size in (1, 4, 100):
        found = rescore(f, (x, y), path, batch_size=batch_size)
        assert (found.n, found.clean, found.robust) == (N, int(result.clean.sum()), int(result.robust.sum()))
        assert (found.robust_accuracy, found.interval) == (result.robust_accuracy, result.interval)
        assert (found.outside, found.changed) == (0, 0)
        assert found.threat == HERE
        assert found.reached == pytest.approx(EPS, rel=1e-5)


def test_images_outside_the_ball_are_projected_and_reported(problem, path):
    f, x, y = problem
    go(problem, path)
    small = rescore(f, (x, y), path, threat=Threat("linf", 0.0))
    assert (small.robust, small.clean) == (int((f(x).argmax(1) == y).sum()),) * 2
    assert small.outside == int((Images(path).between(0, N)[1] - x).flatten(1).abs().amax(1).gt(1e-4).sum()) > 0
    assert small.changed > 0
    half = rescore(f, (x, y), path, threat=Threat("linf", EPS / 2))
    expected = geometry.project(Images(path).between(0, N)[1], x, "linf", EPS / 2)
    correct = (f(x).argmax(1) == y) & (f(expected).argmax(1) == y)
    assert half.robust == int(correct.sum())


def test_a_misclassified_clean_image_is_not_robust(problem, tmp_path):
    """A file may hold an image that is classified correctly for a sample that is not when clean."""
    f, x, y = problem
    x_adv = config.build("attack", "pgd", norm="linf", eps=EPS)(f, x, y)
    y = f(x_adv).argmax(1)
    clean = f(x).argmax(1) == y
    assert 0 < int(clean.sum()) < N
    np.savez(tmp_path / "a.npz", x_adv=x_adv.numpy())
    found = rescore(f, (x, y), tmp_path / "a.npz", threat=HERE)
    assert found.robust == found.clean == int(clean.sum())


def test_foreign_files(problem, tmp_path):
    f, x, y = problem
    np.savez_compressed(tmp_path / "a.npz", x_adv=x.numpy().astype(np.float64), index=np.arange(N), y=y.numpy())
    save_file({"x_adv": x[3:9].contiguous(), "index": torch.arange(3, 9)}, tmp_path / "b.safetensors")
    clean = f(x).argmax(1) == y
    found = rescore(f, (x, y), tmp_path / "a.npz", threat=HERE)
    assert (found.robust, found.changed) == (int(clean.sum()), None)
    part = rescore(f, (x, y), tmp_path / "b.safetensors", threat=HERE, batch_size=4)
    assert (part.n, part.robust) == (6, int(clean[3:9].sum()))
    with pytest.raises(UserError, match="names no threat model; give --norm and --eps"):
        rescore(f, (x, y), tmp_path / "a.npz")
    with pytest.raises(UserError, match="two of the files hold the image 3"):
        found + part


def test_a_model_in_training_mode_is_scored_in_eval_mode(problem, path):
    x, y = problem[1:]
    f = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(126, 4)).train()
    with torch.no_grad():
        y = f.eval()(x).argmax(1)
    np.savez(path.with_suffix(".npz"), x_adv=x.numpy())
    f.train()
    assert rescore(f, (x, y), path.with_suffix(".npz"), threat=HERE).robust == N
    assert f.training


def broken_files(x, y):
    bad = x.clone()
    bad[4, 0, 0, 0] = float("nan")
    swapped = y.clone()
    swapped[5] = (y[5] + 1) % 4
    return {
        "no x_adv": ({"images": x}, "holds no x_adv; it has images"),
        "three dimensions": ({"x_adv": x[:, 0]}, r"x_adv has shape \(23, 6, 7\); expected \(n, C, H, W\)"),
        "other images": ({"x_adv": x[:, :, :, :5]}, r"images of shape \(3, 6, 5\), but the data has \(3, 6, 7\)"),
        "not a number": ({"x_adv": bad}, "values that are not finite numbers"),
        "other labels": ({"x_adv": x, "y": swapped}, "the label of image 5 is not the data's"),
        "short labels": ({"x_adv": x, "y": y[:9]}, r"y has shape \(9,\); expected \(23,\)"),
        "not rising": ({"x_adv": x, "index": torch.arange(N).flip(0)}, "index must rise"),
        "beyond the end": ({"x_adv": x, "index": torch.arange(N) + 3}, "position 25, and the data ends after 23"),
    }


@pytest.mark.parametrize("what", list(broken_files(torch.rand(N, 3, 6, 7), torch.zeros(N, dtype=torch.long))))
def test_files_that_do_not_fit(problem, path, what):
    f, x, y = problem
    tensors, message = broken_files(x, y)[what]
    if path.suffix == ".npz":
        np.savez(path, **{k: v.numpy() for k, v in tensors.items()})
    else:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    with pytest.raises(UserError, match=message) as error:
        rescore(f, (x, y), path, threat=HERE, batch_size=8)
    assert len(error.value.lines) == 1
    assert str(error.value).startswith(str(path))


def test_files_that_are_none(problem, path):
    f, x, y = problem
    if path.suffix == ".npz":
        with open(path, "wb") as file:
            np.save(file, x.numpy())  # an array alone
        with pytest.raises(UserError, match="cannot read adversarial images: "):
            rescore(f, (x, y), path, threat=HERE)
        path.unlink()
    for content in (None, b"", b"nothing of the kind" * 20, b"PK\x03\x04" + b"\0" * 40):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path.name}: cannot read adversarial images: "):
            rescore(f, (x, y), path, threat=HERE)
    np.savez(path.with_suffix(".npz"), x_adv=np.array([{"a": 1}], dtype=object))  # a pickle is never loaded
    with pytest.raises(UserError, match="cannot read adversarial images: Object arrays cannot be loaded"):
        rescore(f, (x, y), path.with_suffix(".npz"), threat=HERE)
