"""A file imports only from lower floors. Read from the source, functions and `if TYPE_CHECKING` included.

A rule is a line of `RULES`: which files, and what they may not import, or all that they may.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import ROOT

STDLIB = frozenset(sys.stdlib_module_names)

# The house, from the ground up. A package imports only from floors below its own; packages of one floor not each other.
FLOORS = [
    ["nb_lightning.phases", "nb_lightning.batch", "nb_lightning.errors", "nb_lightning.files", "nb_lightning.text",
     "nb_lightning.run_folder", "nb_lightning.plotting"],
    ["nb_lightning.config", "nb_lightning.losses", "nb_lightning.token_source"],
    ["nb_lightning.model"],
    ["nb_lightning.checkpoints", "nb_lightning.generation", "nb_lightning.phase_callback"],
    ["nb_lightning.rewards", "nb_lightning.serve", "nb_lightning.export", "nb_lightning.dry_run",
     "nb_lightning.checkout", "data.prepare"],
    ["nb_lightning.rollouts", "nb_lightning.recipe", "nb_lightning.submit", "data.demo"],
    ["nb_lightning.stages", "nb_lightning.evaluate", "data"],
    ["nb_lightning.report", "nb_lightning.ablate", "callbacks", "data.pairs"],
    ["train"],
    ["benchmarks"],
]  # fmt: skip
APPLICATION = ("callbacks", "data", "train", "tests", "benchmarks")
EVERYWHERE = ("nb_lightning/**/*.py", "callbacks/**/*.py", "data/**/*.py", "train.py")


@dataclass(frozen=True)
class Rule:
    """`never` are module prefixes; `only`, when given, is all that may be imported beside the standard library."""

    name: str
    files: tuple[str, ...]  # globs from the repository's root; ** is any depth
    never: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    but: tuple[str, ...] = ()  # files of `files` that are exempt


def modules(*names: str) -> tuple[str, ...]:
    return tuple(f"nb_lightning.{name}" for name in names)


def one_place(name: str, packages: tuple[str, ...], *files: str) -> Rule:
    return Rule(f"one place for {name}", EVERYWHERE, never=packages, but=files)


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
    ), never=modules("evaluate"), but=("callbacks/task_accuracy.py",)),  # a measurement
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
    one_place("OpenAI's client", ("openai",), "data/pairs/endpoint.py"),
    one_place("Jinja", ("jinja2",), "nb_lightning/text/template_worker.py", "nb_lightning/report/__main__.py"),
    one_place("gguf", ("gguf",), "nb_lightning/checkpoints/gguf.py"),
    one_place("SentencePiece", ("sentencepiece",), "nb_lightning/checkpoints/sentencepiece.py"),
    one_place("the server", ("litserve", "fastapi", "starlette", "pydantic"),
              *(f"nb_lightning/serve/{name}.py" for name in ("__main__", "engine", "protocol", "routes"))),
    one_place("Hydra", ("hydra",), "nb_lightning/config/compose.py", "train.py"),
]  # fmt: skip


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that `source`, a module of `package`, imports anywhere in it.

    `from a import b` gives a.b: b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def allowed(rule: Rule, name: str) -> bool:
    if below(name, rule.never):
        return False
    return rule.only is None or name.split(".")[0] in STDLIB or below(name, rule.only)


def files_of(rule: Rule) -> list[Path]:
    found = {path for glob in rule.files for path in ROOT.glob(glob)}
    return sorted(path for path in found if str(path.relative_to(ROOT)) not in rule.but)


def broken(rule: Rule) -> list[str]:
    lines = []
    for path in files_of(rule):
        place = path.relative_to(ROOT)
        for line, name in imports(path.read_text(), ".".join(place.parent.parts)):
            if not allowed(rule, name):
                lines.append(f"{place}:{line} imports {name}")
    return lines


# Who imports whom ---------------------------------------------------------------------------------------------------


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PROGRAM = [
    path for folder in ("nb_lightning", "callbacks", "data", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    if "jail" not in path.parts
] + [ROOT / "train.py"]  # fmt: skip
MODULES = frozenset(map(name_of, PROGRAM))


def imported_modules() -> dict[str, set[str]]:
    """Module -> the modules of this checkout that it imports, anywhere in it."""
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
    """By the longest name in `FLOORS`; -1 for the package itself (`nb_lightning.__version__`)."""
    if module == "nb_lightning":
        return -1
    names = {name: floor for floor, row in enumerate(FLOORS) for name in row}
    return names[max((name for name in names if below(module, (name,))), key=len)]


def room_of(module: str) -> str:
    return max((name for row in FLOORS for name in row if below(module, (name,))), key=len, default=module)


def test_a_package_imports_only_from_lower_floors() -> None:
    up = [
        f"{module} (floor {floor_of(module)}) imports {target} (floor {floor_of(target)})"
        for module, targets in imported_modules().items()
        for target in targets
        if room_of(module) != room_of(target) and floor_of(target) >= floor_of(module)
    ]
    assert up == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = imported_modules()
    left = set(graph)
    while ground := {module for module in left if not graph[module] & left}:
        left -= ground
    assert left == set()


def test_every_package_has_its_floor() -> None:
    rooms = {f"nb_lightning.{path.stem}" for path in (ROOT / "nb_lightning").iterdir() if not path.stem.startswith("_")}
    assert {name for row in FLOORS for name in row if name.startswith("nb_lightning")} == rooms - {"nb_lightning.py"}


# Rules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_floors(rule: Rule) -> None:
    assert files_of(rule), "the rule is about no file at all"
    assert broken(rule) == []


def test_every_exemption_is_used() -> None:
    """An exemption that nothing needs is a hole."""
    for rule in RULES:
        for exempt in rule.but:
            names = [name for _, name in imports((ROOT / exempt).read_text(), "nb_lightning")]
            assert any(below(name, rule.never) for name in names), f"{rule.name}: {exempt}"


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
    assert allowed(Rule("", (), never=("data",)), name) is ok


@pytest.mark.parametrize(
    "module, absent",
    [
        ("nb_lightning.config.schema", ["torch", "numpy", "lightning"]),
        ("nb_lightning.rewards.math", ["torch", "numpy", "lightning", "sympy", "math_verify"]),
        (", ".join(sorted(name for name in MODULES if below(name, modules("losses", "model", "generation")))), [
            "lightning", "hydra", "omegaconf", "torchmetrics", "transformers", "bitsandbytes", "xformers",
        ]),
    ],
)  # fmt: skip
def test_importing_it_loads_nothing_heavier(module: str, absent: list[str]) -> None:
    """What the table cannot see: an import by way of another module."""
    code = f"import sys, {module}; print(*(name for name in {absent} if sys.modules.get(name)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
