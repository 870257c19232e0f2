"""The arrows: which part may know of which. A rule reads the syntax trees of the package; each is shown a file that breaks it."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import robustlab.attacks
from robustlab import registry
from robustlab.types import Averaging, UserError

ROOT = Path(robustlab.__file__).parent
AXES = {kind for folders in registry.FOLDERS.values() for kind in folders} - {"trainers", "suites", "training"}
CORE = ("types", "registry", "rng", "geometry", "losses", "modes", "taps", "files", "image_ops")
OPTIONAL = {
    "timm",
    "torchvision",
    "pyautoattack",
    "torchattacks",
    "sklearn",
    "matplotlib",
    "tensorboard",
    "wandb",
    "huggingface_hub",
}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NORMS = {"norm", "vector_norm", "matrix_norm", "renorm", "cdist", "pairwise_distance", "normalize", "clip_grad_norm_"}

# Calls of these names that measure no perturbation of an image: {(file, name): why}.
NO_PERTURBATION = {
    ("weight_perturbation/awp.py", "norm"): "the radius is a share of each layer's weight norm",
    ("training/step.py", "clip_grad_norm_"): "clipping of the gradient of the weights",
}

Tree = dict[str, ast.Module]  # path below robustlab/ -> syntax tree


def imports(module: ast.Module, *, top_only: bool = False) -> Iterator[str]:
    """Dotted names of what a file imports; ``from a import b`` gives a.b. ``top_only``: outside functions and TYPE_CHECKING."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif top_only and _deferred(child):
                continue
            else:
                yield from visit(child)

    return visit(module)


def _deferred(node: ast.AST) -> bool:
    checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    return checking or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def own(module: ast.Module) -> set[str]:
    """The parts of robustlab that a file imports: ``attacks``, ``types``, ``report``, ..."""
    return {name.split(".")[1] for name in imports(module) if name.startswith("robustlab.")}


def owner(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def calls(module: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, node


def axes_are_independent(tree: Tree) -> list[str]:
    return [f"{p} imports {a}" for p, m in tree.items() if owner(p) in AXES for a in own(m) & AXES if a != owner(p)]


def core_knows_no_part(tree: Tree) -> list[str]:
    above = {owner(p) for p in tree} - {*CORE, "__init__"}
    return [f"{p} imports {a}" for p, m in tree.items() if owner(p) in CORE for a in own(m) & above]


def axes_know_no_machinery(tree: Tree) -> list[str]:
    machinery = {"training", "evaluation", "results", "report", "commands", "trainers", "suites"}
    return [f"{p} imports {a}" for p, m in tree.items() if owner(p) in AXES for a in own(m) & machinery]


def training_and_evaluation_are_siblings(tree: Tree) -> list[str]:
    pairs = {"training": "evaluation", "evaluation": "training"}
    return [f"{p} imports {pairs[owner(p)]}" for p, m in tree.items() if owner(p) in pairs and pairs[owner(p)] in own(m)]


def results_import_only_types_and_files(tree: Tree) -> list[str]:
    return [f"{p} imports {a}" for p, m in tree.items() if owner(p) == "results" for a in own(m) - {"results", "types", "files"}]


def nothing_imports_the_command_line(tree: Tree) -> list[str]:
    return [f"{p} imports cli" for p, m in tree.items() if "cli" in own(m) and p != "__main__.py"]


def only_the_surface_imports_commands(tree: Tree) -> list[str]:
    surface = ("cli.py", "__init__.py", "auditing.py", "reporting.py")
    return [f"{p} imports commands" for p, m in tree.items() if "commands" in own(m) and p not in surface]


def _layer(call: ast.Call) -> bool:
    """``self.norm(x)`` is a layer of a network, and so is every ``normalize`` that is not torch's function."""
    of = ast.unparse(call.func)
    return of == "self.norm" or (of.endswith("normalize") and of not in ("F.normalize", "torch.nn.functional.normalize"))


def only_geometry_has_norms(tree: Tree) -> list[str]:
    return [
        f"{p}:{call.lineno} calls {name}"
        for p, m in tree.items()
        for name, call in calls(m)
        if name in NORMS and p != "geometry.py" and (p, name) not in NO_PERTURBATION and not _layer(call)
    ]


def only_one_file_knows_the_processes(tree: Tree) -> list[str]:
    return [
        f"{p} imports {name}"
        for p, m in tree.items()
        for name in imports(m)
        if name.startswith(("torch.distributed", "torch.nn.parallel")) and p != "training/distributed.py"
    ]


def only_the_screen_prints(tree: Tree) -> list[str]:
    quiet = [(p, m) for p, m in tree.items() if p != "cli.py" and owner(p) != "report"]
    found = [f"{p}:{call.lineno} prints" for p, m in quiet for name, call in calls(m) if name == "print"]
    return found + [
        f"{p} imports {name}" for p, m in quiet for name in imports(m) if name.split(".")[0] in ("rich", "typer", "tqdm")
    ]


def optional_packages_only_inside_functions(tree: Tree) -> list[str]:
    return [f"{p} imports {n}" for p, m in tree.items() for n in imports(m, top_only=True) if n.split(".")[0] in OPTIONAL]


def only_the_schema_knows_pydantic(tree: Tree) -> list[str]:
    allowed = ("config.py", "hints.py", "results/record.py", "results/claim.py")
    return [f"{p} imports {n}" for p, m in tree.items() for n in imports(m) if n.split(".")[0] == "pydantic" and p not in allowed]


def no_pickle_is_loaded(tree: Tree) -> list[str]:
    """``torch.load`` and ``numpy.load`` have to say in the call that they refuse pickles."""
    found = [f"{p} imports {n}" for p, m in tree.items() for n in imports(m) if n.split(".")[0] in PICKLES]
    for p, m in tree.items():
        for name, call in calls(m):
            of = ast.unparse(call.func)
            said = {k.arg: ast.unparse(k.value) for k in call.keywords}
            if of == "torch.load" and said.get("weights_only") != "True":
                found.append(f"{p}:{call.lineno} calls torch.load without weights_only=True")
            if of in ("np.load", "numpy.load") and said.get("allow_pickle", "False") != "False":
                found.append(f"{p}:{call.lineno} calls {of} with pickles")
            if name in ("eval", "exec") and isinstance(call.func, ast.Name):
                found.append(f"{p}:{call.lineno} calls {name}")
    return found


def attacks_never_call_backward(tree: Tree) -> list[str]:
    """Law 2: an attack differentiates with respect to the perturbation alone."""
    return [
        f"{p}:{call.lineno} calls backward"
        for p, m in tree.items()
        if owner(p) in ("attacks", "latent")
        for name, call in calls(m)
        if name == "backward"
    ]


# each rule, and a file that breaks it
RULES: list[tuple[Callable[[Tree], list[str]], str, str]] = [
    (axes_are_independent, "attacks/x.py", "from robustlab.objectives.trades import TradesLoss"),
    (axes_are_independent, "labels/x.py", "def f():\n    import robustlab.models"),
    (axes_are_independent, "averaging/x.py", "from robustlab import data"),
    (core_knows_no_part, "geometry.py", "from robustlab.config import build"),
    (core_knows_no_part, "types.py", "def f():\n    from robustlab import attacks"),
    (axes_know_no_machinery, "models/x.py", "from robustlab.training.step import train_step"),
    (axes_know_no_machinery, "attacks/x.py", "from robustlab.trainers.pgd_at import PgdAt"),
    (training_and_evaluation_are_siblings, "training/x.py", "from robustlab.evaluation.runner import evaluate"),
    (training_and_evaluation_are_siblings, "evaluation/x.py", "def f():\n    from robustlab import training"),
    (results_import_only_types_and_files, "results/x.py", "from robustlab.config import dump"),
    (nothing_imports_the_command_line, "commands.py", "def f():\n    from robustlab.cli import app"),
    (only_the_surface_imports_commands, "training/x.py", "from robustlab import commands"),
    (only_geometry_has_norms, "attacks/x.py", "def f(d):\n    return d.flatten(1).norm(dim=1)"),
    (only_geometry_has_norms, "attacks/x.py", "import torch\ndef f(d):\n    return torch.linalg.vector_norm(d)"),
    (only_one_file_knows_the_processes, "training/x.py", "import torch.distributed as dist"),
    (only_one_file_knows_the_processes, "outer.py", "def f():\n    from torch import distributed\n    import torch.nn.parallel"),
    (only_the_screen_prints, "training/x.py", "print('hello')"),
    (only_the_screen_prints, "evaluation/x.py", "from rich.console import Console"),
    (optional_packages_only_inside_functions, "models/x.py", "import timm"),
    (
        optional_packages_only_inside_functions,
        "data/x.py",
        "try:\n    from torchvision import datasets\nexcept ImportError:\n    pass",
    ),
    (only_the_schema_knows_pydantic, "attacks/x.py", "def f():\n    from pydantic import Field"),
    (no_pickle_is_loaded, "models/x.py", "import torch\nx = torch.load('a.pt')"),
    (no_pickle_is_loaded, "data/x.py", "import numpy as np\nx = np.load('a.npy', allow_pickle=True)"),
    (no_pickle_is_loaded, "files.py", "import pickle"),
    (attacks_never_call_backward, "attacks/x.py", "def f(loss):\n    loss.backward()"),
]


@pytest.fixture(scope="module")
def tree() -> Tree:
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text()) for p in sorted(ROOT.rglob("*.py"))}


@pytest.mark.parametrize("rule", dict.fromkeys(r for r, _, _ in RULES), ids=lambda r: r.__name__)
def test_arrow(rule, tree):
    assert len(tree) > 50
    assert rule(tree) == []


@pytest.mark.parametrize(("rule", "path", "text"), RULES, ids=[f"{r.__name__}-{p}" for r, p, _ in RULES])
def test_the_rule_sees_a_file_that_breaks_it(rule, path, text, tree):
    assert rule({**tree, path: ast.parse(text)}) != []


def test_the_axes_are_the_twelve_folders_of_parts():
    assert len(AXES) == 12
    assert all((ROOT / folder / "__init__.py").is_file() for folder in AXES)


def test_an_import_inside_a_function_is_allowed_for_optional_packages(tree):
    inside = ast.parse("def f():\n    import timm\n")
    assert optional_packages_only_inside_functions({**tree, "models/x.py": inside}) == []


@pytest.mark.parametrize(("path", "name"), NO_PERTURBATION)
def test_the_exceptions_are_still_needed(path, name, tree):
    assert name in {n for n, _ in calls(tree[path])}


# ---------------------------------------------------------------------------------------------------------- importing


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_import_robustlab_is_light():
    code = "import sys, robustlab; print(*sorted(m for m in sys.modules if '.' not in m))"
    loaded = set(in_a_new_process(code).split())
    assert "robustlab" in loaded
    assert not loaded & (OPTIONAL | {"scipy", "pandas", "pydantic", "typer", "rich", "jinja2"})


def test_importing_everything_touches_no_optional_package_and_no_gpu():
    code = f"""
import importlib, pkgutil, sys
import torch
def refuse(*args, **kwargs): raise AssertionError("the GPU was touched at import")
for name in ("is_available", "init", "_lazy_init", "device_count", "current_device"): setattr(torch.cuda, name, refuse)
before = torch.get_num_threads(), torch.initial_seed(), torch.is_grad_enabled(), torch.get_default_dtype()
import robustlab
for module in pkgutil.walk_packages(robustlab.__path__, "robustlab."):
    if module.name != "robustlab.__main__":
        importlib.import_module(module.name)
assert before == (torch.get_num_threads(), torch.initial_seed(), torch.is_grad_enabled(), torch.get_default_dtype())
print(*(m for m in sorted({OPTIONAL!r}) if m in sys.modules))
"""
    assert in_a_new_process(code) == ""


# ---------------------------------------------------------------------------------------------------------- discovery

NEW_ATTACK = '''
from robustlab.registry import register
from robustlab.types import Attack, NonNegative, Norm

@register("still")
class Still(Attack):
    """Leaves the images as they are."""

    norm: Norm | None = None
    eps: NonNegative | None = None

    def run(self, f, x, y, rng):
        return x, {}
'''


@pytest.fixture
def fresh_registry(monkeypatch):
    """The registry of attacks, as before its folder is read; put back afterwards."""
    registry.entries("attack")
    monkeypatch.setitem(registry._entries, "attack", dict(registry._entries["attack"]))
    monkeypatch.setattr(registry, "_loaded", registry._loaded - {"attack"})
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_a_file_in_a_folder_is_found(fresh_registry, tmp_path, monkeypatch):
    (tmp_path / "still.py").write_text(NEW_ATTACK)
    assert "still" not in registry._entries["attack"]
    monkeypatch.setattr(robustlab.attacks, "__path__", [*robustlab.attacks.__path__, str(tmp_path)])
    assert registry.lookup("attack", "still").__module__ == "robustlab.attacks.still"
    assert "pgd" in registry.entries("attack")


def test_a_module_behind_an_entry_point_is_found(fresh_registry, tmp_path, monkeypatch):
    (tmp_path / "another_package.py").write_text(NEW_ATTACK)
    monkeypatch.syspath_prepend(tmp_path)
    point = registry.importlib.metadata.EntryPoint("x", "another_package", "robustlab.parts")
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [point] if group == "robustlab.parts" else [])
    assert registry.lookup("attack", "still").__module__ == "another_package"


def test_a_name_that_is_taken_and_a_part_without_docstring_are_refused(fresh_registry):
    registry.entries("averaging")
    with pytest.raises(ValueError, match=r"the averaging 'ema' is already registered by robustlab\.averaging\.ema"):
        registry.register("ema")(type("Mine", (Averaging,), {"__doc__": "Mine.", "__module__": __name__}))
    with pytest.raises(ValueError, match=r"a part needs a docstring; it is what `robustlab explain mine` prints"):
        registry.register("mine")(type("Mine", (Averaging,), {"__module__": __name__}))
    assert "mine" not in registry.entries("averaging")


def test_unknown_kinds_offer_the_nearest():
    with pytest.raises(UserError, match=r"unknown kind 'atacks' \(did you mean 'attacks'\?\); expected one of attacks, "):
        registry.kind_of("atacks")
    assert [registry.kind_of(w) for w in ("attack", "attacks", "gradient", "gradients", "averaging")] == [
        "attack",
        "attack",
        "gradient",
        "gradient",
        "averaging",
    ]
