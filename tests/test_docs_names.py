"""The documents name what is there: paths, modules, classes, commands and their options."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from nb_lightning.checkout import composed
from tests.docs_harness import CODE_SPAN, PACKAGES, PAGES, code_spans, each_page, text_of
from tests.harness import ROOT

PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:/[\w.<>*-]+)+/?")
FILE_NAME = re.compile(r"(?:[a-z_]\w*/)*[a-z_]\w*\.py")
MODULE = re.compile(r"(?<![\w./])(?:nb_lightning|data|callbacks|benchmarks)(?:\.\w+)+")
SYMBOL = re.compile(r"([A-Z][a-z]\w*[A-Z]\w*)(?:\.(\w+))?(?:\(.*\))?")  # CamelCase, perhaps with an attribute
NOT_IN_THE_CHECKOUT = (
    "data/demo_pairs", "data/demo_tasks",  # below paths.root
    "data/share", "data/repeats",  # metrics
    "conf/model/mine", "conf/plan/rl/mine",  # the reader's
)  # fmt: skip
OF_OTHERS = {
    "DPOTrainer", "GRPOTrainer", "GKDTrainer", "PeftModel", "AutoTokenizer", "AutoModelForCausalLM", "LitSpec",
    "LitLoop", "OpenAISpec", "LlamaForCausalLM", "FakeTensorMode",
}  # fmt: skip


# Paths and symbols --------------------------------------------------------------------------------------------------


@functools.cache
def source_files() -> list[Path]:
    folders = ("nb_lightning", "data", "callbacks", "benchmarks", "tests", "docs/examples")
    return [ROOT / "train.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]


@functools.cache
def classes() -> dict[str, set[str]]:
    """Map each class of the checkout to its attributes: methods, fields and what it sets on itself."""
    members: dict[str, set[str]] = {}
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                members.setdefault(node.name, set()).update(_members(node))
    return members


def _members(of: ast.ClassDef) -> Iterator[str]:
    for node in ast.walk(of):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


@functools.cache
def names_in(path: Path) -> set[str]:
    """Return the names that a module defines at its top level, imports included."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def without_old_names(page: Path) -> str:
    """Return the page's text; of the changelog without the first column, which holds names that are gone."""
    text = text_of(page)
    return re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE) if page.name == "CHANGELOG.md" else text


@each_page
def test_every_path_exists(page: Path) -> None:
    missing = []
    for path in PATH.findall(without_old_names(page).replace("../", "")):
        pattern = re.sub(r"<\w+>", "*", path.rstrip("./"))
        if not path.startswith(NOT_IN_THE_CHECKOUT) and not any(ROOT.glob(pattern)):
            missing.append(path)
    assert missing == []


@each_page
def test_every_file_name_exists(page: Path) -> None:
    """`documents.py` after `data/prepare/make.py` need not repeat the folder, but some file must end so."""
    files = [str(path.relative_to(ROOT)) for path in source_files()]
    names = {span for span in code_spans(page) if FILE_NAME.fullmatch(span) and span.split("/")[0] not in PACKAGES}
    assert [name for name in sorted(names) if not any(f"/{file}".endswith(f"/{name}") for file in files)] == []


@functools.cache
def config_keys() -> set[str]:
    """Return the fields of all schemas: `data.sources` is a key of the config, no module."""
    return set().union(*(members for name, members in classes().items() if name.endswith("Config")))


@each_page
def test_every_dotted_name_can_be_imported(page: Path) -> None:
    missing = []
    for name in MODULE.findall(" ".join(CODE_SPAN.findall(without_old_names(page)))):
        parent, _, last = name.rpartition(".")
        if name == "nb_lightning.json" or (name.startswith("data.") and name.split(".")[1] in config_keys()):
            continue
        folder = ROOT.joinpath(*parent.split("."))
        is_module = (folder / last).is_dir() or (folder / f"{last}.py").exists()
        homes = [home for home in (folder.with_suffix(".py"), folder / "__init__.py") if home.exists()]
        if not is_module and not any(last in names_in(home) for home in homes):
            missing.append(name)
    assert missing == []


@each_page
def test_every_config_key_exists(page: Path) -> None:
    keys = re.findall(r"`[~+]?(?:stage|trainer|model|paths)\.(\w+)[^`]*`", text_of(page, code_blocks=False))
    assert sorted(set(keys) - config_keys()) == []


@each_page
def test_every_class_and_attribute_exists(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # names classes that are gone
    missing = []
    for span in code_spans(page):
        match = SYMBOL.fullmatch(span)
        if match and match[1] not in OF_OTHERS and not hasattr(builtins, match[1]):
            known = classes().get(match[1])
            if known is None or (match[2] and match[2] not in known):
                missing.append(span)
    assert missing == []


@each_page
def test_a_symbol_named_after_its_file_is_in_that_file(page: Path) -> None:
    """`path.py`: `A`, `B.c` names symbols of path.py."""
    listed = re.compile(r"`((?:[\w-]+/)+\w+\.py)`: ((?:`[\w.]+`(?:, | and )?)+)")
    missing = []
    for path, symbols in listed.findall(text_of(page, code_blocks=False)):
        for symbol in CODE_SPAN.findall(symbols):
            if not symbol.endswith(".py") and symbol.split(".")[0] not in names_in(ROOT / path):
                missing.append(f"{path}: {symbol}")
    assert missing == []


@each_page
def test_imports_in_code_blocks_work(page: Path) -> None:
    missing = []
    for module, names in re.findall(r"^from ((?:nb_lightning|data)[\w.]*) import (.+)$", text_of(page), re.MULTILINE):
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None, module
        missing += [f"{module}.{name}" for name in names.split(", ") if name not in names_in(Path(spec.origin))]
    assert missing == []


# Commands -----------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """Return the words of every command in the page's shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def module_files(module: str) -> list[Path]:
    """Return the files of a module or package."""
    place = ROOT.joinpath(*module.split("."))
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


SHARED_OPTIONS = (ROOT / "benchmarks/common.py", ROOT / "data/calls/flags.py")  # that several commands add


@each_page
def test_every_command_has_its_module_and_options(page: Path) -> None:
    wrong = []
    for words in commands(page):
        module = words[words.index("-m") + 1] if "-m" in words else ""
        script = next((word for word in words if word.endswith(".py")), "")
        if module.split(".")[0] in PACKAGES:
            files = module_files(module)
        elif script and not module:
            files = [ROOT / script]
        else:
            continue
        if not all(file.exists() for file in files):
            wrong.append(" ".join(words))
            continue
        code = "\n".join(file.read_text() for file in [*files, *SHARED_OPTIONS])
        options = [word.partition("=")[0] for word in words[words.index(module or script) :] if word.startswith("--")]
        hydra = ("--cfg", "--resolve") if script == "train.py" else ()
        wrong += [f"{module or script} {o}" for o in options if o not in hydra and f'"{o}"' not in code]
    assert wrong == []


def training_commands() -> list[tuple[str, ...]]:
    """Return the overrides of every `train.py` command, without those that stand for, or need, the reader's files."""
    distinct = set()
    for words in (words for page in PAGES for words in commands(page) if "train.py" in words):
        overrides = tuple(word for word in words[words.index("train.py") + 1 :] if "=" in word or word.startswith("~"))
        readers = ("...", "model=mine", "hydra.searchpath")
        if "..." not in words and not any(text in word for word in overrides for text in readers):
            distinct.add(overrides)
    return sorted(distinct)


@pytest.mark.runs  # composing takes seconds in all
@pytest.mark.runs
def test_every_training_command_composes() -> None:
    assert len(training_commands()) > 10
    shape = vars(composed(()).model)  # stands for the model at a reader's path
    for overrides in training_commands():
        composed(overrides, lambda init_from: shape)  # the error names the override


@each_page
def test_every_command_of_run_exists(page: Path) -> None:
    script = (ROOT / "run").read_text()
    known = set(re.findall(r"^  (\w+)\)", script, re.MULTILINE))
    assert {words[1] for words in commands(page) if words[0] == "./run"} <= known
