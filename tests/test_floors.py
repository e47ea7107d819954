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
MATHS = (
    "model", "attention", "head", "token_walk", "divergence", "losses", "reference_cache", "optim", "kv_cache",
    "sampling", "generate", "weights", "hf_config", "gguf_file", "bnb",
)  # fmt: skip
F0 = ("config", "config_checks", "phases", "batch")


@dataclass(frozen=True)
class Rule:
    """`never` are module prefixes; `only`, when given, is all that may be imported beside the standard library."""

    name: str
    files: tuple[str, ...]  # globs from the repository's root; ** is any depth
    never: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    but: tuple[str, ...] = ()  # files of `files` that are exempt


def library(*names: str) -> tuple[str, ...]:
    return tuple(f"nb_lightning/{name}.py" for name in names)


def modules(*names: str) -> tuple[str, ...]:
    return tuple(f"nb_lightning.{name}" for name in names)


RULES = [
    Rule("phases: stdlib and F0", library("phases"), only=modules(*F0)),
    Rule("batch: stdlib, torch and F0", library("batch"), only=("torch", *modules(*F0))),
    Rule("config: stdlib, Hydra and F0", library("config", "config_checks"),
         only=("hydra", "omegaconf", *modules(*F0))),
    Rule("maths: no frameworks, no higher floor", library(*MATHS), never=(
        "lightning", "pytorch_lightning", "torchmetrics", "hydra", "omegaconf", "callbacks", "data",
        *modules("config", "stages", "strategies", "checkpoints", "phase_callback"),
    )),
    Rule("the library knows no application", ("nb_lightning/**/*.py",), never=("callbacks", "data", "train", "tests")),
    Rule("callbacks: no data, no stages", ("callbacks/**/*.py",), never=("data", "train", *modules("stages"))),
    Rule("data: no callbacks, no stages", ("data/**/*.py",), never=("callbacks", "train", *modules("stages"))),
    Rule("the jail: standard library and itself", ("nb_lightning/rewards/jail/*.py",), only=(
        *"canary landlock lockdown plain runner seccomp".split(), "math_verify", "reasoning_gym",
    )),
    Rule("one place for xformers", ("nb_lightning/**/*.py", "callbacks/**/*.py", "data/**/*.py", "train.py"),
         never=("xformers",), but=library("attention")),
    Rule("one place for bitsandbytes", ("nb_lightning/**/*.py", "callbacks/**/*.py", "data/**/*.py", "train.py"),
         never=("bitsandbytes",), but=library("bnb")),
    Rule("one place for peft", ("nb_lightning/**/*.py", "callbacks/**/*.py", "data/**/*.py", "train.py"),
         never=("peft",), but=library("adapters")),
    Rule("chat: stdlib", library("messages", "chat", "chat_process"),
         only=modules("messages", "chat", "chat_process")),
    Rule("chat tokens: stdlib, tokenizers and chat", library("chat_tokens"),
         only=("tokenizers", *modules("messages", "chat", "tokenizer"))),
    Rule("one place for OpenAI's client", ("nb_lightning/**/*.py", "callbacks/**/*.py", "data/**/*.py", "train.py"),
         never=("openai",), but=("data/pairs/endpoint.py",)),
    Rule("one place for Jinja", ("nb_lightning/**/*.py", "callbacks/**/*.py", "data/**/*.py", "train.py"),
         never=("jinja2",), but=library("chat_worker", "report/__main__")),
    Rule("the chat worker: stdlib and Jinja", library("chat_worker"), only=("jinja2",)),
    Rule("one place for gguf", ("nb_lightning/**/*.py", "callbacks/**/*.py", "data/**/*.py", "train.py"),
         never=("gguf",), but=library("gguf_file")),
    Rule("one place for the server", ("nb_lightning/**/*.py", "callbacks/**/*.py", "data/**/*.py", "train.py"),
         never=("litserve", "fastapi", "starlette", "pydantic"),
         but=library("serve/__main__", "serve/engine", "serve/protocol", "serve/routes")),
    Rule("one place for Hydra", ("nb_lightning/**/*.py", "callbacks/**/*.py", "data/**/*.py"),
         never=("hydra",), but=library("config")),
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
        (",".join(modules(*(name for name in MATHS if (ROOT / f"nb_lightning/{name}.py").exists()))), [
            "lightning", "hydra", "omegaconf", "torchmetrics", "transformers", "bitsandbytes", "xformers",
        ]),
    ],
)  # fmt: skip
def test_importing_it_loads_nothing_heavier(module: str, absent: list[str]) -> None:
    """What the table cannot see: an import by way of another module."""
    code = f"import sys, {module}; print(*(name for name in {absent} if sys.modules.get(name)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
