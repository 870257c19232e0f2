"""Reports of runs, their difference, sharing, and the reference page."""

import json
from pathlib import Path

import pytest
import torch
from browser import assert_fits, needs_browser, opened
from safetensors.torch import load_file

import robustlab as rl
from robustlab import reporting
from robustlab.cli import run
from robustlab.evaluation.landscape import filter_normalised, input_landscape, weight_landscape
from robustlab.models import hub
from robustlab.rng import Rng
from robustlab.types import UserError

CONFIG = (
    "trainer: {trainer}\nmodel: {{name: small_cnn, width: 4}}\ndata: {{name: digits, size: 8}}\nthreat: {{norm: linf, eps: 0.1}}\n"
)
QUICK = ["training.epochs=3", "training.batch_size=256", "training.threads=1", "training.device=cpu", "training.probe.every=1",
         "training.probe.num_examples=32", "training.probe.steps=2", "training.guards.collapse=null"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for trainer in ("standard", "pgd-at"):
        path = root / f"{trainer}.yaml"
        path.write_text(CONFIG.format(trainer=trainer))
        settings = [*QUICK, *(["trainer.inner.craft.attack.steps=2"] if trainer == "pgd-at" else [])]
        assert run(["train", str(path), "--out", str(root / trainer), *(p for s in settings for p in ("--set", s))]) == 0
    return root


# --------------------------------------------------------------------------------------------------------- landscapes


def linear(k=3):
    f = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, k)).double()
    return f.eval()


def test_the_middle_of_a_landscape_is_the_loss_itself():
    f, x, y = linear(), torch.rand(5, 1, 4, 4, dtype=torch.float64) / 2 + 0.25, torch.arange(5) % 3
    found = input_landscape(f, x.clone(), y, 0.1, 5, Rng(0))
    loss = float(torch.nn.functional.cross_entropy(f(x), y))
    assert float(found[2, 2]) == pytest.approx(loss, abs=1e-9)
    assert float(found[4, 2]) == pytest.approx(max(map(float, found[:, 2])), abs=1e-9), "the gradient's sign goes up"
    line = weight_landscape(f, x, y, 3, rl.create_attack("pgd", norm="linf", eps=0.0, steps=1), (-1.0, 0.0, 1.0), Rng(0))
    assert line["clean"][1] == pytest.approx(loss, abs=1e-9)
    assert line["adversarial"] == pytest.approx(line["clean"], abs=1e-9), "eps = 0"


def test_the_weights_are_as_before(monkeypatch):
    f, x, y = linear(), torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.arange(5) % 3
    before = {k: v.clone() for k, v in f.state_dict().items()}
    attack = rl.create_attack("pgd", norm="linf", eps=0.1, steps=2)
    weight_landscape(f, x, y, 3, attack, (0.3, 1.0), Rng(0))
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items())
    assert all(p.requires_grad for p in f.parameters())


def test_filters_keep_their_norms():
    weights = [torch.rand(6, 3, 3, 3, dtype=torch.float64), torch.rand(4, 7, dtype=torch.float64)]
    for w, d in zip(weights, filter_normalised(weights, Rng(1)), strict=True):
        assert torch.allclose(d.flatten(1).square().sum(1), w.flatten(1).square().sum(1))
        assert not torch.allclose(d, w)


# ------------------------------------------------------------------------------------------------------------ reports


def test_the_gap_is_best_less_last(tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: pgd-at\n")
    lines = [
        {"kind": "epoch", "epoch": i + 1, "val_robust": v, "loss": 1.0, "lr": 0.1} for i, v in enumerate([0.3, 0.5, None, 0.45])
    ]
    lines.insert(2, {"kind": "guard", "epoch": 2, "guard": "overfitting", "drop": 0.25})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"kind": "ep')
    told = reporting.read_run(tmp_path)
    assert told.gap()["points"] == pytest.approx(5.0)
    assert (told.gap()["best"]["epoch"], told.gap()["last"]["epoch"]) == (2, 4)
    assert [e["guard"] for e in told.others] == ["overfitting"]


def test_what_differs():
    a, b = {"x": {"y": [1, 2]}, "z": 3}, {"x": {"y": [1, 5]}, "z": 3, "w": None}
    assert reporting.differences([a, b]) == {"x.y.1": [2, 5]}
    assert reporting.differences([a, {"x": {"y": [1]}, "z": 3}]) == {"x.y.1": [2, None]}


def test_diff_says_what_differs_and_how_sure_that_is(runs, capsys):
    assert run(["diff", str(runs / "standard"), str(runs / "pgd-at"), "-n", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["trainer.name"] == ["standard", "pgd-at"]
    assert not any("True" in key for key in found["config"]), "the key `on` is no truth value"
    paired = found["paired"]["robust, pgd-20"]
    a, b = (r["robust"]["accuracy"] for r in found["results"])
    assert paired["difference"] == pytest.approx(b - a)
    assert run(["diff", str(runs / "standard"), str(runs / "pgd-at"), "-n", "50"]) == 0
    assert "McNemar p =" in capsys.readouterr().out
    assert run(["diff", str(runs / "standard"), str(runs)]) == 2
    assert "not the folder of a run" in capsys.readouterr().err


@needs_browser
@pytest.mark.parametrize("width", [400, 1400])
def test_the_report_page(runs, width):
    page = runs / "report.html"
    if not page.exists():
        assert run(["report", str(runs / "standard"), str(runs / "pgd-at"), "--out", str(page)]) == 0
    with opened(page, width) as p:
        assert_fits(p)
        assert p.locator("tr[data-run]").count() == 2
        assert p.locator("img").count() == 4 + 2 * 2, "loss, probe, rate, weights; landscape and images of each"
        assert p.locator("code:text-is('trainer.name')").count() == 1


# ------------------------------------------------------------------------------------------------------------ sharing


def test_push_and_load_again(runs, tmp_path, capsys, monkeypatch):
    checkpoint = runs / "pgd-at" / "best.safetensors"
    evaluate = ["evaluate", str(checkpoint), "--suite", "pgd-20", "-n", "16", "--out", str(runs / "pgd-at" / "evaluations")]
    assert run(evaluate) == 0
    assert run(["push", str(runs / "pgd-at"), str(tmp_path / "shared")]) == 0
    folder = tmp_path / "shared"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    f, g = rl.load_model(checkpoint), rl.load_model(folder)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(f(x), g(x))
    assert g.robustlab_meta["threat"] == f.robustlab_meta["threat"]
    told = json.loads((folder / "config.json").read_text())
    assert (told["architecture"], told["num_classes"]) == ("small_cnn", 10)
    assert told["pretrained_cfg"]["input_size"] == [1, 8, 8]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "| pgd-20 | linf 0.1 | 16 of digits test |" in card

    import huggingface_hub

    seen = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: seen.update(name=name, **kw) or str(folder))
    h = rl.load_model("hf:somebody/net@v1")
    assert torch.equal(f(x), h(x))
    assert (seen["name"], seen["revision"]) == ("somebody/net", "v1")
    sent = {}
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **kw: sent.update(created=name))
    monkeypatch.setattr(
        huggingface_hub, "upload_folder", lambda **kw: sent.update(files=sorted(p.name for p in Path(kw["folder_path"]).iterdir()))
    )
    assert run(["push", str(runs / "pgd-at"), "hf:somebody/net"]) == 0
    assert sent == {"created": "somebody/net", "files": ["README.md", "config.json", "model.safetensors"]}


def test_a_timm_model_is_shared_under_timms_own_names(tmp_path):
    from robustlab import config
    from robustlab.models.checkpoint import save_checkpoint

    part = config.build("model", "timm:resnet10t", num_classes=5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3))
    f = part.build().eval()
    meta = {"model": config.dump(part), "image_shape": [3, 32, 32], "num_classes": 5}
    save_checkpoint(tmp_path / "a.safetensors", f, meta)
    hub.write_folder(tmp_path / "a.safetensors", tmp_path / "shared", "card")
    import timm

    theirs = timm.create_model("resnet10t", num_classes=5)
    assert set(load_file(tmp_path / "shared" / "model.safetensors")) == set(theirs.state_dict())
    g, x = rl.load_model(tmp_path / "shared"), torch.rand(2, 3, 32, 32)
    assert torch.equal(f(x), g(x))
    told = json.loads((tmp_path / "shared" / "config.json").read_text())
    assert told["architecture"] == "resnet10t"
    assert told["pretrained_cfg"]["mean"] == pytest.approx([0.4, 0.5, 0.6])


@pytest.mark.parametrize("spec", ["hf:name", "hf:/", "hf:a/b/c", "hf:"])
def test_a_bad_name_is_one_line(spec):
    with pytest.raises(UserError, match="expected hf:user/name"):
        rl.load_model(spec)


def test_a_damaged_folder_is_one_line(runs, tmp_path):
    hub.write_folder(runs / "pgd-at" / "best.safetensors", tmp_path / "shared", "card")
    (tmp_path / "shared" / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        rl.load_model(tmp_path / "shared")
    (tmp_path / "shared" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="expected a folder with"):
        rl.load_model(tmp_path / "shared")


def test_a_result_of_other_weights_is_refused(runs, tmp_path, capsys):
    out = tmp_path / "e"
    assert run(["evaluate", str(runs / "standard" / "best.safetensors"), "--suite", "pgd-20", "-n", "8", "--out", str(out)]) == 0
    (record,) = out.rglob("record.json")
    assert run(["push", str(runs / "pgd-at"), str(tmp_path / "x"), "--record", str(record)]) == 2
    assert "other weights" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- reference


@needs_browser
def test_the_reference_page(tmp_path):
    page = tmp_path / "all.html"
    assert run(["explain", "--all", "--html", str(page)]) == 0
    with opened(page) as p:
        assert_fits(p)
        assert p.locator("article").count() >= 80
        p.fill("#search", "madry")
        assert p.locator("#attack-pgd").is_visible()
        assert not p.locator("#attack-square").is_visible()


def test_explain_needs_one_of_both(capsys):
    assert run(["explain"]) == 2
    assert "give a name, or --all" in capsys.readouterr().err
    assert run(["explain", "pgd", "--all"]) == 2
    assert run(["explain", "pgd", "--html", "x.html"]) == 2
