"""Malformed configurations: one clear line each with file, line and key; exit code 2; no traceback; nothing written."""

import copy
import random
import re
import string
from pathlib import Path

import pytest
import yaml

from robustlab.cli import run

CONFIGS = Path(__file__).parents[2] / "configs"

GOOD = """\
trainer: pgd-at
model: small_cnn
data: digits
"""

LARGE = """\
trainer:
  name: pgd-at
  inner:
    - {name: mixup, alpha: 0.2, scope: sample}
    - name: craft
      attack: {name: pgd, steps: 7, eps: {name: linear, start: 0, end: 8/255, epochs: 3}, start: uniform}
      on: clean
      to: adv
    - label-smoothing
  objective: {name: cross-entropy, on: [clean, adv]}
  regularizers:
    - {name: logit-variation, lam: {name: piecewise, milestones: [0.5], values: [0, 0.3]}, share: 1.0}
  gradient: {name: awp, gamma: {name: linear, start: 0.0, end: 0.01}}
  averaging: {name: ema, decay: 0.99, ramp: true}
  attack_bn: eval
  bn_updates: [clean, adv]
  joint: [[clean, adv]]
  allow_shards: true
model: {name: small_cnn, width: 8, norm: group, activation: silu, mean: [0.5], std: [0.25], init: null}
data: {name: digits, size: 8, channels: 1}
threat: {norm: linf, eps: 26/255}
optimizer: {name: sgd, lr: 1e-1, momentum: .9, nesterov: true, weight_decay: 5e-4, decay_vectors: false}
schedule: {name: piecewise, milestones: [0.5, 0.75], values: [1, 0.1, 0.01], warmup: 0.5}
training:
  epochs: 4
  batch_size: 0x40
  accumulation: 2
  clip_grad: 1.0
  precision: fp32
  channels_last: false
  device: cpu
  threads: 1
  probe: {every: 2, num_examples: 50, steps: 3}
  guards: {nan: true, collapse: null}
evaluation: {suites: [pgd-20], num_examples: 64, batch_size: 32}
logging: [jsonl]
seed: 17
"""

REST = "model: small_cnn\ndata: digits\n"

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12))

SUITE = """\
attacks:
  - {name: pgd, steps: 5, restarts: 2}
  - apgd
corruptions: [brightness]
severities: [1, 3]
norms: [linf, l2]
eps: [4/255, 8/255]
seed: 0
"""

# (kind, text, what is printed). Where the text is a dict, all its files are written and c.yaml is read. The names that follow
# "known:" are left out, so that a new part does not change a line here.
CASES: list[tuple[str, object, list[str]]] = [
    ("unknown key", GOOD + "treat: {eps: 0.1}\n", ["c.yaml:4: treat: unknown key (did you mean 'threat'?)"]),
    (
        "unknown key",
        GOOD + "training: {epochs: 3, batchsize: 64}\n",
        ["c.yaml:4: training.batchsize: unknown key (did you mean 'batch_size'?)"],
    ),
    (
        "unknown key",
        "trainer: {name: pgd-at, inner: {craft: {attack: {step_size: 0.1}}}}\n" + REST,
        ["c.yaml:1: trainer.inner.craft.attack.step_size: unknown key (did you mean 'steps'?)"],
    ),
    ("unknown key", GOOD + "<<: {seed: 3}\n", ["c.yaml:4: <<: unknown key; known: ..."]),
    (
        "unknown trainer",
        "trainer: pgdat\n" + REST,
        ["c.yaml:1: trainer: unknown trainer 'pgdat' (did you mean 'pgd-at'?); known: ..."],
    ),
    (
        "unknown model",
        "trainer: pgd-at\nmodel: smal_cnn\ndata: digits\n",
        ["c.yaml:2: model: unknown model 'smal_cnn' (did you mean 'small_cnn'?); known: ..."],
    ),
    (
        "unknown data set",
        "trainer: pgd-at\nmodel: small_cnn\ndata: {name: cifar11}\n",
        ["c.yaml:3: data: unknown dataset 'cifar11' (did you mean 'cifar10'?); known: ..."],
    ),
    (
        "unknown optimizer",
        GOOD + "optimizer: adam\n",
        ["c.yaml:4: optimizer: unknown optimizer 'adam' (did you mean 'adamw'?); known: ..."],
    ),
    (
        "unknown schedule",
        GOOD + "schedule: {name: cosinus}\n",
        ["c.yaml:4: schedule: unknown schedule 'cosinus' (did you mean 'cosine'?); known: ..."],
    ),
    (
        "unknown attack",
        "trainer:\n  name: pgd-at\n  inner:\n    - name: craft\n      attack: pdg\n" + REST,
        ["c.yaml:5: trainer.inner.0.attack: unknown attack 'pdg' (did you mean 'pgd'?); known: ..."],
    ),
    (
        "unknown stage",
        "trainer: {name: standard, inner: [mixupp]}\n" + REST,
        ["c.yaml:1: trainer.inner.0: unknown stage 'mixupp' (did you mean 'mixup'?); known: ..."],
    ),
    (
        "unknown objective",
        "trainer: {name: standard, objective: cross-entrpy}\n" + REST,
        ["c.yaml:1: trainer.objective: unknown objective 'cross-entrpy' (did you mean 'cross-entropy'?); known: ..."],
    ),
    (
        "unknown regularizer",
        "trainer: {name: pgd-at, regularizers: [logit_variation]}\n" + REST,
        ["c.yaml:1: trainer.regularizers.0: unknown regularizer 'logit_variation' (did you mean 'logit-variation'?); known: ..."],
    ),
    (
        "unknown gradient rule",
        "trainer: {name: pgd-at, gradient: {name: awpp}}\n" + REST,
        ["c.yaml:1: trainer.gradient: unknown gradient 'awpp' (did you mean 'awp'?); known: ..."],
    ),
    (
        "unknown averaging",
        "trainer: {name: pgd-at, averaging: none}\n" + REST,
        ["c.yaml:1: trainer.averaging: unknown averaging 'none'; known: ..."],
    ),
    (
        "unknown suite",
        GOOD + "evaluation:\n  suites: [pgd-20, autoatack-reference]\n",
        ["c.yaml:5: evaluation.suites.1: unknown suite 'autoatack-reference' (did you mean 'autoattack-reference'?); known: ..."],
    ),
    (
        "unknown part to change",
        "trainer: {name: pgd-at, inner: {kraft: {to: adv}}}\n" + REST,
        [
            "c.yaml:1: trainer.inner.kraft: no such stage to change (did you mean 'craft'?); "
            "here are: craft (write a list to replace them)"
        ],
    ),
    (
        "wrong kind",
        "trainer: pgd\n" + REST,
        ["c.yaml:1: trainer: unknown trainer 'pgd' (did you mean 'pgd-at'?); 'pgd' is an attack; known: ..."],
    ),
    ("wrong type", GOOD + "training:\n  epochs: many\n", ["c.yaml:5: training.epochs: expected a whole number >= 1, got 'many'"]),
    ("wrong type", GOOD + "training: 20\n", ["c.yaml:4: training: expected a mapping, got 20"]),
    (
        "wrong type",
        GOOD + "trainer_: 3\nlogging: [[jsonl]]\n",
        [
            "c.yaml:4: trainer_: unknown key (did you mean 'trainer'?)",
            "c.yaml:5: logging.0: expected one of jsonl, tensorboard, wandb, got a list",
        ],
    ),
    (
        "wrong type",
        "trainer: 7\nmodel: small_cnn\ndata: [digits]\n",
        [
            "c.yaml:1: trainer: expected the name of a trainer or a mapping with one, got 7",
            "c.yaml:3: data: expected the name of a data set or a mapping with one, got a list",
        ],
    ),
    (
        "wrong type",
        GOOD + "logging: jsonl\nevaluation: {suites: [pgd-20, 3]}\n",
        [
            "c.yaml:4: logging: expected a list of one of jsonl, tensorboard, wandb, got 'jsonl' (write [jsonl])",
            "c.yaml:5: evaluation.suites.1: expected a word, got 3",
        ],
    ),
    (
        "wrong type",
        GOOD + "optimizer: {name: sgd, nesterov: 'yes'}\n",
        ["c.yaml:4: optimizer.nesterov: expected true or false, got 'yes'"],
    ),
    ("bool for int", GOOD + "training: {epochs: true}\n", ["c.yaml:4: training.epochs: expected a whole number >= 1, got true"]),
    ("bool for float", GOOD + "optimizer: {lr: false}\n", ["c.yaml:4: optimizer.lr: expected a number > 0, got false"]),
    ("number for bool", GOOD + "training: {compile: 1}\n", ["c.yaml:4: training.compile: expected true or false, got 1"]),
    (
        "fraction of an epoch",
        GOOD + "training: {epochs: 1.5}\n",
        ["c.yaml:4: training.epochs: expected a whole number >= 1, got 1.5"],
    ),
    (
        "eps negative",
        GOOD + "threat: {norm: linf, eps: -8/255}\n",
        ["c.yaml:4: threat.eps: must be a finite number >= 0, got -0.03137254901960784"],
    ),
    ("eps not a number", GOOD + "threat: {eps: .nan}\n", ["c.yaml:4: threat.eps: expected a number, got .nan"]),
    ("eps infinite", GOOD + "threat:\n  norm: l2\n  eps: .inf\n", ["c.yaml:6: threat.eps: expected a number, got .inf"]),
    (
        "eps in 0..255",
        GOOD + "threat:\n  norm: linf\n  eps: 8\n",
        ["c.yaml:6: threat.eps: is in [0, 1] pixel units: for linf 8 is more than the whole range; did you mean 8/255?"],
    ),
    (
        "eps in 0..255",
        "trainer:\n  name: pgd-at\n  inner:\n    craft:\n      attack:\n        eps: 8\n" + REST,
        [
            "c.yaml:6: trainer.inner.craft.attack.eps: is in [0, 1] pixel units: for linf 8 is more than the whole range; "
            "did you mean 8/255?"
        ],
    ),
    ("fraction over zero", GOOD + "threat: {eps: 8/0}\n", ["c.yaml:4: threat.eps: expected a number, got '8/0'"]),
    (
        "unsupported norm",
        GOOD + "threat: {norm: l0, eps: 10}\n",
        ["c.yaml:1: trainer.inner.craft.attack: pgd: norm 'l0' is not supported; expected one of linf, l2, l1"],
    ),
    (
        "unsupported norm",
        "trainer: {name: pgd-at, inner: {craft: {attack: {norm: l0}}}}\n" + REST,
        ["c.yaml:1: trainer.inner.craft.attack: pgd: norm 'l0' is not supported; expected one of linf, l2, l1"],
    ),
    (
        "unknown norm",
        GOOD + "threat: {norm: l3, eps: 0.1}\n",
        ["c.yaml:4: threat.norm: expected one of linf, l2, l1, l0, got 'l3' (did you mean 'l2'?)"],
    ),
    (
        "unknown norm",
        GOOD + "threat: {norm: Linf}\n",
        ["c.yaml:4: threat.norm: expected one of linf, l2, l1, l0, got 'Linf' (did you mean 'linf'?)"],
    ),
    (
        "zero",
        GOOD + "training: {epochs: 0, batch_size: 0}\n",
        [
            "c.yaml:4: training.epochs: expected a whole number >= 1, got 0",
            "c.yaml:4: training.batch_size: expected a whole number >= 1, got 0",
        ],
    ),
    ("negative", GOOD + "seed: -1\n", ["c.yaml:4: seed: expected a whole number >= 0, got -1"]),
    (
        "huge integer",
        GOOD + "training: {epochs: 10000000000000000000000}\n",
        ["c.yaml:4: '10000000000000000000000' is too large a number"],
    ),
    (
        "huge integer",
        GOOD + "seed: 0x" + "f" * 6000,
        ["c.yaml:4: '0xffffffffffffffffffffffffffffffffffffffffffffffffffffff... is too large a number"],
    ),
    (
        "huge integer",
        GOOD + "seed: " + "9" * 6000,
        ["c.yaml:4: '99999999999999999999999999999999999999999999999999999999... is too large a number"],
    ),
    (
        "huge number",
        GOOD + "threat: {norm: l2, eps: 1e300}\n",
        ["c.yaml:4: threat.eps: expected a number, got 1.0e+300, which float32 cannot hold"],
    ),
    (
        "huge number",
        GOOD + "training: {threads: 1099511627776}\n",
        ["c.yaml:4: training.threads: expected a whole number >= 1 and <= 4096 or null, got 1099511627776"],
    ),
    ("huge number", GOOD + "optimizer: {lr: 1e999}\n", ["c.yaml:4: optimizer.lr: expected a number > 0, got .inf"]),
    ("missing", "trainer: pgd-at\nmodel: small_cnn\n", ["c.yaml:1: data: missing; expected a data set"]),
    (
        "missing",
        "seed: 0\n",
        [
            "c.yaml:1: trainer: missing; expected a trainer",
            "c.yaml:1: model: missing; expected a model",
            "c.yaml:1: data: missing; expected a data set",
        ],
    ),
    ("missing", "trainer: {attack_bn: eval}\n" + REST, ["c.yaml:1: trainer: 'name' is missing; known: ..."]),
    (
        "missing",
        "trainer: {name: standard, inner: [{name: craft, to: adv}]}\n" + REST,
        ["c.yaml:1: trainer.inner.0.attack: missing; expected an attack"],
    ),
    ("name is null", "trainer: {name: null}\n" + REST, ["c.yaml:1: trainer.name: expected the name of a trainer, got nothing"]),
    (
        "null",
        "trainer: null\nmodel: small_cnn\ndata: digits\noptimizer: ~\n",
        [
            "c.yaml:1: trainer: expected the name of a trainer or a mapping with one, got nothing",
            "c.yaml:4: optimizer: expected the name of an optimizer or a mapping with one, got nothing",
        ],
    ),
    (
        "unknown view",
        "trainer:\n  name: standard\n  objective: {name: cross-entropy, on: [adv]}\n" + REST,
        ["c.yaml:3: trainer.objective.on: asks for the view 'adv', but the stages make only: clean"],
    ),
    (
        "unknown view",
        "trainer:\n  name: pgd-at\n  inner:\n    - mixup\n" + REST,
        ["c.yaml:1: trainer.objective.on: asks for the view 'adv', but the stages make only: clean"],
    ),
    (
        "no view",
        "trainer: {name: standard, objective: {name: cross-entropy, on: []}}\n" + REST,
        ["c.yaml:1: trainer.objective.on: name at least one view"],
    ),
    ("milestones", GOOD + "schedule: {name: piecewise, milestones: [0.75, 0.5]}\n", ["c.yaml:4: schedule.milestones: must rise"]),
    (
        "milestones",
        GOOD + "schedule: {name: piecewise, values: [1, 0.1]}\n",
        ["c.yaml:4: schedule.values: expected one more than milestones (3), got 2"],
    ),
    (
        "milestones",
        GOOD + "schedule: {name: piecewise, milestones: [50, 75]}\n",
        [
            "c.yaml:4: schedule.milestones.0: expected a number >= 0 and <= 1, got 50",
            "c.yaml:4: schedule.milestones.1: expected a number >= 0 and <= 1, got 75",
        ],
    ),
    (
        "nesterov",
        GOOD + "optimizer:\n  name: sgd\n  nesterov: true\n  momentum: 0\n",
        ["c.yaml:6: optimizer.nesterov: needs a momentum above 0"],
    ),
    (
        "width",
        "trainer: pgd-at\nmodel: {name: small_cnn, norm: group, width: 12}\ndata: digits\n",
        ["c.yaml:2: model.width: must be divisible by 8 for norm 'group', got 12"],
    ),
    (
        "choice",
        "trainer: pgd-at\nmodel: small_cnn\ndata: {name: digits, size: 12}\n",
        ["c.yaml:3: data.size: expected one of 8, 16, 32, got 12"],
    ),
    (
        "schedule out of range",
        "trainer:\n  name: pgd-at\n  gradient: {name: awp, gamma: {name: linear, start: 0.01, end: -0.01}}\n" + REST,
        ["c.yaml:3: trainer.gradient.gamma: expected a number >= 0, but the schedule gives -0.000625 at epoch 5.3125"],
    ),
    (
        "schedule out of range",
        "trainer: {name: pgd-at, inner: {craft: {attack: {eps: {name: linear, start: 0, end: 8}}}}}\n" + REST,
        [
            "c.yaml:1: trainer.inner.craft.attack.eps: is in [0, 1] pixel units: for linf 1.25 is more than the whole range; "
            "did you mean 1.25/255?"
        ],
    ),
    (
        "schedule where none can be",
        GOOD + "optimizer:\n  lr: {name: linear, start: 0.1, end: 0}\n",
        ["c.yaml:5: optimizer.lr: a schedule cannot stand here; only the numbers of trainer and data.augment may vary"],
    ),
    (
        "schedule in a schedule",
        GOOD + "schedule: {name: linear, start: {name: cosine}}\n",
        ["c.yaml:4: schedule.start: a schedule cannot stand here; only the numbers of trainer and data.augment may vary"],
    ),
    (
        "name with a colon",
        "trainer: pgd-at\nmodel: 'small_cnn:wide'\ndata: digits\n",
        ["c.yaml:2: model: 'small_cnn' takes no ':wide'"],
    ),
    ("empty", "", ["c.yaml:1: the file is empty; expected a mapping such as 'trainer: pgd-at'"]),
    ("empty", "# nothing but a comment\n", ["c.yaml:1: the file is empty; expected a mapping such as 'trainer: pgd-at'"]),
    ("empty", "---\n...\n", ["c.yaml:1: the file is empty; expected a mapping such as 'trainer: pgd-at'"]),
    ("a list", "- trainer: pgd-at\n- model: small_cnn\n", ["c.yaml:1: expected a mapping such as 'trainer: pgd-at', got a list"]),
    ("a scalar", "pgd-at\n", ["c.yaml:1: expected a mapping such as 'trainer: pgd-at', got 'pgd-at'"]),
    (
        "cyclic alias",
        "trainer: &t\n  name: pgd-at\n  inner: [*t]\n" + REST,
        ["c.yaml:1: an alias refers to the value that contains it"],
    ),
    ("unknown alias", "trainer: *t\n" + REST, ["c.yaml:1: not valid YAML: found undefined alias 't'"]),
    ("alias bomb", BOMB, ["c.yaml:1: more than 20000 values; aliases that multiply?"]),
    ("deep nesting", "trainer: " + "[" * 60 + "]" * 60, ["c.yaml:1: nested more than 50 levels deep"]),
    ("deep nesting", "trainer: " + "{a: " * 5000, ["c.yaml:1: nested more than 50 levels deep"]),
    (
        "python object",
        "trainer: !!python/object/apply:os.system ['touch owned']\n" + REST,
        ["c.yaml:1: the tag '!!python/object/apply:os.system' is not allowed; a configuration holds plain values only"],
    ),
    (
        "tag",
        "trainer: pgd-at\nmodel: !include model.yaml\ndata: digits\n",
        ["c.yaml:2: the tag '!include' is not allowed; a configuration holds plain values only"],
    ),
    ("tag", GOOD + "seed: !!int ten\n", ["c.yaml:4: 'ten' is no whole number"]),
    (
        "tag",
        GOOD + "seed: !!binary aGVsbG8=\n",
        ["c.yaml:4: the tag '!!binary' is not allowed; a configuration holds plain values only"],
    ),
    (
        "tag",
        GOOD + "evaluation: {suites: !!set {pgd-20}}\n",
        ["c.yaml:4: the tag '!!set' is not allowed; a configuration holds plain values only"],
    ),
    ("duplicate key", GOOD + "trainer: trades\n", ["c.yaml:4: trainer: this key stands twice (first in line 1)"]),
    (
        "duplicate key",
        GOOD + "optimizer: {lr: 0.1, momentum: 0.9, lr: 0.2}\n",
        ["c.yaml:4: lr: this key stands twice (first in line 4)"],
    ),
    (
        "tabs",
        "trainer: pgd-at\nmodel:\n\tname: small_cnn\ndata: digits\n",
        ["c.yaml:3: not valid YAML: found character '\\t' that cannot start any token"],
    ),
    (
        "bad YAML",
        "trainer: pgd-at\nmodel: {name: small_cnn\ndata: digits\n",
        ["c.yaml:3: not valid YAML: expected ',' or '}', but got ':'"],
    ),
    ("bad YAML", "trainer: pgd-at\n  " + REST, ["c.yaml:2: not valid YAML: mapping values are not allowed here"]),
    ("bad YAML", "trainer: 'pgd-at\nmodel: small_cnn\n", ["c.yaml:3: not valid YAML: found unexpected end of stream"]),
    (
        "bad escape",
        'trainer: "\\Uffffffff"\nmodel: small_cnn\n',
        ["c.yaml:1: not valid YAML: an escape that stands for no character"],
    ),
    (
        "two documents",
        GOOD + "---\n" + GOOD,
        ["c.yaml:4: not valid YAML: expected a single document in the stream, but found another document"],
    ),
    (
        "control character",
        "trainer: pgd-at\nmodel: small_\x07cnn\ndata: digits\n",
        ["c.yaml:2: not a text file: it contains the character U+0007"],
    ),
    (
        "control character",
        'trainer: "pgd\\e[31m\\nat"\n' + REST,
        ["c.yaml:1: trainer: unknown trainer 'pgd\\x1b[31m\\nat' (did you mean 'pgd-at'?); known: ..."],
    ),
    ("control character", GOOD + '"se\\ned": 3\n', ["c.yaml:4: a key must be a word"]),
    ("lone surrogate", 'trainer: "\\ud800"\n' + REST, ["c.yaml:1: trainer: unknown trainer '\\ud800'; known: ..."]),
    ("binary", bytes(range(256)), ["c.yaml:2: not a text file in UTF-8"]),
    ("binary", b"\x00\x00\x00\x00", ["c.yaml:1: not a text file: it contains the character U+0000"]),
    ("not UTF-8", b"trainer: pgd-at\nmodel: small_cnn # gro\xdf\ndata: digits\n", ["c.yaml:2: not a text file in UTF-8"]),
    ("UTF-16", GOOD.encode("utf-16"), ["c.yaml:1: not a text file in UTF-8"]),
    ("unhashable key", GOOD + "? [a, b]\n: 3\n", ["c.yaml:4: a key must be a word"]),
    ("unhashable key", GOOD + "{a: 1}: 3\n", ["c.yaml:4: a key must be a word"]),
    ("too long", GOOD + "# " + "x" * 300_000, ["c.yaml: more than 250,000 characters; not a configuration"]),
    (
        "long name",
        "trainer: " + "x" * 500 + "\nmodel: small_cnn\ndata: digits\n",
        ["c.yaml:1: trainer: unknown trainer 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...'; known: ..."],
    ),
    (
        "extends itself",
        {"c.yaml": "# two lines\nextends: c.yaml\ntrainer: pgd-at\n"},
        ["c.yaml:2: extends: a file cannot extend itself: c.yaml -> c.yaml"],
    ),
    (
        "extends in a circle",
        {"c.yaml": "extends: b.yaml\n", "b.yaml": "seed: 3\nextends: a.yaml\n", "a.yaml": "extends: c.yaml\n"},
        ["a.yaml:1: extends: a file cannot extend itself: c.yaml -> b.yaml -> a.yaml -> c.yaml"],
    ),
    (
        "extends a missing file",
        {"c.yaml": "extends: bases.yaml\ntrainer: pgd-at\n", "base.yaml": GOOD},
        ["c.yaml:1: extends: no such file 'bases.yaml' (did you mean 'base.yaml'?)"],
    ),
    ("extends a folder", "extends: .\ntrainer: pgd-at\n", ["c.yaml:1: extends: no such file '.'"]),
    ("extends no path", "extends: [a.yaml]\n", ["c.yaml:1: extends: expected a path, got a list"]),
    ("extends no path", "extends:\n", ["c.yaml:1: extends: expected a path, got nothing"]),
    ("extends no path", 'extends: "a\\0b.yaml"\n', ["c.yaml:1: extends: no such file 'a\\x00b.yaml'"]),
    (
        "extends no path",
        "extends: " + "a" * 5000,
        ["c.yaml:1: extends: no such file 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."],
    ),
    (
        "extends a broken file",
        {"c.yaml": "extends: base.yaml\nseed: 1\n", "base.yaml": "trainer: pgd-at\nmodel: small_cnn\n  data: digits\n"},
        ["base.yaml:3: not valid YAML: mapping values are not allowed here"],
    ),
    (
        "mistake in the base",
        {"c.yaml": "extends: base.yaml\nseed: 1\n", "base.yaml": GOOD + "\nepoch: 3\n"},
        ["base.yaml:5: epoch: unknown key; known: ..."],
    ),
    (
        "patch of a list",
        {
            "c.yaml": "extends: base.yaml\ntrainer:\n  inner:\n    kraft: {to: adv}\n",
            "base.yaml": "trainer: {name: pgd-at, inner: [craft, label-smoothing]}\n" + REST,
        },
        ["c.yaml:4: kraft: no such item (did you mean 'craft'?); this list has: craft, label-smoothing"],
    ),
    (
        "several at once",
        "trainer: pgdat\nmodel: {name: small_cnn, wdth: 8}\ndata: {name: digits, size: 9}\nthreat: {eps: 8}\n"
        "training: {epochs: 0}\nsede: 1\n",
        [
            "c.yaml:1: trainer: unknown trainer 'pgdat' (did you mean 'pgd-at'?); known: ...",
            "c.yaml:2: model.wdth: unknown key (did you mean 'width'?)",
            "c.yaml:3: data.size: expected one of 8, 16, 32, got 9",
            "c.yaml:4: threat.eps: is in [0, 1] pixel units: for linf 8 is more than the whole range; did you mean 8/255?",
            "c.yaml:5: training.epochs: expected a whole number >= 1, got 0",
            "c.yaml:6: sede: unknown key (did you mean 'seed'?)",
        ],
    ),
    ("suite: unknown key", "attacks: [pgd]\nnorm: linf\n", ["c.yaml:2: norm: unknown key (did you mean 'norms'?)"]),
    ("suite: unknown attack", "attacks: [pgd, xyzzy]\n", ["c.yaml:1: attacks.1: unknown attack 'xyzzy'; known: ..."]),
    (
        "suite: severity",
        "corruptions: [brightness]\nseverities: [0, 6, true]\n",
        [
            "c.yaml:2: severities.0: expected a whole number >= 1 and <= 5, got 0",
            "c.yaml:2: severities.1: expected a whole number >= 1 and <= 5, got 6",
            "c.yaml:2: severities.2: expected a whole number >= 1 and <= 5, got true",
        ],
    ),
    (
        "suite: eps",
        "attacks: [pgd]\nnorms: [linf]\neps: [4/255, 8]\n",
        ["c.yaml:3: eps.1: is in [0, 1] pixel units: for linf 8 is more than the whole range; did you mean 8/255?"],
    ),
    (
        "suite: norm",
        "attacks: [pgd]\nnorms: [linf, l0]\neps: [0.1]\n",
        ["c.yaml:2: norms.1: pgd: norm 'l0' is not supported; expected one of linf, l2, l1"],
    ),
    ("suite: name", "name: [a]\nattacks: [pgd]\n", ["c.yaml:1: name: expected the name of a suite, got a list"]),
    ("suite: empty", "attacks: []\n", ["c.yaml:1: a suite needs 'attacks' or 'corruptions'"]),
]


SCALARS = [
    None,
    True,
    False,
    0,
    -1,
    7,
    3.5,
    float("nan"),
    float("inf"),
    10**19,
    "",
    "pgd",
    "8/255",
    "1/0",
    "\u00e9\U0001f600",
    "a: b",
    "x" * 200,
]
VALUES = [
    *SCALARS,
    [],
    {},
    [[]],
    [None],
    {"name": "pgd"},
    {"name": None},
    {"": 1},
    ["craft", "craft"],
    {"name": "linear", "end": -1},
]
JUNK = [
    "\t",
    "\x00",
    "\x1b[0m",
    "\u2028",
    "\ufeff",
    "{",
    "}",
    "[",
    "]",
    "'",
    '"',
    ":",
    "- ",
    "&a ",
    "*a",
    "!!x ",
    "%",
    "@",
    "|",
    ">",
    "#",
    "? ",
    ",",
    "---\n",
]


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def spread(folder: Path, text: object) -> None:
    """Write a case's files."""
    for name, content in (text if isinstance(text, dict) else {"c.yaml": text}).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def snapshot(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def test_there_are_enough_cases():
    assert len(CASES) >= 40
    assert len({kind for kind, _, _ in CASES}) >= 15


@pytest.mark.parametrize("text", [GOOD, LARGE, SUITE], ids=["short", "large", "suite"])
def test_what_the_cases_start_from_is_valid(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spread(tmp_path, text)
    assert run(["validate", "c.yaml"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(("kind", "text", "expected"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_malformed(kind, text, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spread(tmp_path, text)
    before = snapshot(tmp_path)
    commands = [["validate", "c.yaml"]]
    if not kind.startswith("suite"):
        commands += [["train", "c.yaml"], ["train", "c.yaml", "--dry-run"], ["train", "c.yaml", "--out", "somewhere"]]
    for command in commands:
        assert run(command) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert [re.sub("; known: .*", "; known: ...", line) for line in shown.err.splitlines()] == [
            f"robustlab: {line}" for line in expected
        ]
        assert snapshot(tmp_path) == before


def nodes(tree, path=()):
    """The paths of all values of a tree."""
    yield path
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from nodes(child, (*path, key))


def mutate_tree(tree, rng):
    """Delete, duplicate, rename or replace one value."""
    tree = copy.deepcopy(tree)
    path = rng.choice([p for p in nodes(tree) if p])
    parent = tree
    for step in path[:-1]:
        parent = parent[step]
    key = path[-1]
    what = rng.choice(["delete", "duplicate", "rename", "replace", "replace", "swap"])
    if what == "delete":
        del parent[key]
    elif what == "duplicate":
        if isinstance(parent, list):
            parent.append(parent[key])
        else:
            parent[f"{key}{rng.choice(['2', '_', ' '])}"] = parent[key]
    elif what == "rename" and isinstance(parent, dict):
        letters = list(str(key))
        letters[rng.randrange(len(letters))] = rng.choice(string.ascii_letters + " .\u00df")
        parent["".join(letters)] = parent.pop(key)
    elif what == "swap":
        other = tree
        for step in rng.choice([p for p in nodes(tree)]):
            other = other[step]
        parent[key] = copy.deepcopy(other)
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=rng.choice([None, False, True]), allow_unicode=True)


def mutate_text(text, rng):
    """Truncate, swap, duplicate or delete lines, change the indentation, insert junk."""
    rows = text.splitlines(keepends=True)
    i, j = rng.randrange(len(rows)), rng.randrange(len(rows))
    what = rng.choice(["truncate", "swap", "duplicate", "delete", "indent", "junk", "junk", "junk"])
    if what == "truncate":
        return text[: rng.randrange(len(text))]
    if what == "swap":
        rows[i], rows[j] = rows[j], rows[i]
    elif what == "duplicate":
        rows.insert(i, rows[j])
    elif what == "delete":
        del rows[i]
    elif what == "indent":
        rows[i] = " " * rng.randrange(1, 5) + rows[i] if rng.random() < 0.5 else rows[i].lstrip()
    else:
        at = rng.randrange(len(rows[i]) + 1)
        rows[i] = rows[i][:at] + rng.choice(JUNK) + rows[i][at:]
    return "".join(rows)


def test_300_mutations(tmp_path, monkeypatch, capsys):
    for source in CONFIGS.rglob("*.yaml"):
        target = tmp_path / source.relative_to(CONFIGS)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    (tmp_path / "large.yaml").write_text(LARGE)
    (tmp_path / "suite.yaml").write_text(SUITE)
    sources = sorted(tmp_path.rglob("*.yaml"))
    sources += [tmp_path / "large.yaml"] * len(sources) + [tmp_path / "suite.yaml"] * (len(sources) // 4)
    monkeypatch.chdir(tmp_path)
    codes = []
    for seed in range(300):
        rng = random.Random(seed)
        source = rng.choice(sources)
        text = source.read_text()
        if rng.random() < 0.5:
            text = mutate_tree(yaml.load(text, LOADER), rng)
        for _ in range(rng.choice([0, 1, 2]) if text != source.read_text() else 1):
            text = mutate_text(text, rng) if text.strip() else text
        path = source.parent / "mutant.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        before = snapshot(tmp_path)
        code = run(["validate", str(path.relative_to(tmp_path))])
        shown = capsys.readouterr()
        assert code in (0, 2), (seed, text)
        for line in shown.err.splitlines():
            assert re.match(r"robustlab: \S+\.yaml:\d+: \S", line), (seed, line, text)
        assert bool(shown.err) == (code == 2), (seed, text)
        assert snapshot(tmp_path) == before
        codes.append(code)
    assert 30 < codes.count(0) < 200  # neither all harmless nor all rejected at the door
