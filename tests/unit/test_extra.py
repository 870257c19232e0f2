"""Extra data: its share of every batch, the draws, the targets, the files; ratio 0 changes nothing."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from robustlab import commands, config
from robustlab.data.digits import Digits
from robustlab.data.extra import with_extra
from robustlab.rng import Rng
from robustlab.training.loop import Plan, loader, with_replacement
from robustlab.types import Alone, Extra, Splits, UserError

M, K = 300, 10


class Part:
    """One of several processes."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def write(folder, *, compressed=False, shape=(M, 8, 8, 1), label=None, names=("image", "label"), dtype=np.uint8):
    """A file whose image i is filled with the value i mod 251."""
    x = np.broadcast_to((np.arange(shape[0]) % 251).reshape(-1, *[1] * (len(shape) - 1)), shape).astype(dtype)
    y = np.arange(shape[0]) % K if label is None else label
    path = folder / "extra.npz"
    (np.savez_compressed if compressed else np.savez)(path, **dict(zip(names, (x, y), strict=True)))
    return str(path)


def splits_with(path, **fields):
    data = Digits(size=8, extra=Extra(path=path, **fields))
    return with_extra(data, data.load())


def epoch(splits, ratio, batch=32, parts=1, world=None, seed=0, number=0):
    plan = Plan(len(splits.train), batch, parts, world or Alone(), ratio)
    return [views["clean"] for views in loader(splits, plan, Rng(seed), number, torch.device("cpu"))]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_every_batch_has_the_same_share_and_no_training_image_comes_twice(tmp_path, ratio):
    splits = splits_with(write(tmp_path), ratio=ratio or 0.5)
    n, views = len(splits.train), epoch(splits, ratio)
    assert len(views) == n // 32
    assert {int((v.index >= n).sum()) for v in views} == {round(32 * ratio)}
    seen = Counter(int(i) for v in views for i in v.index if i < n)
    assert set(seen.values()) <= {1}
    assert torch.equal(torch.cat([v.key for v in views]), torch.arange(32 * (n // 32)))
    for v in views:
        for x, y, i in zip(v.x, v.y, v.index.tolist(), strict=True):
            if i < n:
                assert torch.equal(x, splits.train.images[i].float() / 255)
                assert y.tolist() == torch.eye(K)[splits.train.labels[i]].tolist()
            else:
                assert torch.equal(x, torch.full((1, 8, 8), (i - n) % 251 / 255.0))
                torch.testing.assert_close(y, 0.9 * torch.eye(K)[(i - n) % K] + 0.1 / K)


def test_no_extra_data_is_the_run_without_it_bit_for_bit(tmp_path):
    with_file, without = splits_with(write(tmp_path), ratio=0.4), Digits(size=8).load()
    for a, b in zip(epoch(with_file, 0.0), epoch(without, 0.0), strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
        assert torch.equal(a.index, b.index)
    assert splits_with(write(tmp_path), ratio=0.0).extra is None


@pytest.mark.parametrize(("parts", "size"), [(4, 1), (1, 2), (2, 4)])
def test_shards_see_the_same_batches_and_nearly_the_same_share(tmp_path, parts, size):
    splits = splits_with(write(tmp_path))
    whole = epoch(splits, 0.7)
    shards = [epoch(splits, 0.7, parts=parts, world=Part(r, size)) for r in range(size)]
    for s, v in enumerate(whole):
        micro = [shards[r][s * parts + a] for a in range(parts) for r in range(size)]
        assert torch.equal(torch.cat([m.index for m in micro]), v.index)
        assert torch.equal(torch.cat([m.x for m in micro]), v.x)
        shares = [int((m.index >= len(splits.train)).sum()) for m in micro]
        assert max(shares) - min(shares) <= 1


def test_draws_are_uniform_new_in_every_epoch_and_keyed_by_the_seed(tmp_path):
    splits = splits_with(write(tmp_path))
    n = len(splits.train)
    drawn = {
        (s, e): torch.cat([v.index[v.index >= n] for v in epoch(splits, 0.7, seed=s, number=e)]) for s in (0, 1) for e in (0, 1)
    }
    assert len({tuple(d.tolist()) for d in drawn.values()}) == 4
    many = with_replacement(Rng(0).at(torch.arange(60_000)), M)
    counts = many.bincount(minlength=M).double()
    assert float(((counts - 200) ** 2 / 200).sum()) < M + 5 * (2 * M) ** 0.5  # chi squared
    far = with_replacement(Rng(0).at(torch.arange(20_000)), 2**30)
    assert len(set((far % 64).tolist())) == 64  # finer than 24 bits
    assert 0 <= int(far.min()) < int(far.max()) < 2**30


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("names", [("image", "label"), ("x_train", "y_train")])
def test_files_are_mapped_where_they_can_be(tmp_path, compressed, names):
    splits = splits_with(write(tmp_path, compressed=compressed, names=names))
    x, y, _ = next(splits.extra.batches([torch.tensor([0, 7, 250])]))
    assert (x[:, 0, 0, 0] * 255).round().tolist() == [0, 7, 250]
    assert y.argmax(1).tolist() == [0, 7, 0]
    folder = tmp_path / "folder"
    folder.mkdir()
    np.save(folder / "image.npy", np.zeros((5, 1, 8, 8), np.uint8))
    np.save(folder / "label.npy", np.zeros((5, 1), np.int64))
    assert len(splits_with(str(folder)).extra) == 5


def test_labels_may_be_probabilities(tmp_path):
    p = np.random.default_rng(0).dirichlet(np.ones(K), M).astype(np.float32)
    splits = splits_with(write(tmp_path, label=p), smoothing=0.0)
    _, y, index = next(splits.extra.batches([torch.tensor([5, 200])]))
    torch.testing.assert_close(y, torch.from_numpy(p)[index])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": (M, 9, 9, 1)}, r"images of \(1, 9, 9\), but 'digits' has \(1, 8, 8\)"),
        ({"dtype": np.float32}, "images must be uint8, got float32"),
        ({"label": np.full(M, 10)}, r"labels must lie in 0\.\.9, got 10\.\.10"),
        ({"label": np.arange(M - 1) % K}, "300 images but 299 labels"),
        ({"label": np.ones((M, K), np.float32)}, "no probability distribution"),
        ({"label": np.ones((M, 3), np.float32)}, r"probabilities \(M, 10\), got \(300, 3\)"),
        ({"names": ("image", "other")}, "has no label; it has image"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path, fields, message):
    with pytest.raises(UserError, match=message) as error:
        splits_with(write(tmp_path, **fields))
    assert len(error.value.lines) == 1


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"data\.extra: no such file 'gone\.npz'"):
        splits_with("gone.npz")


RUN = """
trainer: {{name: {trainer}}}
model: {{name: small_cnn, width: 4}}
data: {{name: digits, size: 8, extra: {{path: {path}, ratio: 0.6}}}}
threat: {{norm: linf, eps: 0.1}}
optimizer: {{name: sgd, lr: 0.05}}
training: {{epochs: 2, batch_size: 64, device: cpu, threads: 1, probe: {{num_examples: 20, steps: 1}}}}
"""


def test_a_run_from_yaml_resumes_bit_for_bit_and_its_model_is_scored_without_the_file(tmp_path):
    path = write(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN.format(trainer="standard", path=path))
    run = config.load_config(tmp_path / "run.yaml")
    assert run.data.extra == Extra(path=path, ratio=0.6)
    assert config.config_from(config.dump(run)) == run

    class Halt(Exception):
        pass

    def stop(event):
        if event["kind"] == "step" and event["epoch"] == 1 and event["step"] == 3:
            raise Halt

    commands.train(run, tmp_path / "whole")
    with pytest.raises(Halt):
        commands.train(run, tmp_path / "cut", progress=stop)
    commands.train(run, tmp_path / "cut", resume=True)
    one, other = ((tmp_path / d / "last.safetensors").read_bytes() for d in ("whole", "cut"))
    assert one == other
    (tmp_path / "extra.npz").unlink()
    part = commands.choose_data(None, {"config": config.dump(run)}, None)
    assert part.extra is None
    assert isinstance(part.load(), Splits)


def test_it_matters(tmp_path):
    """Another file, another model: the images do reach the loss."""
    found = []
    for label in (0, 9):
        path = write(tmp_path, label=np.full(M, label))
        (tmp_path / "run.yaml").write_text(RUN.format(trainer="standard", path=path))
        run = config.load_config(tmp_path / "run.yaml")
        run = dataclasses.replace(run, training=dataclasses.replace(run.training, epochs=1))
        commands.train(run, tmp_path / str(label))
        found.append((tmp_path / str(label) / "last.safetensors").read_bytes())
    assert found[0] != found[1]
