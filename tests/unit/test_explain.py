"""What ``explain`` and ``list`` show of every registered part, and the words of the screen."""

import dataclasses
import inspect
import io
import re

import pytest
from rich.console import Console

from robustlab.registry import FOLDERS, entries, summary
from robustlab.report import console
from robustlab.report.explain import explain, find, reflow, short
from robustlab.types import Attack, NonNegative, Norm, Trainer, UserError

EVERY_PART = [(kind, name) for kind in FOLDERS for name in entries(kind)]


def words(text: str) -> str:
    """Text without line breaks and quotes, so that filling does not matter."""
    return " ".join(re.sub(r"[`']", "", text).replace("None", "null").split())


@pytest.mark.parametrize(("kind", "name"), EVERY_PART)
@pytest.mark.parametrize("width", [60, 100])
def test_every_part_is_explained(kind, name, width):
    cls = entries(kind)[name]
    text = explain(cls, width)
    assert words(inspect.cleandoc(cls.__doc__).split("\n\n")[0]) in words(text)
    assert words(inspect.getmodule(cls).__doc__.splitlines()[0]) in words(text)
    assert cls.cite in text
    assert f"{cls.__module__}.{cls.__qualname__}" in text
    for field in dataclasses.fields(cls):
        assert re.search(rf"^    {field.name} +\S.* \((required|default .+)\)$", text, re.M), field.name
    assert "``" not in text
    assert not re.search(r"\bNone\b", text)
    assert not re.search(r"[ \t]$", text, re.M)
    assert not re.search(r"\n\n\n", text)


@pytest.mark.parametrize(("kind", "name"), EVERY_PART)
def test_every_field_of_every_part_has_a_note(kind, name):
    lines = explain(entries(kind)[name]).splitlines()
    begin = lines.index("  fields") + 1 if "  fields" in lines else len(lines)
    for i, line in enumerate(lines[begin:], begin):
        if not line:
            break
        if re.match(r"    \S", line):
            assert re.match(r"     +\S", lines[i + 1]), f"{line.strip()}: no word about it in the docstring"


@pytest.mark.parametrize("name", entries("trainer"))
def test_a_trainer_shows_fidelity_cost_and_parts(name):
    cls = entries("trainer")[name]
    text = explain(cls)
    assert f"  fidelity  {cls.fidelity}" in text
    assert cls.passes
    assert f"  cost      {cls.passes} per sample and step" in text
    assert f"    objective: {cls().objective.name} " in text
    assert f"    gradient: {cls().gradient.name} " in text
    for stage in cls().inner:
        assert f"    inner: {stage.name} " in text


def test_the_whole_text_of_a_part():
    text = explain(entries("objective")["trades"], 90)
    assert (
        text
        == """\
trades, an objective

  Clean cross-entropy plus beta times the divergence between clean and adversarial
  predictions.

  details
    TRADES (Zhang et al., ICML 2019, arXiv:1901.08573), equation 5.

        min_w  E[ CE(f(x), y) + beta * max_{|d| <= eps} KL(softmax f(x) || softmax f(x + d)) ]

        beta   weight of the robust term (1 / lambda in the paper)
        x + d  the view 'adv'; the inner maximisation is the attack's

    Gradients flow through both arguments of the divergence; the mean is over samples (not
    over classes). Differences from the authors' code: none.

  fields
    beta   a number >= 0 (default 6)
           weight of the divergence.
    clean  a word (default clean)
           the two views.
    adv    a word (default adv)
           the two views.

  use       trainer.objective: trades
  source    Zhang et al., ICML 2019, arXiv:1901.08573
  code      robustlab.objectives.trades.TradesLoss"""
    )


def test_an_attack_names_only_its_own_norms():
    assert re.search(r"^    norm +one of linf, l2, l1 or null \(default null\)$", explain(entries("attack")["apgd"]), re.M)
    assert re.search(r"^    norm +one of linf, l2, l1 or null \(default null\)$", explain(entries("attack")["pgd"]), re.M)


def test_a_default_that_a_factory_makes_is_shown():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Made(Attack):
        """Made.

        Attributes:
            norm, eps: the threat model.
            many: numbers.
        """

        name, cite = "made", ""
        norm: Norm | None = None
        eps: NonNegative | None = None
        many: tuple[int, ...] = dataclasses.field(default_factory=lambda: (1, 2))

    assert "    many  a list of whole numbers (default [1, 2])\n          numbers." in explain(Made)


def test_names_that_stand_for_several_parts_show_the_trainer_first():
    assert [cls.kind for cls in find("trades")] == ["trainer", "objective"]
    assert [cls.kind for cls in find("awp")] == ["trainer", "gradient"]
    assert [cls.name for cls in find("timm:resnet18")] == ["timm"]


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(UserError, match=r"^nothing is called 'tradess' \(did you mean 'trades'\?\); `robustlab list attacks`"):
        find("tradess")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a b\nc d", ["a b c d"]),
        ("aaa bbb ccc", ["aaa bbb", "ccc"]),
        ("a\n\nb", ["a", "", "b"]),
        ("a\n\n    x =  y +     z\n\nb", ["a", "", "    x =  y +     z", "", "b"]),
        ("- aaa bbb ccc\n- d\n  e", ["- aaa bbb", "  ccc", "- d e"]),
        ("``a`` None", ["'a' null"]),
    ],
)
def test_prose_is_filled_and_formulas_are_not(text, lines):
    assert reflow(text, 10) == lines


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), (0.1, "0.1"), (8 / 255, "0.0313725"), (("a", 1), "[a, 1]"), ("x", "x"), ((), "[]")],
)
def test_defaults_in_a_few_characters(value, text):
    assert short(value) == text


# ------------------------------------------------------------------------------------------------------------- screen


def test_columns_are_aligned_and_never_folded():
    text = console.columns(["name", "what"], [["a", "x" * 300], ["long-name", ""]])
    assert text.splitlines() == ["name       what", f"a          {'x' * 300}", "long-name"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (12.4, "12s"), (59.6, "1m00"), (200, "3m20"), (3600, "1h00"), (3725, "1h02"), (90000, "25h00")]
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text


def test_named_terms_of_a_loss():
    assert console.terms_text({"loss": 1.0, "adv": 1.0}) == "loss 1.000"
    event = {"kind": "epoch", "epoch": 3, "lr": 0.1, "loss": 1.5, "natural": 1.0, "robust": 0.5, "val_clean": 0.9, "seconds": 1.0}
    assert console.terms_text(event) == "loss 1.500 (natural 1.000 robust 0.500)"
    assert console.accuracies_text(event, "val pgd-10") == "val clean 90.0%"
    assert console.accuracies_text({"val_clean": 0.9, "val_robust": 0.5}, "val pgd-10") == "val clean 90.0%  val pgd-10 50.0%"


def events(epochs: int, steps: int):
    for epoch in range(epochs):
        for step in range(1, steps + 1):
            terms = {"loss": 2.0, "natural": 1.5, "robust": 0.5}
            yield {"kind": "step", "epoch": epoch, "epochs": epochs, "step": step, "steps": steps, "terms": terms}
        end = {
            "kind": "epoch",
            "epoch": epoch + 1,
            "step": (epoch + 1) * steps,
            "lr": 0.05,
            "loss": 2.0,
            "natural": 1.5,
            "robust": 0.5,
        }
        yield end | {"seconds": 1.0, "images_per_second": 640.0, "val_clean": 0.5, "val_robust": 0.25}


def shown(monkeypatch, terminal: bool) -> str:
    stream = io.StringIO()
    fake = Console(file=stream, force_terminal=terminal, width=150, soft_wrap=True, highlight=False, color_system=None)
    monkeypatch.setattr(console, "err", fake)
    with console.TrainingScreen(10) as screen:
        for event in events(2, 8):
            screen(event)
        if terminal:
            screen._bar.refresh()
    return stream.getvalue()


def test_a_training_run_without_a_terminal_is_one_line_an_epoch(monkeypatch):
    lines = shown(monkeypatch, terminal=False).splitlines()
    assert len(lines) == 2
    assert re.fullmatch(
        r"epoch   1  lr 0\.0500  loss 2\.000 \(natural 1\.500 robust 0\.500\)  "
        r"val clean 50\.0%  val pgd-10 25\.0%  640 img/s  eta \d+s",
        lines[0],
    )
    assert lines[1].endswith("eta 0s")


def test_a_training_run_on_a_terminal_has_a_progress_line(monkeypatch):
    text = shown(monkeypatch, terminal=True)
    bar = [line for line in re.split(r"[\r\n]", text) if "epoch 2/2" in line][-1]
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", bar)
    assert re.search(
        r"epoch 2/2 .*100% +([\d.]+ it/s)? +eta +[\d:-]+ +loss 2\.000 \(natural 1\.500 robust 0\.500\)  val clean 50\.0%", plain
    )
    assert "val pgd-10 25.0%" in plain
    assert "epoch   1  lr 0.0500" in text
    assert "img/s" not in text


def test_trainers_are_listed_with_a_summary_of_one_sentence():
    for cls in entries("trainer").values():
        assert issubclass(cls, Trainer)
        assert summary(cls).endswith(".")
        assert "\n" not in summary(cls)
