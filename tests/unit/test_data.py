"""Data sets: split sizes, disjointness, stability, exact pixels, published file layouts, one clear line for every mistake."""

import gzip
import io
import math
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustlab.data import images as data_images
from robustlab.data.cifar10 import CIFAR10
from robustlab.data.cifar100 import CIFAR100
from robustlab.data.digits import Digits
from robustlab.data.fashion_mnist import FashionMNIST
from robustlab.data.gaussians import Gaussians
from robustlab.data.image_folder import ImageFolder
from robustlab.data.imagenet import ImageNet
from robustlab.data.images import MemoryImages, StreamImages, mean_std, stratified_split
from robustlab.data.mnist import MNIST
from robustlab.data.npz import Npz
from robustlab.data.svhn import SVHN
from robustlab.data.tiny_imagenet import TinyImageNet
from robustlab.types import UserError


def all_of(images, device="cpu"):
    (batch,) = images.batches([torch.arange(len(images))], device)
    return batch


# ------------------------------------------------------------------------------------------------------------- digits

FINGERPRINTS = {
    (8, 1): "82a5417d375248ec021b6ee0555d0c6959e5e90b1f2c7074f308a71597c12dd8",
    (16, 1): "7e546f429a54bcdf833bb230f8a884b2af568fa064e9f871a7e685ac54533b92",
    (32, 3): "f193d885aa59e0668ed073963ad877b298088505fded7625644e6587f173aea1",
}


@pytest.mark.parametrize(("size", "channels"), FINGERPRINTS)
def test_digits_are_the_same_everywhere(size, channels):
    splits = Digits(size=size, channels=channels).load()
    assert splits.fingerprint == FINGERPRINTS[size, channels]
    assert splits.image_shape == (channels, size, size)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [1097, 200, 500]
    assert splits.class_names == tuple("0123456789")


def test_digits_are_split_by_class_and_every_image_is_used_once():
    from sklearn.datasets import load_digits

    raw = load_digits()
    splits = Digits(size=8).load()
    parts = [splits.train, splits.validation, splits.test]
    for part in parts:
        share = part.labels.bincount(minlength=10) / len(part)
        whole = torch.from_numpy(raw.target).bincount() / 1797
        assert float((share - whole).abs().max()) <= 1 / len(part)
    seen = sorted((*x.flatten().tolist(), int(y)) for p in parts for x, y in zip(p.images, p.labels, strict=True))
    levels = np.floor(raw.images.reshape(1797, 64) * 255 / 16 + 0.5).astype(int)
    assert seen == sorted((*x.tolist(), int(y)) for x, y in zip(levels, raw.target, strict=True))


def test_digits_are_enlarged_bilinearly():
    small, large = Digits(size=8).load().test, Digits(size=16).load().test
    assert torch.equal(small.labels, large.labels)
    x = torch.nn.functional.interpolate(small.images.double(), scale_factor=2, mode="bilinear", align_corners=False)
    assert float((large.images - x).abs().max()) <= 1.0  # the 8 px images are rounded to uint8 themselves


# ------------------------------------------------------------------------------------------------------------- splits


def test_stratified_split_shares_disjointness_and_stability():
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate([1000, 301, 50, 7, 1])])
    a, b, rest = stratified_split(labels, [300, 100], seed=4)
    assert sorted(torch.cat([a, b, rest]).tolist()) == list(range(len(labels)))
    assert (len(a), len(b)) == (300, 100)
    for part in (a, b):
        exact = labels.bincount() * len(part) / len(labels)
        assert float((labels[part].bincount(minlength=5) - exact).abs().max()) < 1
    again = stratified_split(labels, [300, 100], seed=4)
    assert all(torch.equal(p, q) for p, q in zip(again, (a, b, rest), strict=True))
    assert not torch.equal(stratified_split(labels, [300, 100], seed=5)[0], a)
    first = labels[a[:150]].bincount(minlength=5) / 150  # random order: the first half is a fair sample too
    assert float((first - labels.bincount() / len(labels)).abs().max()) < 0.12


def test_split_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match="cannot take 10 of 10"):
        stratified_split(torch.zeros(10, dtype=torch.long), [10])


# ------------------------------------------------------------------------------------------------------------- images


def test_batches_in_any_order_are_float_and_keep_positions():
    x = torch.randint(0, 256, (20, 3, 4, 5), dtype=torch.uint8)
    y = torch.arange(20) % 4
    rows = torch.tensor([19, 3, 3, 8, 0])
    for images, where in [(MemoryImages(x, y, 4), torch.arange(20)), (MemoryImages(x, y, 4, rows), rows)]:
        order = [torch.tensor([4, 0]), torch.tensor([2, 2, 1])]
        for positions, (bx, by, bi) in zip(order, images.batches(order), strict=True):
            assert bx.dtype == torch.float32
            assert torch.equal(bx, x[where[positions]].float() / 255)
            assert torch.equal(by, y[where[positions]])
            assert torch.equal(bi, positions)


class Squares(torch.utils.data.Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i == 13:
            raise UserError("image 13 is broken")
        return torch.full((1, 2, 2), i, dtype=torch.uint8), i % 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_answers_like_memory(workers):
    labels = torch.arange(12) % 3
    stream = StreamImages(Squares(12), labels, 3, workers)
    memory = MemoryImages(torch.arange(12, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2), labels, 3)
    order = [torch.tensor(b) for b in ([5, 1], [11], [0, 3, 2], [7, 7], [4], [6], [8], [9])]
    for a, b in zip(stream.batches(order), memory.batches(order), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_line(workers):
    stream = StreamImages(Squares(14), torch.arange(14) % 3, 3, workers)
    with pytest.raises(UserError) as error:
        list(stream.batches([torch.tensor([1]), torch.tensor([13])]))
    assert str(error.value) == "image 13 is broken"


def test_streams_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    list(StreamImages(Squares(5), torch.arange(5) % 3, 3).batches([torch.tensor([0, 1])]))
    assert torch.equal(torch.get_rng_state(), before)


def test_mean_and_std_are_those_of_all_pixels(monkeypatch):
    monkeypatch.setattr(data_images, "_CHUNK", 7)
    x = torch.randint(0, 256, (30, 3, 4, 5), dtype=torch.uint8)
    x[:, 2] = 9
    for images in (x, x.float() / 255):
        mean, std = mean_std(MemoryImages(images, torch.zeros(30, dtype=torch.long), 1))
        flat = x.double().transpose(0, 1).flatten(1) / 255
        assert mean == pytest.approx(flat.mean(1).tolist(), abs=2e-6)
        assert std == pytest.approx([*flat.std(1, correction=0).tolist()[:2], 1.0], abs=2e-6)


GOOD = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("x", "y", "line"),
    [
        (GOOD[0][:0], GOOD[1][:0], "s: no images"),
        (GOOD[0], torch.tensor([0, 1, 2, 1]), "s: labels must lie in 0..1, got 0..2"),
        (GOOD[0], torch.tensor([0, 1, -1, 1]), "s: labels must lie in 0..1, got -1..1"),
        (GOOD[0], GOOD[1][:3], "s: 4 images but 3 labels"),
        (GOOD[0], GOOD[1].float(), "whole numbers, got shape (4,) of torch.float32"),
        (GOOD[0][0], GOOD[1], "1 or 3 channels, got (3, 8, 8)"),
        (GOOD[0].expand(4, 3, 8, 8).repeat(1, 2, 1, 1), GOOD[1], "1 or 3 channels, got (4, 6, 8, 8)"),
        (GOOD[0].int(), GOOD[1], "images must be uint8, or floating point in [0, 1], got torch.int32"),
    ],
)
def test_wrong_images_and_labels_are_named(x, y, line):
    with pytest.raises(UserError) as error:
        MemoryImages(x, y, 2, source="s")
    assert line in str(error.value)


# ------------------------------------------------------------------------------------------- torchvision's, tiny files


def write_idx(folder: Path, train=60, test=20):
    """MNIST's four files, in the published format, gzipped."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    out = {}
    for name, n in [("train", train), ("t10k", test)]:
        x = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        y = (np.arange(n) % 10).astype(np.uint8)
        with gzip.open(folder / f"{name}-images-idx3-ubyte.gz", "wb") as f:
            f.write(struct.pack(">IIII", 2051, n, 28, 28) + x.tobytes())
        with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz", "wb") as f:
            f.write(struct.pack(">II", 2049, n) + y.tobytes())
        out[name] = x, y
    return out


@pytest.fixture
def any_md5(monkeypatch):
    """Accept small files in the place of the published ones; never reach the network."""
    from torchvision.datasets import cifar, svhn, utils

    def exists(path, md5=None):
        return os.path.isfile(path)

    for module in (cifar, svhn, utils):
        monkeypatch.setattr(module, "check_integrity", exists)
    monkeypatch.setattr(utils.urllib.request, "urlopen", offline)


def offline(*args, **kwargs):
    raise OSError("no network here")


@pytest.mark.parametrize(("cls", "folder"), [(MNIST, "MNIST"), (FashionMNIST, "FashionMNIST")])
def test_mnist_layout(tmp_path, any_md5, cls, folder):
    raw = write_idx(tmp_path / folder / "raw")
    splits = cls(root=str(tmp_path), validation=10).load()
    check_carved(splits, *raw["train"], *raw["t10k"], validation=10)
    assert len(splits.class_names) == 10


def check_carved(splits, x, y, x_test, y_test, validation):
    """Test is the published one in its order; train and validation are the published train set, each image once."""
    x, x_test = (torch.from_numpy(np.ascontiguousarray(v)).float().div(255) for v in (x, x_test))
    if x.ndim == 3:
        x, x_test = x[:, None], x_test[:, None]
    tx, ty, _ = all_of(splits.test)
    assert torch.equal(tx, x_test)
    assert torch.equal(ty, torch.as_tensor(np.asarray(y_test)).long())
    assert len(splits.validation) == validation
    parts = [all_of(s) for s in (splits.train, splits.validation)]
    seen = sorted((*i.flatten().tolist(), float(label)) for px, py, _ in parts for i, label in zip(px, py, strict=True))
    assert seen == sorted((*i.flatten().tolist(), float(label)) for i, label in zip(x, y, strict=True))
    assert splits.image_shape == tuple(x.shape[1:])


def write_cifar(folder: Path, fine: bool):
    folder.mkdir()
    rng = np.random.default_rng(1)
    k = 100 if fine else 10
    out = {}
    for names, n in [
        (["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)], 40),
        (["test"] if fine else ["test_batch"], 20),
    ]:
        xs, ys = [], []
        for name in names:
            x = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
            y = (np.arange(n) * 7 % k).tolist()
            (folder / name).write_bytes(pickle.dumps({"data": x, "fine_labels" if fine else "labels": y}))
            xs.append(x.reshape(n, 3, 32, 32))
            ys += y
        out[names[0]] = np.concatenate(xs), ys
    meta = {"fine_label_names" if fine else "label_names": [f"class {i}" for i in range(k)]}
    (folder / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps(meta))
    return out


def test_cifar_layouts(tmp_path, any_md5):
    raw = write_cifar(tmp_path / "cifar-10-batches-py", fine=False)
    splits = CIFAR10(root=str(tmp_path), validation=20).load()
    check_carved(splits, *raw["data_batch_1"], *raw["test_batch"], validation=20)
    assert splits.class_names[3] == "class 3"
    raw = write_cifar(tmp_path / "cifar-100-python", fine=True)
    splits = CIFAR100(root=str(tmp_path), validation=10).load()
    check_carved(splits, *raw["train"], *raw["test"], validation=10)
    assert splits.num_classes == 100


def test_svhn_layout(tmp_path, any_md5):
    from scipy.io import savemat

    rng = np.random.default_rng(2)
    raw = {}
    for name, n in [("train", 40), ("test", 20)]:
        x = rng.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        y = np.arange(n) % 10 + 1  # published as 1..10, where 10 is the digit 0
        savemat(tmp_path / f"{name}_32x32.mat", {"X": x, "y": y[:, None].astype(np.uint8)})
        raw[name] = x.transpose(3, 2, 0, 1), y % 10
    splits = SVHN(root=str(tmp_path), validation=10).load()
    check_carved(splits, *raw["train"], *raw["test"], validation=10)


@pytest.mark.parametrize("cls", [MNIST, FashionMNIST, CIFAR10, CIFAR100, SVHN])
@pytest.mark.parametrize("download", [True, False])
def test_missing_files_are_one_line(tmp_path, any_md5, capsys, cls, download):
    with pytest.raises(UserError) as error:
        cls(root=str(tmp_path), download=download).load()
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(f"{cls.name}: files missing")
    assert str((tmp_path / cls.folder).resolve()) in line
    assert cls.files in line
    assert capsys.readouterr().out == ""


def test_damaged_files_are_one_line(tmp_path, any_md5):
    write_idx(tmp_path / "MNIST" / "raw")
    MNIST(root=str(tmp_path), validation=10).load()
    broken = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError, match="mnist: files missing or damaged") as error:
        MNIST(root=str(tmp_path), validation=10).load()
    assert "\n" not in str(error.value)


def test_root_is_the_field_then_the_environment_then_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ROBUSTLAB_DATA", "/from/environment")
    assert data_images.data_root("/given") == Path("/given")
    assert data_images.data_root(None) == Path("/from/environment")
    monkeypatch.delenv("ROBUSTLAB_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_images.data_root(None) == tmp_path / ".cache/robustlab"


def test_published_fashion_mnist(tmp_path):
    folder = os.environ.get("ROBUSTLAB_TEST_DATA")
    if not folder or not Path(folder, "fashion-mnist").is_dir():
        pytest.skip("ROBUSTLAB_TEST_DATA names no folder with fashion-mnist/*.gz")
    raw = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(Path(folder, "fashion-mnist"), raw)
    splits = FashionMNIST(root=str(tmp_path)).load()
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [55000, 5000, 10000]
    assert splits.validation.labels.bincount().tolist() == [500] * 10
    assert splits.mean == pytest.approx((0.286,), abs=1e-3)  # the value that is quoted everywhere for the 60,000
    assert splits.std == pytest.approx((0.353,), abs=1e-3)


# ------------------------------------------------------------------------------------------------------------ folders


def write_image(path: Path, value: int, size=(10, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value // 2, 7)).save(path)


def small(**fields):
    return ImageFolder(resize=8, size=8, num_workers=0, **fields)


def test_image_folder_with_all_three(tmp_path):
    for split, n in [("train", 6), ("val", 2), ("test", 3)]:
        for c, name in enumerate(["ape", "bee"]):
            for i in range(n):
                write_image(tmp_path / split / name / f"{i}.png", 100 * c + i)
    splits = small(root=str(tmp_path)).load()
    assert splits.class_names == ("ape", "bee")
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [12, 4, 6]
    x, y, _ = all_of(splits.test)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    assert (x[:, 0, 4, 4] * 255).round().tolist() == [0, 1, 2, 100, 101, 102]
    assert x.shape == (6, 3, 8, 8)
    before = splits.fingerprint
    write_image(tmp_path / "test" / "bee" / "0.png", 9, size=(40, 30))
    assert small(root=str(tmp_path)).load().fingerprint != before


def test_image_folder_with_train_only_carves_both(tmp_path):
    for name in ["ape", "bee"]:
        for i in range(10):
            write_image(tmp_path / "train" / name / f"{i}.png", i)
    splits = small(root=str(tmp_path), validation=4).load()
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [14, 4, 2]
    files = [p for s in (splits.train, splits.validation, splits.test) for p, _ in s.dataset.files]
    assert len(set(files)) == 20


def test_image_folder_with_test_only_scores_but_does_not_train(tmp_path):
    write_image(tmp_path / "test" / "ape" / "a.jpg", 3)
    splits = small(root=str(tmp_path), channels=1).load()
    assert len(splits.test) == 1
    assert splits.image_shape == (1, 8, 8)
    assert len(splits.mean) == 1
    with pytest.raises(UserError, match="no training images"):
        next(iter(splits.train.batches([torch.tensor([0])])))


def test_resize_and_crop_agree_with_torchvision(tmp_path):
    from torchvision import transforms as T

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))
    (tmp_path / "test" / "a").mkdir(parents=True)
    image.save(tmp_path / "test" / "a" / "x.png")
    for mode in ("bilinear", "bicubic"):
        part = ImageFolder(root=str(tmp_path), resize=20, size=16, interpolation=mode, num_workers=0)
        x, _, _ = all_of(part.load().test)
        resized = T.Resize(20, interpolation=T.InterpolationMode(mode))(image)
        reference = T.ToTensor()(T.CenterCrop(16)(resized))
        assert torch.equal(x[0], reference)


def test_image_folder_mistakes(tmp_path):
    with pytest.raises(UserError, match="give root"):
        ImageFolder().load()
    with pytest.raises(UserError, match="expected train/<class>"):
        small(root=str(tmp_path)).load()
    (tmp_path / "train" / "ape").mkdir(parents=True)
    with pytest.raises(UserError, match="no test images"):
        small(root=str(tmp_path)).load()
    write_image(tmp_path / "train" / "ape" / "a.png", 1)
    write_image(tmp_path / "test" / "cow" / "a.png", 1)
    with pytest.raises(UserError, match="cow is not one of the 1 classes"):
        small(root=str(tmp_path)).load()
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "test" / "ape").mkdir(parents=True)
    (tmp_path / "test" / "ape" / "x.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="cannot read the image"):
        all_of(small(root=str(tmp_path)).load().test)
    with pytest.raises(ValueError, match="size must be at most resize"):
        ImageFolder(resize=8, size=9)


def test_tiny_imagenet_layout(tmp_path):
    base = tmp_path / "tiny-imagenet-200"
    wnids = ["n01", "n02", "n03"]
    for c, w in enumerate(wnids):
        for i in range(5):
            write_image(base / "train" / w / "images" / f"{w}_{i}.JPEG", 10 * c, (64, 64))
    lines = []
    for i, w in enumerate(["n03", "n01", "n02", "n03"]):
        write_image(base / "val" / "images" / f"val_{i}.JPEG", i, (64, 64))
        lines.append(f"val_{i}.JPEG\t{w}\t0\t0\t1\t1")
    (base / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (base / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tfire salamander\n")
    splits = TinyImageNet(root=str(tmp_path), num_workers=0, validation=3).load()
    assert splits.class_names == ("goldfish", "fire salamander", "n03")
    assert splits.test.labels.tolist() == [2, 0, 1, 2]
    assert splits.image_shape == (3, 64, 64)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [12, 3, 4]
    assert splits.train.labels.bincount().tolist() == [4, 4, 4]
    (base / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\n")
    with pytest.raises(UserError, match=r"val_annotations.txt:1: expected a file name and one of 3"):
        TinyImageNet(root=str(tmp_path)).load()
    with pytest.raises(UserError, match="expected train and val in"):
        TinyImageNet(root=str(tmp_path / "elsewhere")).load()


def test_imagenet_layout_with_and_without_train(tmp_path):
    for w in ["n01", "n02"]:
        write_image(tmp_path / "imagenet" / "val" / w / "a.JPEG", 5, (300, 260))
    splits = ImageNet(root=str(tmp_path), num_workers=0).load()
    assert (len(splits.test), len(splits.train)) == (2, 0)
    assert splits.mean == (0.485, 0.456, 0.406)
    assert all_of(splits.test)[0].shape == (2, 3, 224, 224)
    for w in ["n01", "n02"]:
        for i in range(4):
            write_image(tmp_path / "imagenet" / "train" / w / f"{i}.JPEG", 5)
    splits = ImageNet(root=str(tmp_path), num_workers=0, validation=2).load()
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [6, 2, 2]
    with pytest.raises(UserError, match="expected val in"):
        ImageNet(root=str(tmp_path / "elsewhere")).load()


# ---------------------------------------------------------------------------------------------------------------- npz


def arrays(layout="NHWC", n=30, m=12):
    rng = np.random.default_rng(3)
    shape = {"NHWC": (6, 5, 3), "NCHW": (3, 6, 5), "grey": (6, 5)}[layout]
    x, x_test = (rng.integers(0, 256, (k, *shape), dtype=np.uint8) for k in (n, m))
    return {"x_train": x, "y_train": np.arange(n) % 4, "x_test": x_test, "y_test": np.arange(m, dtype=np.uint8) % 4}


def as_nchw(x, layout):
    return {"NHWC": lambda: x.transpose(0, 3, 1, 2), "NCHW": lambda: x, "grey": lambda: x[:, None]}[layout]()


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "grey"])
@pytest.mark.parametrize("form", ["stored", "compressed", "folder"])
def test_npz_in_every_form(tmp_path, layout, form):
    a = arrays(layout)
    path = tmp_path / "set.npz"
    if form == "folder":
        path = tmp_path / "set"
        path.mkdir()
        for key, value in a.items():
            np.save(path / f"{key}.npy", value)
    else:
        (np.savez if form == "stored" else np.savez_compressed)(path, **a)
    splits = Npz(path=str(path), validation=6).load()
    x, x_test = (np.ascontiguousarray(as_nchw(a[k], layout)) for k in ("x_train", "x_test"))
    check_carved(splits, x, a["y_train"], x_test, a["y_test"], validation=6)
    assert splits.num_classes == 4
    if form != "compressed":
        assert is_mapped(path, splits.train.images)


def is_mapped(path, images):
    """Whether the pixels lie in pages that the system maps from the file."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return True
    for line in maps.read_text().splitlines():
        low, high = (int(v, 16) for v in line.split()[0].split("-"))
        if low <= images.data_ptr() < high:
            return str(path) in line
    return False


def test_npz_with_validation_and_names_and_fortran_order(tmp_path):
    a = arrays() | {"x_val": arrays()["x_train"][:5], "y_val": np.array([[0], [1], [2], [3], [0]])}
    a["x_train"] = np.asfortranarray(a["x_train"])
    np.savez(tmp_path / "a.npz", class_names=np.array(["p", "q", "r", "s"]), **a)
    splits = Npz(path=str(tmp_path / "a.npz")).load()
    assert splits.class_names == ("p", "q", "r", "s")
    assert len(splits.train) == 30
    assert splits.validation.labels.tolist() == [0, 1, 2, 3, 0]
    assert torch.equal(all_of(splits.train)[0], torch.from_numpy(arrays()["x_train"].transpose(0, 3, 1, 2).copy()).float() / 255)


def test_npz_fingerprint_does_not_depend_on_the_form(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    flipped = {k: (np.ascontiguousarray(v.transpose(0, 3, 1, 2)) if k[0] == "x" else v) for k, v in arrays().items()}
    np.savez_compressed(tmp_path / "b.npz", **flipped)
    a, b = (Npz(path=str(tmp_path / f"{n}.npz")).load() for n in "ab")
    assert a.fingerprint == b.fingerprint


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"x_train": np.zeros((30, 6, 5, 3))}, "x_train must be uint8, got float64"),
        ({"y_test": np.arange(12) / 2}, "y_test must be a vector of whole numbers"),
        ({"y_train": np.arange(29) % 4}, "30 images but 29 labels"),
        ({"y_train": np.arange(30) - 1}, "labels must lie in"),
        ({"x_test": None, "y_test": None}, "has no x_test; it has x_train, y_train"),
        ({"y_train": None}, "has x_train but no y_train"),
        ({"x_test": np.zeros((12, 6, 6, 3), np.uint8)}, "the splits' images differ in shape"),
        ({"x_test": np.zeros((0, 6, 5, 3), np.uint8), "y_test": np.zeros(0, int)}, "no images"),
        ({"x_train": np.zeros((30, 3, 5, 3), np.uint8)}, "give layout"),
        ({"x_train": np.zeros((30, 6, 5, 2), np.uint8)}, "neither end has 1 or 3 channels"),
        ({"x_train": np.zeros((30, 90), np.uint8)}, "expected (N, H, W, C), (N, C, H, W) or (N, H, W), got (30, 90)"),
        ({"class_names": np.array(["a", "b"])}, "labels must lie in 0..1, got 0..3"),
        ({"x_train": np.array([{}] * 30)}, "it holds pickled objects"),
        ({"y_train": np.arange(30) * 10**15}, "the largest label is 29000000000000000, more than there are images"),
    ],
)
def test_npz_mistakes(tmp_path, change, line):
    a = {k: v for k, v in (arrays() | change).items() if v is not None}
    np.savez(tmp_path / "a.npz", **a)
    with pytest.raises(UserError) as error:
        Npz(path=str(tmp_path / "a.npz"), validation=6).load()
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_npz_files_that_are_none(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    whole = (tmp_path / "a.npz").read_bytes()
    for name, content in [("cut.npz", whole[: len(whole) // 2]), ("text.npz", b"hello"), ("empty.npz", b"")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"not a \.npz file, or a damaged one"):
            Npz(path=str(tmp_path / name)).load()
    with pytest.raises(UserError, match="no such file"):
        Npz(path=str(tmp_path / "absent.npz")).load()
    with pytest.raises(UserError, match="give path"):
        Npz().load()


# ---------------------------------------------------------------------------------------------------------- gaussians


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("norm", "strength"), [("linf", 0.6), ("l2", 0.4), ("l1", 0.5), ("linf", 0.0), ("l2", 1.2)])
def test_bayes_robust_accuracy_by_monte_carlo(channels, norm, strength):
    part = Gaussians(size=6, channels=channels, separation=1.5, sigma=0.06, n_train=10, n_val=10, n_test=40000)
    d = part.pixels
    eps = strength * part.shift * {"linf": 1.0, "l2": math.sqrt(d), "l1": d}[norm]
    x, y, _ = all_of(part.load().test)
    step = {"linf": 1.0, "l2": 1 / math.sqrt(d), "l1": 1 / d}[norm]  # the unit vector of the norm with the largest product with mu
    worst = x - eps * step * (2 * y - 1).view(-1, 1, 1, 1)
    measured = float((part.bayes_classifier()(worst).argmax(1) == y).float().mean())
    expected = part.bayes_robust_accuracy(norm, eps)
    assert abs(measured - expected) < 4 * math.sqrt(expected * (1 - expected) / len(y))
    assert 0.3 < expected < 0.95


def test_bayes_classifier_gives_the_posterior():
    part = Gaussians(size=2, separation=1.0, sigma=0.08, n_train=10, n_val=10, n_test=2000)
    x, _, _ = all_of(part.load().test)
    centres = torch.tensor([0.5 - part.shift, 0.5 + part.shift])
    log_density = -((x.flatten(1)[:, None] - centres[None, :, None]).square().sum(2)) / (2 * part.sigma**2)
    posterior = part.bayes_classifier()(x).softmax(1).detach()
    assert float((posterior - log_density.softmax(1)).abs().max()) < 1e-4


def test_no_linear_classifier_is_more_robust_than_bayes():
    part = Gaussians(size=3, separation=2.0, sigma=0.06)
    mu = torch.full((part.pixels,), part.shift, dtype=torch.float64)
    w = torch.rand(5000, part.pixels, dtype=torch.float64) + torch.rand(5000, 1) * 3
    for norm, dual in [("linf", 1), ("l2", 2), ("l1", torch.inf)]:
        eps = 0.5 * float(mu.norm(p={"linf": torch.inf, "l2": 2, "l1": 1}[norm]))
        t = (w @ mu - eps * w.norm(p=dual, dim=1)) / (part.sigma * w.norm(dim=1))
        best = float(torch.special.ndtr(t).max())
        assert best <= part.bayes_robust_accuracy(norm, eps) + 1e-12
        same = (mu @ mu - eps * mu.norm(p=dual)) / (part.sigma * mu.norm())
        assert float(torch.special.ndtr(same)) == pytest.approx(part.bayes_robust_accuracy(norm, eps), abs=1e-12)


def test_gaussians_stay_inside_and_repeat():
    part = Gaussians(n_train=500, n_val=20, n_test=20)
    a, b, other = part.load(), part.load(), Gaussians(n_train=500, n_val=20, n_test=20, seed=1).load()
    x = all_of(a.train)[0]
    assert torch.equal(x, all_of(b.train)[0])
    assert not torch.equal(x, all_of(other.train)[0])
    assert a.fingerprint == b.fingerprint != other.fingerprint
    assert float(x.min()) > 0
    assert float(x.max()) < 1
    with pytest.raises(ValueError, match="of the images leave"):
        Gaussians(sigma=0.12)
    with pytest.raises(ValueError, match="of the images leave"):
        Gaussians(separation=60.0)
    with pytest.raises(ValueError, match="no closed form for the norm 'l0'"):
        part.bayes_robust_accuracy("l0", 1)


# ---------------------------------------------------------------------------------------------------- JPEG in one file


def jpegs(images):
    """Bytes and offsets of images (N, H, W, C) as JPEG files laid end to end, and what they decode to."""
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    seen = np.stack([np.asarray(Image.open(io.BytesIO(f))) for f in files])
    return np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)]), seen


@pytest.fixture
def packed(tmp_path):
    rng = np.random.default_rng(0)
    data, offset, train = jpegs(rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8))
    test, test_offset, seen = jpegs(rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8))
    y = np.arange(30, dtype=np.uint8) % 10
    path = tmp_path / "copy.npz"
    arrays = {"train_jpeg": data, "train_offset": offset, "test_jpeg": test, "test_offset": test_offset}
    np.savez(path, **arrays, y_train=y, y_test=y[:12])
    return path, train, seen


def test_npz_decodes_jpeg_files(packed):
    path, _, seen = packed
    splits = Npz(path=str(path), num_classes=10, validation=10).load()
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [20, 10, 12]
    x, y, _ = all_of(splits.test)
    assert torch.equal(x, torch.from_numpy(seen).permute(0, 3, 1, 2) / 255)
    assert y.tolist() == [i % 10 for i in range(12)]


def test_cifar10_is_read_from_a_copy_in_one_file(packed):
    path, train, seen = packed
    splits = CIFAR10(root=str(path), validation=10).load()
    assert splits.class_names[:2] == ("airplane", "automobile")
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [20, 10, 12]
    assert torch.equal(all_of(splits.test)[0], torch.from_numpy(seen).permute(0, 3, 1, 2) / 255)
    both = torch.cat([splits.train.images, splits.validation.images])
    assert both.long().sum() == train.astype(np.int64).sum()


def test_cifar10_is_read_from_plain_arrays_in_one_file(tmp_path):
    x, y = np.zeros((20, 32, 32, 3), np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "copy.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    splits = CIFAR10(root=str(tmp_path / "copy.npz"), validation=10).load()
    assert (len(splits.test), splits.num_classes) == (10, 10)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_offset": np.array([0, 10, 5])}, "train_offset must rise"),
        ({"train_jpeg": np.zeros(40, np.uint8), "train_offset": np.array([0, 20, 40])}, "not JPEG files, or damaged ones"),
        ({"train_offset": None}, "expected bytes"),
    ],
)
def test_damaged_jpeg_files_get_one_line(packed, tmp_path, change, said):
    with np.load(packed[0]) as known:
        arrays = {k: v for k, v in (dict(known) | change).items() if v is not None}
    np.savez(tmp_path / "damaged.npz", **arrays)
    with pytest.raises(UserError, match=said) as error:
        Npz(path=str(tmp_path / "damaged.npz")).load()
    assert "\n" not in str(error.value)


def test_cifar10_says_that_a_file_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"not a .npz file, or a damaged one") as error:
        CIFAR10(root=str(tmp_path / "none.npz")).load()
    assert "\n" not in str(error.value)
