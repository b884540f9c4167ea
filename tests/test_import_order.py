"""Imports point one way: every module is read, and an arrow upwards fails."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hfcompress

PACKAGE = Path(hfcompress.__file__).parent
SCRIPTS = PACKAGE.parent / "scripts"

_BELOW = {"config", "anatomy", "measurement", "knapsack"}
_MIDDLE = _BELOW | {"calibration", "tasks", "distillation", "pruning", "quantization", "vocabulary", "checkpoints"}
# Component to the components it may import from. A new one has to find its place here.
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    # Which of several options each part gets under a budget: for pruning and quantization alike.
    "knapsack": set(),
    "anatomy": {"config"},
    "measurement": {"config", "anatomy"},
    "tasks": {"config", "measurement"},
    "distillation": _BELOW,
    # Looking at a model on sample data; what it is seen to do is for pruning and quantization alike.
    "calibration": {"config", "anatomy"},
    # What the plain config of an architecture can say is known where checkpoints are written.
    "pruning": _BELOW | {"calibration", "checkpoints"},
    "checkpoints": _BELOW,
    # It writes its step into the record of what it loads; nothing in checkpoints knows of it.
    "quantization": _BELOW | {"calibration", "checkpoints"},
    # Embeddings and tokenizer; it records its step as quantization does.
    "vocabulary": _BELOW | {"checkpoints"},
    # Saved models for other runtimes.
    "export": _BELOW | {"calibration", "checkpoints"},
    "hub": _MIDDLE,
    "training": _MIDDLE | {"hub"},  # trainers push; the hub knows nothing of trainers
    "runs": _MIDDLE | {"training", "hub", "export"},
    "cli": _MIDDLE | {"training", "hub", "export", "runs"},
    "scripts": _MIDDLE | {"training", "hub", "export", "runs", "cli"},
    "hfcompress": {"checkpoints"},
}


def is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def statements(node: ast.AST):
    """All nodes below one, but what only type checkers see; an `else` of that is seen."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.orelse:
                yield statement
                yield from statements(statement)
            continue
        yield child
        yield from statements(child)


LAZY = "hfcompress.checkpoints.hooks"  # all that importing the package itself imports


def public(name: str) -> str:
    """The full name of what the package's own name stands for; most are imported when they are first used."""
    module = hfcompress._PUBLIC.get(name, "hfcompress")
    return f"{module}.{name}"


def imported_modules(source: str, module: str, *, is_package: bool) -> set[str]:
    """Full names of all modules (and names in modules) that a file imports, wherever in the file."""
    found: set[str] = set()
    nodes = list(statements(ast.parse(source)))
    aliases = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    bound = {alias.asname or alias.name for alias in aliases if alias.name == "hfcompress"}
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {LAZY if alias.name == "hfcompress" else alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            found |= {
                public(alias.name) if origin == "hfcompress" else f"{origin}.{alias.name}" for alias in node.names
            }
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            first = node.args[0] if node.args else None
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                found.add(str(first.value))
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in bound:
            found.add(public(node.attr))
    return found


def component_of(name: str, components: set[str]) -> str | None:
    """The component that a full name belongs to: the part after `hfcompress`, or the package's own names."""
    parts = name.split(".")
    if parts[0] in ("scripts", "tests"):
        return parts[0]
    if parts[0] != "hfcompress" or name == "hfcompress.__version__":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in components else "hfcompress"


def arrows(files: dict[str, tuple[str, bool]]) -> list[str]:
    """What is wrong: one line per import that points upwards or to a sibling, or per component without a place.

    Args:
        files: Full name of each module to its source and whether it is a package.
    """
    components = {name.split(".")[1] for name in files if name.startswith("hfcompress.")}
    wrong = [f"{component} has no place in MAY_IMPORT" for component in sorted(components - MAY_IMPORT.keys())]
    for module, (source, is_package) in sorted(files.items()):
        own = component_of(module, components)
        assert own is not None
        for name in sorted(imported_modules(source, module, is_package=is_package)):
            other = component_of(name, components)
            if other not in (None, own) and other not in MAY_IMPORT.get(own, set()):
                wrong.append(f"{module} imports {name}: {own} may not import from {other}")
    return wrong


def all_files() -> dict[str, tuple[str, bool]]:
    files = {}
    for root in (PACKAGE, SCRIPTS):
        for path in sorted(root.rglob("*.py")):
            parts = list(path.relative_to(root.parent).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            files[".".join(parts[:-1] if is_package else parts)] = (path.read_text(encoding="utf-8"), is_package)
    return files


def test_imports_point_one_way():
    files = all_files()
    assert len(files) == len(list(PACKAGE.rglob("*.py"))) + len(list(SCRIPTS.rglob("*.py"))) >= 45
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders | {"config"} <= MAY_IMPORT.keys() and len(folders) >= 10
    assert arrows(files) == []


def test_the_package_itself_imports_the_hooks_only():
    source, _ = all_files()["hfcompress"]
    imported = {
        name for name in imported_modules(source, "hfcompress", is_package=True) if name.startswith("hfcompress")
    }
    assert imported == {"hfcompress.checkpoints.hooks.install"}


def test_public_names_lead_somewhere():
    looked_at = 0
    for name in hfcompress.__all__:
        assert getattr(hfcompress, name) is not None
        looked_at += 1
    assert looked_at == len(set(hfcompress.__all__)) >= 6
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hfcompress.nothing  # noqa: B018


def test_the_table_has_no_circles():
    placed: set[str] = set()
    rest = dict(MAY_IMPORT)
    while rest:
        free = {name for name, others in rest.items() if others <= placed}
        assert free, f"these import each other: {sorted(rest)}"
        placed |= free
        rest = {name: others for name, others in rest.items() if name not in free}
    methods = {"distillation", "pruning", "quantization", "vocabulary"}
    assert not any(MAY_IMPORT[one] & methods for one in {*methods, "checkpoints"})


# ---- the reader itself ----

BASE = {"hfcompress": ("", True)} | {
    f"hfcompress.{name}": ("", True) for name in MAY_IMPORT if name not in ("hfcompress", "scripts")
}


@pytest.mark.parametrize(
    ("module", "source", "name"),
    [
        ("hfcompress.config", "from hfcompress.anatomy import find_sites", "hfcompress.anatomy.find_sites"),
        ("hfcompress.anatomy.sites", "import hfcompress.pruning.gates", "hfcompress.pruning.gates"),
        ("hfcompress.anatomy.sites", "import hfcompress.pruning.gates as g", "hfcompress.pruning.gates"),
        ("hfcompress.anatomy.sites", "from hfcompress import pruning", "hfcompress.pruning"),
        ("hfcompress.anatomy.sites", "from hfcompress import load", "hfcompress.checkpoints.io.load"),
        ("hfcompress.anatomy.sites", "import hfcompress", "hfcompress.checkpoints.hooks"),
        ("hfcompress.hub.card", "import hfcompress\nhfcompress.PruningTrainer()", "hfcompress.training.PruningTrainer"),
        ("hfcompress.hub.card", "import hfcompress as h\nx = h.PruningTrainer", "hfcompress.training.PruningTrainer"),
        ("hfcompress.hub.card", "from hfcompress import nothing", "hfcompress.nothing"),
        ("hfcompress.anatomy.sites", "from ..pruning import cut", "hfcompress.pruning.cut"),
        ("hfcompress.anatomy.sites", "from .. import pruning", "hfcompress.pruning"),
        ("hfcompress.pruning.gates", "def f():\n    from hfcompress.training import x", "hfcompress.training.x"),
        ("hfcompress.pruning.gates", "class A:\n  def f(self):\n    import hfcompress.hub", "hfcompress.hub"),
        (
            "hfcompress.pruning.gates",
            "try:\n    import hfcompress.cli\nexcept ImportError:\n    pass",
            "hfcompress.cli",
        ),
        ("hfcompress.pruning.gates", "import importlib\nimportlib.import_module('hfcompress.hub')", "hfcompress.hub"),
        ("hfcompress.pruning.gates", "from hfcompress.distillation import losses", "hfcompress.distillation.losses"),
        ("hfcompress.quantization", "from hfcompress.pruning import cut", "hfcompress.pruning.cut"),
        ("hfcompress.distillation.a", "from hfcompress.checkpoints import io", "hfcompress.checkpoints.io"),
        ("hfcompress.vocabulary.a", "from hfcompress.pruning import cut", "hfcompress.pruning.cut"),
        ("hfcompress.checkpoints.io", "from hfcompress.pruning.plan import Plan", "hfcompress.pruning.plan.Plan"),
        ("hfcompress.measurement.flops", "from hfcompress.tasks import x", "hfcompress.tasks.x"),
        ("hfcompress.tasks.text", "from hfcompress.anatomy import x", "hfcompress.anatomy.x"),
        ("hfcompress.hub.push", "from hfcompress.training import x", "hfcompress.training.x"),
        ("hfcompress.training.trainers", "import hfcompress.cli.main", "hfcompress.cli.main"),
        ("hfcompress.training.trainers", "from hfcompress import runs", "hfcompress.runs"),
        ("hfcompress.runs", "import scripts.text_classification", "scripts.text_classification"),
        ("hfcompress.runs", "from tests.families import CONFIGS", "tests.families.CONFIGS"),
        ("hfcompress", "from hfcompress.training import x", "hfcompress.training.x"),
        ("hfcompress.runs", "if TYPE_CHECKING:\n    import torch\nelse:\n    import hfcompress.cli", "hfcompress.cli"),
    ],
)
def test_an_arrow_upwards_is_found(module, source, name):
    is_package = (BASE.get(module) or ("", False))[1]
    wrong = arrows({**BASE, module: (source, is_package)})
    assert len(wrong) == 1 and wrong[0].startswith(f"{module} imports {name}: ")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hfcompress.pruning.gates", "from hfcompress.anatomy import Site\nfrom hfcompress.config import PruneConfig"),
        (
            "hfcompress.pruning.gates",
            "from hfcompress.pruning.plan import Plan\nfrom . import plan\nfrom .plan import cut",
        ),
        ("hfcompress.pruning.gates", "if TYPE_CHECKING:\n    from hfcompress.training import x"),
        ("hfcompress.pruning.gates", "import typing\nif typing.TYPE_CHECKING:\n    from hfcompress.training import x"),
        ("hfcompress.pruning.gates", "import torch, transformers\nfrom hfcompress_other import x"),
        ("hfcompress.hub.card", "from hfcompress import __version__"),
        ("hfcompress.hub.card", "import hfcompress\nx = hfcompress.__version__, hfcompress.load"),
        ("hfcompress.quantization.quantize", "from hfcompress.checkpoints.record import add_step"),
        ("hfcompress.training.trainers", "from hfcompress import pruning\nfrom hfcompress.tasks import TASKS"),
        ("hfcompress.cli.main", "import hfcompress\nfrom hfcompress.runs import run_recipe"),
        ("scripts.text_classification", "from hfcompress import CompressionTrainer\nfrom hfcompress.cli import main"),
        ("hfcompress", "from hfcompress.checkpoints.hooks import install"),
        ("hfcompress.pruning.gates", '"""from hfcompress.training import x"""\n# import hfcompress.cli'),
    ],
)
def test_what_points_down_is_fine(module, source):
    is_package = (BASE.get(module) or ("", False))[1]
    assert arrows({**BASE, module: (source, is_package)}) == []


def test_a_component_without_a_place_is_found():
    assert arrows({**BASE, "hfcompress.report": ("", False)}) == ["report has no place in MAY_IMPORT"]


# ---- what an import costs ----

FRESH = """
import json, sys
import hfcompress
first = sorted(name for name in {heavy!r} if name in sys.modules)
hfcompress.__version__, dir(hfcompress), hfcompress.__all__
second = sorted(name for name in {heavy!r} if name in sys.modules)
from hfcompress.config import Recipe
third = sorted(name for name in {heavy!r} if name in sys.modules)
print(json.dumps([first, second, third, "hfcompress.checkpoints.hooks" in sys.modules]))
"""


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["accelerate", "bitsandbytes", "datasets", "matplotlib", "numpy", "torch", "transformers"]
    code = FRESH.format(heavy=heavy)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == [[], [], [], True]
    # Once torch is in, it is seen: the check can fail.
    done = subprocess.run(
        [sys.executable, "-c", code.replace("import hfcompress\n", "import hfcompress\nimport numpy\n", 1)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout)[0] == ["numpy"]
