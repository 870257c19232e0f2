"""The loop of an evaluation: batch by batch, threat model by threat model, every verdict through the ledger.

    survivors = right on the clean images
    for each threat model:             survivors go down the cascade of attacks
    for each corruption and severity:  right on the corrupted images; if asked, those that are go to an attack
    in the end:                        the audit: the exact suite for some of the survivors that were spared it

It knows positions, verdicts and their order; how an attack searches is ``search``'s business, what is right is ``judge``'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustlab.evaluation.adversarial import Keeper
from robustlab.evaluation.audit import PREFIX, Audit, judged
from robustlab.evaluation.cascade import Step, descend, gate_of, nearness_in, steps_of
from robustlab.evaluation.corrupted import Corrupted
from robustlab.evaluation.judge import confidence, right
from robustlab.evaluation.ledger import Ledger, threat_name
from robustlab.evaluation.reliability.report import IMAGES, SHARE, examine
from robustlab.evaluation.result import Result, Tally, as_mask, assemble
from robustlab.evaluation.search import Found, Search
from robustlab.evaluation.sources import Batch, Fingerprint, gathered
from robustlab.rng import Rng
from robustlab.types import Attack, BoundSuite, CorruptionSuite, Suite, Threat, UserError

Entry = dict[str, Any]


@dataclass
class Under:
    """What happened under one threat model: tallies by attack, positions of who survived and who was spared, the audit."""

    threat: Threat
    tallies: dict[str, Tally]
    robust: list[int] = field(default_factory=list)
    spared: list[int] = field(default_factory=list)
    audit: Audit | None = None


class Loop:
    """One evaluation in progress.

    Args:
        suite: what to do.
        threats: of its attacks.
        search: the classifier, attacked.
        corrupted: the suite's corrupted images.
        seed: of all draws.
        ledger: where every verdict goes, and comes from if it is there.
        keeper: of the adversarial images, if they are to be kept.
        size: how many images there will be, if the data say so.
        progress: called after each line of the ledger.

    Attributes:
        batches: how many have been seen; the number of the one at hand.
        rows: positions of the images evaluated so far.
    """

    def __init__(
        self,
        suite: Suite,
        threats: list[Threat],
        search: Search,
        corrupted: Corrupted,
        seed: int,
        ledger: Ledger,
        keeper: Keeper | None,
        size: int | None,
        progress: Callable[[dict[str, Any]], None] | None,
    ):
        self.search, self.judge, self.corrupted, self.seed = search, search.judge, corrupted, seed
        self.ledger, self.keeper, self.size, self.progress = ledger, keeper, size, progress
        self.steps, self.gate = steps_of(suite), gate_of(suite)
        self.under = [Under(t, {step.label: Tally() for step in self.steps}) for t in threats]
        self.corruptions = {(label, s): Tally() for label in corrupted.corruptions for s in suite.severities}
        self.corruptions_attacked = {key: Tally() for key in self.corruptions if corrupted.attack is not None}
        self.confident = isinstance(suite, CorruptionSuite)  # whether the ledger tells confidences
        self.fingerprint, self.hashes = Fingerprint(), list[str]()  # of all images; of each batch
        self.seen = self.batches = 0
        self.rows, self.labels = list[int](), list[Tensor]()
        self.clean, self.clean_rows = Tally(), list[int]()
        self.sample: list[Batch] = []  # the first images that are classified correctly, for the reliability report
        self.note: dict[str, Any] = {}  # what else the ledger's lines say

    # ---------------------------------------------------------------------------------------------- one batch

    def batch(self, x: Tensor, y: Tensor) -> None:
        """Evaluate the next images of the data."""
        first, self.seen = self.seen, self.seen + len(x)
        index, self.shift = torch.arange(first, self.seen), len(self.rows) - first
        self.hashes.append(self.fingerprint.add(x, y))
        self.labels.append(y)
        x, y = self._moved(x, y)
        if self.keeper is not None and self.ledger.get(None, "clean", self.batches) is None:
            self.keeper.put(index + self.shift, x)
        correct = self._clean(x, y, index)
        if (missing := IMAGES - sum(len(labels) for _, labels in self.sample)) > 0:
            rows = correct.nonzero().squeeze(1)[:missing].to(x.device)
            self.sample.append((x[rows], y[rows]))
        for under in self.under:
            attack = functools.partial(self._attack, under.threat, under.tallies, lambda: (x, y), index)
            alive, spared = descend(correct, self.steps, self.gate, attack)
            under.robust += index[alive].tolist()
            under.spared += index[spared].tolist()
        for label, severity in self.corruptions:
            self._corrupt(label, severity, x, y, index)
        self.rows += index.tolist()
        self.shape, self.batches = tuple(x.shape[1:]), self.batches + 1

    def skip(self, x: Tensor, y: Tensor) -> None:
        """Pass over images of another shard."""
        self.hashes.append(self.fingerprint.add(x, y))
        self.seen, self.batches = self.seen + len(x), self.batches + 1

    def _clean(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """Which rows are classified correctly, as a mask on the CPU."""
        old, images = self.ledger.get(None, "clean", self.batches), self.hashes[-1]
        if old is not None and old.get("images") != images:
            raise UserError(
                f"{self.ledger.path}: the images or labels of batch {self.batches} are not those of the earlier run; "
                "the data changed, or its order is not fixed (a DataLoader that shuffles?)"
            )
        ask = functools.partial(self.judge.clean, x, y, self.batches)
        if old is not None and not self.judge.fits:
            ask()
        entry = self._line(None, "clean", self.clean, lambda: self._scored(index, y, ask, images=images))
        verdict = torch.tensor(entry["verdict"], dtype=torch.bool)
        self.clean_rows += index[verdict].tolist()
        return verdict

    def _attack(
        self,
        threat: Threat,
        tallies: Mapping[str, Tally],
        batch: Callable[[], Batch],
        index: Tensor,
        step: Step,
        rows: Tensor,
    ) -> Entry:
        """One attack of a cascade on some rows of a batch."""

        def make() -> Entry:
            (x, y), pick = batch(), rows.to(self.judge.device)
            found = self._search(step.attack, threat, step.label, step.position, x[pick], y[pick], index[rows])
            if self.keeper is not None:  # before the ledger says so
                self.keeper.put(index[rows] + self.shift, found.x_adv)
            told = {"reached": found.reached, "outside": found.outside, "unverified": found.unverified, "flags": found.flags}
            told |= {} if found.passes is None else {"passes": found.passes.tolist()}
            return _line_of(index[rows], found) | told | nearness_in({} if found.nearness is None else {"nearness": found.nearness})

        return self._line(threat, step.label, tallies[step.label], make)

    def _corrupt(self, label: str, severity: int, x: Tensor, y: Tensor, index: Tensor) -> None:
        """One corruption, and the attack on those of its images that are classified correctly."""
        name, key, made = f"{label}/{severity}", (label, severity), self.corrupted
        images = functools.cache(functools.partial(made.images, label, severity, x, index, self.batches))
        scored = functools.partial(self._scored, index, y, lambda: self.judge.logits(images()))
        entry = self._line(None, name, self.corruptions[key], scored)
        if made.attack is None or made.threat is None:
            return
        name, attack, threat = f"{name}+{made.attack.name}", made.attack, made.threat
        rows = torch.tensor(entry["verdict"], dtype=torch.bool).nonzero().squeeze(1)

        def make() -> Entry:
            pick = rows.to(x.device)
            found = self._search(attack, threat, name, name, images()[pick], y[pick], index[rows], copies=False)
            return _line_of(index[rows], found)

        self._line(None, name, self.corruptions_attacked[key], make)

    def _search(
        self,
        attack: Attack,
        threat: Threat,
        label: str,
        key: int | str,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        *,
        copies: bool = True,
    ) -> Found:
        """Attack images; the draws depend on the seed, the threat model, a key and the images' positions."""
        rng = Rng(self.seed).child("evaluate", threat.norm, repr(threat.eps), key, attack.name)
        rng = rng.split(1, first=self.batches)[0].at(index.to(x.device))
        return self.search.run(attack, threat, label, x, y, rng, copies=copies)

    def _scored(self, index: Tensor, y: Tensor, ask: Callable[[], Tensor], **extra: Any) -> Entry:
        """What the ledger says of one forward pass."""
        start = self.judge.clock()
        z = ask()
        verdict = right(z, y).int().tolist()
        seconds = self.judge.clock() - start
        extra |= {"confidence": confidence(z)} if self.confident else {}
        line = {"index": index.tolist(), "verdict": verdict, "forwards": len(y), "backwards": 0, "seconds": seconds}
        return line | extra

    def _moved(self, x: Tensor, y: Tensor) -> Batch:
        return x.to(self.judge.device, self.judge.dtype), y.to(self.judge.device)

    # -------------------------------------------------------------------------------------------------- audit

    def audit(
        self,
        suite: BoundSuite,
        exact: Suite,
        size: int,
        points: float | None,
        batch_size: int,
        again: Callable[[], Iterator[Batch]],
    ) -> None:
        """Give the exact suite to survivors drawn at random, under each threat model; what breaks is broken."""
        steps = [Step(PREFIX + step.label, step.attack, step.position) for step in steps_of(exact)]
        for under in self.under:
            pool = under.spared if judged(suite, exact) else under.robust
            audit = under.audit = Audit(suite.exact, pool, len(self.rows), self.seed, under.threat, size, points)
            tallies = {step.label: audit.tally for step in steps}
            name = threat_name(under.threat), steps[0].label
            known = {key[2]: len(entry["index"]) for key, entry in self.ledger.done.items() if key[:2] == name}
            for self.batches, rows in audit.pieces(batch_size, known):
                index, self.note = torch.tensor(rows), {"looks": audit.looks}
                images = functools.cache(functools.partial(self._gathered, index, again))
                attack = functools.partial(self._attack, under.threat, tallies, images, index)
                alive, _ = descend(torch.ones(len(rows), dtype=torch.bool), steps, None, attack)
                looks = self.ledger.done.get((*name, self.batches), {"looks": audit.looks})["looks"]
                audit.count(len(rows), int((~alive).sum()), looks)
                broken = set(index[~alive].tolist())
                under.robust = [row for row in under.robust if row not in broken]

    def _gathered(self, index: Tensor, again: Callable[[], Iterator[Batch]]) -> Batch:
        """Images from another pass over the data, for lines that the ledger does not have yet."""
        if self.keeper is not None and self.keeper.finished:
            raise UserError(f"{self.keeper.path}: made before this audit, which goes further; start again in another --out")
        return self._moved(*gathered(index, again(), self.hashes))

    # -------------------------------------------------------------------------------------------------- ledger

    def _line(self, threat: Threat | None, attack: str, tally: Tally, make: Callable[[], Entry]) -> Entry:
        """One line of the ledger: looked up, or made and written; then counted and told to who watches."""
        entry = self.ledger.get(threat, attack, self.batches)
        if entry is None:
            made, under = make(), None if threat is None else asdict(threat)
            last = {**self.note, "seed": self.seed, "seconds": round(made.pop("seconds"), 6)}
            entry = {"threat": under, "attack": attack, "batch": self.batches, **made, **last}
            self.ledger.append(entry)
        tally.add(entry)
        if self.progress is not None:
            self.progress(self._event(entry))
        return entry

    def _event(self, entry: Entry) -> dict[str, Any]:
        done = len(self.rows)
        return {
            "n": self.size,
            "done": done,
            "batch": self.batches,
            "threat": entry["threat"],
            "attack": entry["attack"],
            "given": len(entry["verdict"]),
            "correct": sum(entry["verdict"]),
            "seconds": entry["seconds"],
            "clean_accuracy": self.clean.correct / self.clean.given,
            "robust_accuracy": len(self.under[0].robust) / done if self.under and done else None,
        }

    # -------------------------------------------------------------------------------------------------- result

    def reliability(self) -> dict[str, Any]:
        """The reliability report under the first threat model."""
        x, y = (torch.cat(parts) for parts in zip(*self.sample, strict=True))
        spent = sum(t.forwards + t.backwards for under in self.under for t in under.tallies.values())
        return examine(self.judge.f, x, y, self.under[0].threat, seed=self.seed, passes=SHARE * spent).to_dict()

    def result(self, **known: Any) -> Result:
        """What came out; ``known``: the fields of the result that the loop does not know."""
        return assemble(
            len(self.rows),
            self.clean,
            self._verdicts(self.clean_rows),
            [(u.threat.norm, u.threat.eps) for u in self.under],
            [u.tallies for u in self.under],
            [self._verdicts(u.robust) for u in self.under],
            self.corruptions,
            self.corruptions_attacked,
            None if self.corrupted.threat is None else asdict(self.corrupted.threat),
            [None if u.audit is None else u.audit.to_dict() for u in self.under],
            seed=self.seed,
            fingerprint=self.fingerprint.value(),
            **known,
        )

    def keep(self) -> None:
        """Make the file of adversarial images."""
        if self.keeper is not None:
            self.keeper.finish(self.rows, torch.cat(self.labels), self._verdicts(self.under[0].robust), self.shape)

    def _verdicts(self, positions: list[int]) -> Tensor:
        """For each image evaluated whether its position is among these."""
        return as_mask(positions, self.seen)[self.rows]


def _line_of(index: Tensor, found: Found) -> Entry:
    """What the ledger says of a search."""
    passes = {"forwards": found.forwards, "backwards": found.backwards, "seconds": found.seconds}
    return {"index": index.tolist(), "verdict": found.robust.int().tolist(), **passes}
