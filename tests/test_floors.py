"""A file imports only from lower floors, and the tests mirror the packages.

Imports are read from the source, so those in functions and under `if TYPE_CHECKING` count too. A line of `RULES` names
files, and either what they must not import or all that they may import.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.harness import ROOT

STDLIB = frozenset(sys.stdlib_module_names)

# From the ground up. A package imports only from floors below it, and never from a neighbour on its floor.
FLOORS = [
    ["nb_lightning.phases", "nb_lightning.batch", "nb_lightning.errors", "nb_lightning.files", "nb_lightning.text",
     "nb_lightning.run_folder", "nb_lightning.plotting"],
    ["nb_lightning.config", "nb_lightning.losses", "nb_lightning.token_source"],
    ["nb_lightning.model"],
    ["nb_lightning.checkpoints", "nb_lightning.generation", "nb_lightning.phase_callback"],
    ["nb_lightning.rewards", "nb_lightning.serve", "nb_lightning.export", "nb_lightning.dry_run",
     "nb_lightning.checkout", "data.prepare", "data.calls"],
    ["nb_lightning.rollouts", "nb_lightning.recipe", "nb_lightning.submit", "data.demo"],
    ["nb_lightning.stages", "nb_lightning.evaluate", "data"],
    ["nb_lightning.report", "nb_lightning.ablate", "callbacks", "data.pairs", "data.refine"],
    ["train"],
    ["benchmarks"],
]  # fmt: skip
APPLICATION = ("callbacks", "data", "train", "tests", "benchmarks")
EVERYWHERE = ("nb_lightning/**/*.py", "callbacks/**/*.py", "data/**/*.py", "train.py")


@dataclass(frozen=True)
class Rule:
    """What some files may import, as prefixes of module names; the standard library is always allowed."""

    name: str
    files: tuple[str, ...]  # globs from the root of the checkout
    never: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None  # if set, nothing else
    exempt: tuple[str, ...] = ()  # paths that `files` matches and the rule leaves out


def modules(*names: str) -> tuple[str, ...]:
    return tuple(f"nb_lightning.{name}" for name in names)


def one_place(name: str, packages: tuple[str, ...], *files: str) -> Rule:
    return Rule(f"one place for {name}", EVERYWHERE, never=packages, exempt=files)


RULES = [
    Rule("phases: standard library", ("nb_lightning/phases.py",), only=()),
    Rule("batch: torch", ("nb_lightning/batch.py",), only=("torch",)),
    Rule("config: Hydra and phases", ("nb_lightning/config/*.py",),
         only=("hydra", "omegaconf", *modules("config", "phases"))),
    Rule("maths: no frameworks", tuple(f"nb_lightning/{name}/*.py" for name in ("losses", "model", "generation")),
         never=("lightning", "pytorch_lightning", "torchmetrics", "hydra", "omegaconf")),
    Rule("text: no file formats, no model", ("nb_lightning/text/*.py",),
         only=("tokenizers", "jinja2", *modules("text"))),
    Rule("training does not evaluate", (
        "nb_lightning/stages/*.py", "nb_lightning/rollouts/*.py", "callbacks/*.py", "data/**/*.py",
    ), never=modules("evaluate"), exempt=("callbacks/task_accuracy.py",)),  # a measurement
    Rule("the library knows no application", ("nb_lightning/**/*.py",), never=APPLICATION),
    Rule("callbacks: no data, no stages", ("callbacks/**/*.py",), never=("data", "train", *modules("stages"))),
    Rule("data: no callbacks, no stages", ("data/**/*.py",), never=("callbacks", "train", *modules("stages"))),
    Rule("the jail: standard library and itself", ("nb_lightning/rewards/sandbox/jail/*.py",), only=(
        *"canary landlock lockdown plain runner seccomp".split(), "math_verify", "reasoning_gym",
    )),
    Rule("the template worker: standard library and Jinja", ("nb_lightning/text/template_worker.py",),
         only=("jinja2",)),
    one_place("xformers", ("xformers",), "nb_lightning/model/attention.py"),
    one_place("bitsandbytes", ("bitsandbytes",), "nb_lightning/model/bnb.py"),
    one_place("peft", ("peft",), "nb_lightning/model/adapters.py"),
    one_place("OpenAI's client", ("openai",)),
    one_place("Jinja", ("jinja2",), "nb_lightning/text/template_worker.py", "nb_lightning/report/__main__.py",
              "data/refine/prompts.py", "data/refine/show.py"),
    one_place("gguf", ("gguf",), "nb_lightning/checkpoints/gguf.py"),
    one_place("SentencePiece", ("sentencepiece",), "nb_lightning/checkpoints/sentencepiece.py"),
    one_place("the server", ("litserve", "fastapi", "starlette", "pydantic"),
              *(f"nb_lightning/serve/{name}.py" for name in ("__main__", "engine", "protocol", "routes"))),
    one_place("Hydra", ("hydra",), "nb_lightning/config/compose.py",
              "nb_lightning/config/composition_errors.py", "train.py"),
]  # fmt: skip


@cache
def imports(source: str, package: str) -> tuple[tuple[int, str], ...]:
    """Return (line, dotted name) of every import in `source`, a module of `package`, functions included.

    `from a import b` gives a.b: b may be a module.
    """
    names: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                names.append((node.lineno, str(node.args[0].value)))
    return tuple(names)


def is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def is_allowed(rule: Rule, name: str) -> bool:
    if is_under(name, rule.never):
        return False
    return rule.only is None or name.split(".")[0] in STDLIB or is_under(name, rule.only)


def files_of(rule: Rule) -> list[Path]:
    paths = {path for glob in rule.files for path in ROOT.glob(glob)}
    return sorted(path for path in paths if str(path.relative_to(ROOT)) not in rule.exempt)


def violations(rule: Rule) -> list[str]:
    lines = []
    for path in files_of(rule):
        relative = path.relative_to(ROOT)
        for line, name in imports(path.read_text(), ".".join(relative.parent.parts)):
            if not is_allowed(rule, name):
                lines.append(f"{relative}:{line} imports {name}")
    return lines


# Who imports whom ---------------------------------------------------------------------------------------------------


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PROGRAM = [
    path for folder in ("nb_lightning", "callbacks", "data", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    if "jail" not in path.parts
] + [ROOT / "train.py"]  # fmt: skip
MODULES = frozenset(map(name_of, PROGRAM))


@cache
def imported_modules() -> dict[str, set[str]]:
    """Map each module to the modules of this checkout that it imports, anywhere in it."""
    graph: dict[str, set[str]] = {}
    for path in PROGRAM:
        targets = graph.setdefault(name_of(path), set())
        for _, name in imports(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts)):
            parts = name.split(".")
            prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            targets.update(next(([prefix] for prefix in prefixes if prefix in MODULES), []))
        targets.discard(name_of(path))
    return graph


def floor_of(module: str) -> int:
    """Return the row of `FLOORS` that holds the module's package; -1 for `nb_lightning` itself (`__version__`)."""
    if module == "nb_lightning":
        return -1
    return next(floor for floor, row in enumerate(FLOORS) if package_of(module) in row)


def package_of(module: str) -> str:
    """Return the longest name in `FLOORS` that the module is under."""
    return max((name for row in FLOORS for name in row if is_under(module, (name,))), key=len, default=module)


def test_a_package_imports_only_from_lower_floors() -> None:
    upward = [
        f"{module} (floor {floor_of(module)}) imports {target} (floor {floor_of(target)})"
        for module, targets in imported_modules().items()
        for target in targets
        if package_of(module) != package_of(target) and floor_of(target) >= floor_of(module)
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = imported_modules()
    remaining = set(graph)
    while ground := {module for module in remaining if not graph[module] & remaining}:
        remaining -= ground
    assert remaining == set()


def test_every_package_has_its_floor() -> None:
    packages = {
        f"nb_lightning.{path.stem}" for path in (ROOT / "nb_lightning").iterdir() if not path.stem.startswith("_")
    }
    assert {name for row in FLOORS for name in row if name.startswith("nb_lightning")} == packages - {"nb_lightning.py"}


# Rules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_floors(rule: Rule) -> None:
    assert files_of(rule), "the rule is about no file at all"
    assert violations(rule) == []


def test_every_exemption_is_used() -> None:
    """An exemption that nothing needs is a hole."""
    for rule in RULES:
        for path in rule.exempt:
            names = [name for _, name in imports((ROOT / path).read_text(), "nb_lightning")]
            assert any(is_under(name, rule.never) for name in names), f"{rule.name}: {path}"


# The tests ----------------------------------------------------------------------------------------------------------

TESTS = ROOT / "tests"
# tests/test_<name>.py of no single module
WHOLE_CHECKOUT = ("docs", "docs_names", "finetune_nanbeige", "floors", "launch", "wheel")


def test_a_folder_of_tests_mirrors_a_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    assert [
        str(path) for path in folders if not any((ROOT / top / path).is_dir() for top in ("nb_lightning", "."))
    ] == []


def test_a_test_beside_the_folders_is_of_one_module() -> None:
    modules = tuple(path.stem for path in (ROOT / "nb_lightning").glob("*.py"))
    names = {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")}
    assert [name for name in names.difference(WHOLE_CHECKOUT) if not name.startswith(modules)] == []


def test_no_test_imports_another_test() -> None:
    """What two of them need is in a harness module."""
    for path in TESTS.rglob("*.py"):
        for line, name in imports(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts)):
            assert not re.search(r"\.test_\w+", name), f"{path.relative_to(ROOT)}:{line} imports {name}"


# The reader of imports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, names",
    [
        ("import a.b, c as d", ["a.b", "c"]),
        ("from a.b import c", ["a.b.c"]),
        ("def f():\n    if x:\n        import deep", ["deep"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from data import mixture", [
            "typing.TYPE_CHECKING", "data.mixture",
        ]),
        ("from . import stages", ["nb_lightning.inner.stages"]),
        ("from .x import y", ["nb_lightning.inner.x.y"]),
        ("from .. import stages", ["nb_lightning.stages"]),
        ("importlib.import_module('data.mixture')", ["data.mixture"]),
        ("'import data'  # import data", []),
    ],
)  # fmt: skip
def test_the_reader_of_imports(source: str, names: list[str]) -> None:
    assert [name for _, name in imports(source, "nb_lightning.inner")] == names


@pytest.mark.parametrize(
    "name, ok", [("data", False), ("data.mixture", False), ("database", True), ("torch.utils.data", True)]
)
def test_a_prefix_is_whole_names(name: str, ok: bool) -> None:
    assert is_allowed(Rule("", (), never=("data",)), name) is ok


@pytest.mark.runs
@pytest.mark.parametrize(
    "module, absent",
    [
        ("nb_lightning.config.schema", ["torch", "numpy", "lightning"]),
        ("nb_lightning.rewards.math", ["torch", "numpy", "lightning", "sympy", "math_verify"]),
        (", ".join(sorted(name for name in MODULES if is_under(name, modules("losses", "model", "generation")))), [
            "lightning", "hydra", "omegaconf", "torchmetrics", "transformers", "bitsandbytes", "xformers",
        ]),
    ],
)  # fmt: skip
def test_importing_it_loads_nothing_heavier(module: str, absent: list[str]) -> None:
    """What the table cannot see: an import by way of another module."""
    code = f"import sys, {module}; print(*(name for name in {absent} if sys.modules.get(name)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
