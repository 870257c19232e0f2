"""Checkpoints: bit for bit there and back, and one clear line for every file that is none."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustlab.config import build, dump
from robustlab.models import checkpoint, create_model
from robustlab.models.checkpoint import load_model, load_weights, read_meta, save_checkpoint
from robustlab.types import UserError

PART = build("model", "small_cnn", num_classes=4, width=4, mean=(0.3,), std=(0.4,))
META = {
    "model": dump(PART),
    "image_shape": [1, 8, 8],
    "num_classes": 4,
    "class_names": ["a", "b", "c", "d"],
    "threat": {"norm": "linf", "eps": 8 / 255},
    "metrics": {"val_robust": 0.1 + 0.2},
    "epoch": 3,
}


@pytest.fixture
def trained():
    f = PART.build().train()
    for _ in range(3):
        f(torch.rand(16, 1, 8, 8))  # running statistics that are not the initial ones
    return f


@pytest.fixture
def saved(trained, tmp_path):
    save_checkpoint(tmp_path / "best.safetensors", trained, META)
    return tmp_path / "best.safetensors"


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_there_and_back(trained, saved):
    f = load_model(saved)
    assert same(f, trained)
    assert not f.training
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(f(x), trained.eval()(x))
    assert f.robustlab_meta == {"format": "robustlab", "version": 1, **META}
    assert read_meta(saved) == f.robustlab_meta
    assert read_meta(saved)["threat"]["eps"] == 8 / 255


def test_equal_content_gives_equal_bytes(trained):
    assert checkpoint.to_bytes(trained, META) == checkpoint.to_bytes(load_copy(trained), dict(META))


def load_copy(f):
    g = PART.build()
    g.load_state_dict(f.state_dict())
    return g


@pytest.mark.parametrize("name", ["wide_resnet", "preact_resnet18", "timm:resnet10t", "torchvision:squeezenet1_1"])
def test_every_architecture_is_rebuilt_from_its_file(tmp_path, name):
    fields = {"depth": 10, "width": 1} if name == "wide_resnet" else {}
    part = build("model", name, num_classes=5, in_channels=1, **fields)
    f = part.build().eval()
    save_checkpoint(tmp_path / "m.safetensors", f, {"model": dump(part), "image_shape": [1, 32, 32], "num_classes": 5})
    g = load_model(tmp_path / "m.safetensors")
    x = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(f(x), g(x))


def test_a_model_that_was_started_from_elsewhere_needs_only_its_file(trained, tmp_path):
    for init in ("pretrained", "/no/such/file.safetensors"):
        meta = META | {"model": META["model"] | {"init": init}}
        save_checkpoint(tmp_path / "m.safetensors", trained, meta)
        assert same(load_model(tmp_path / "m.safetensors"), trained)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight


def test_tied_weights_are_stored_once(tmp_path):
    f, g = Tied(), Tied()
    path = tmp_path / "tied.safetensors"
    save_checkpoint(path, f, META)
    assert read_meta(path)["tied"] == {"b.weight": "a.weight"}
    load_weights(g, path)
    assert same(f, g)
    assert g.a.weight is g.b.weight


def test_a_failed_write_leaves_the_old_file(trained, saved, monkeypatch):
    before = saved.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_checkpoint(saved, PART.build(), META)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_metadata_that_cannot_be_stored_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="needs 'num_classes'"):
        save_checkpoint(tmp_path / "m.safetensors", trained, {"model": {}, "image_shape": []})
    with pytest.raises(ValueError):
        save_checkpoint(tmp_path / "m.safetensors", trained, META | {"metrics": {"loss": float("nan")}})
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- wrong files


def error_of(spec):
    with pytest.raises(UserError) as error:
        load_model(spec)
    line = str(error.value)
    assert line.startswith(str(spec))
    assert "\n" not in line
    return line


def test_truncated_anywhere_or_altered_in_the_header(saved):
    whole = saved.read_bytes()
    for cut in (0, 1, 7, 8, 9, len(whole) // 3, len(whole) - 1):
        saved.write_bytes(whole[:cut])
        assert "not a safetensors file, or a damaged one" in error_of(saved)
    saved.write_bytes(whole[:8] + b"x" + whole[9:])
    assert "not a safetensors file, or a damaged one" in error_of(saved)
    saved.write_bytes(b"\xff" * 100)
    assert "not a safetensors file, or a damaged one" in error_of(saved)


def test_foreign_and_newer_and_damaged_blocks(trained, tmp_path):
    path = tmp_path / "m.safetensors"
    state = trained.state_dict()
    save_file(state, path)
    assert "without the 'robustlab' metadata block" in error_of(path)
    cases = [
        (json.dumps(META | {"format": "robustlab", "version": 2}), "version 2 is newer than this robustlab reads (1)"),
        ("{", "metadata block is damaged"),
        ("[]", "metadata block is damaged"),
        (json.dumps(META | {"format": "other", "version": 1}), "metadata block is damaged"),
        (json.dumps(META | {"format": "robustlab", "version": "1"}), "metadata block is damaged"),
        (json.dumps(META | {"format": "robustlab", "version": 1, "num_classes": "4"}), "no valid 'num_classes'"),
        (json.dumps(META | {"format": "robustlab", "version": 1, "model": {"name": "smal_cnn"}}), "did you mean 'small_cnn'?"),
        (
            json.dumps(META | {"format": "robustlab", "version": 1, "model": {"name": "small_cnn", "colour": 1}}),
            "colour: unknown key",
        ),
    ]
    for block, line in cases:
        save_file(state, path, metadata={"robustlab": block})
        assert line in error_of(path)


def test_weights_of_another_shape_than_the_metadata_say(trained, tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, trained, META | {"model": META["model"] | {"width": 8}})
    assert "the weights do not fit: wrong shape: conv1.weight (4, 1, 3, 3) for (8, 1, 3, 3), " in error_of(path)


def test_pickles_are_not_loaded(trained, tmp_path):
    torch.save(trained, tmp_path / "whole.pt")
    torch.save(trained.state_dict(), tmp_path / "state.pth")
    torch.save(trained.state_dict(), tmp_path / "disguised.safetensors")
    for name in ("whole.pt", "state.pth", "disguised.safetensors"):
        assert "pickled checkpoints are not loaded" in error_of(tmp_path / name)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.path.join(os.environ["BOMB"], "exploded"),)


def test_code_in_a_pickle_never_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path))
    torch.save({"weight": Bomb()}, tmp_path / "bomb.pt")
    error_of(tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="pickled objects other than tensors"):
        load_weights(PART.build(), tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_absent_files_and_folders(saved, tmp_path):
    assert "no such file (did you mean" in error_of(tmp_path / "bst.safetensors")
    assert f"got a folder (did you mean '{saved}'?)" in error_of(tmp_path)
    assert "expected a .safetensors file, hf:user/name, timm:NAME" in error_of("nonsense")


# ------------------------------------------------------------------------------------------------------ start weights


def test_weights_load_from_every_form(trained, saved, tmp_path):
    state = trained.state_dict()
    save_file(state, tmp_path / "foreign.safetensors")
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "parallel.pt")
    torch.save({"epoch": 3, "state_dict": {f"model.{k}": v for k, v in state.items()}}, tmp_path / "nested.pth")
    for name in (saved.name, "foreign.safetensors", "parallel.pt", "nested.pth"):
        g = create_model("small_cnn", num_classes=4, width=4, in_channels=1, init=str(tmp_path / name))
        assert same(g, trained), name


def test_foreign_weights_may_lack_the_normalisation(trained, tmp_path):
    state = {k: v for k, v in trained.state_dict().items() if not k.startswith("normalize") and "num_batches" not in k}
    torch.save(state, tmp_path / "bare.pt")
    g = create_model("small_cnn", num_classes=4, width=4, mean=(0.1,), std=(0.2,), init=str(tmp_path / "bare.pt"))
    assert torch.equal(g.conv2.weight, trained.conv2.weight)
    assert float(g.normalize.mean) == pytest.approx(0.1)


def test_timm_state_dicts_load_under_our_first_layer(tmp_path):
    import timm

    net = timm.create_model("resnet10t", num_classes=3)
    torch.save(net.state_dict(), tmp_path / "timm.pt")
    f = create_model("timm:resnet10t", num_classes=3, init=str(tmp_path / "timm.pt"))
    assert same(f.net, net)


def test_weights_that_do_not_fit_change_nothing(trained, tmp_path):
    state = trained.state_dict()
    torch.save({("x." + k if k.startswith("norm") else k): v for k, v in state.items()}, tmp_path / "a.pt")
    g = PART.build()
    before = load_copy(g)
    with pytest.raises(UserError) as error:
        load_weights(g, tmp_path / "a.pt")
    line = str(error.value)
    assert "missing: norm1.weight, norm1.bias, norm1.running_mean, ... (12 in all)" in line
    assert "unexpected: x.normalize.mean, x.normalize.std, x.norm1.weight, ... (17 in all)" in line
    assert same(g, before)
    torch.save(["no", "state dict"], tmp_path / "list.pt")
    with pytest.raises(UserError, match="expected a state dict"):
        load_weights(g, tmp_path / "list.pt")
    with pytest.raises(UserError, match="no such file"):
        load_weights(g, tmp_path / "absent.pt")


# ----------------------------------------------------------------------------------------------------------- callables

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.fc = nn.Linear(4, classes)
    def forward(self, x):
        return self.fc(x.flatten(1))

class Needy(nn.Module):
    def __init__(self, classes):
        super().__init__()

def make():
    return Net(5)

def classify(x):
    return x.flatten(1)

ready = Net(2)
number = 7

def broken():
    raise KeyError("missing")
"""


def test_any_callable(tmp_path, monkeypatch):
    (tmp_path / "mymodels_of_a_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    x = torch.rand(2, 1, 2, 2)
    for name, classes in [("make", 5), ("Net", 3), ("ready", 2), ("classify", 4)]:
        f = load_model(f"mymodels_of_a_test:{name}")
        assert isinstance(f, nn.Module)
        assert not f.training
        assert f(x).shape == (2, classes)
    assert sys.path == before
    assert "has no 'mak' (did you mean 'make'?)" in error_of("mymodels_of_a_test:mak")
    assert "expected a classifier or a function that returns one, got int" in error_of("mymodels_of_a_test:number")
    assert "calling it failed: KeyError: 'missing'" in error_of("mymodels_of_a_test:broken")
    assert "the class Needy needs arguments" in error_of("mymodels_of_a_test:Needy")
    assert "cannot import 'no_such_module'" in error_of("no_such_module:make")


def test_a_module_that_fails_to_import_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "failing_module_of_a_test.py").write_text("raise RuntimeError('first line\\nsecond line')")
    monkeypatch.chdir(tmp_path)
    assert error_of("failing_module_of_a_test:f").endswith("RuntimeError: first line")
