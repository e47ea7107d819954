"""The documents hang together: links and pages, width, figures, and what is said twice."""

from __future__ import annotations

import ast
import json
import re
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.docs_harness import PAGES, each_page, text_of
from tests.harness import ROOT

COLUMNS = 120
PARAGRAPH_LINES = 5
LINK = re.compile(r"\]\(([^)\s]+)\)")


# Links --------------------------------------------------------------------------------------------------------------


def linked(page: Path) -> list[Path]:
    """Return the targets of a page's relative links."""
    targets = [target.partition("#")[0] for target in LINK.findall(text_of(page, code_blocks=False))]
    return [(page.parent / target).resolve() for target in targets if target and "://" not in target]


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    assert [str(target.relative_to(ROOT)) for target in linked(page) if not target.exists()] == []


def test_every_page_is_reached() -> None:
    reached, waiting = set(), [ROOT / "README.md", ROOT / "docs/README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            waiting += [target for target in linked(page) if target.suffix == ".md" and target.exists()]
    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in reached] == []


# Form ---------------------------------------------------------------------------------------------------------------


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines that are neither code nor table; an empty line stands for those."""
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = line.startswith("```")
        fenced ^= fence
        yield number, "" if fenced or fence or line.startswith(("|", "    ", "#", "!")) else line


@each_page
def test_prose_is_wrapped(page: Path) -> None:
    assert [n for n, line in prose(page) if len(line) > COLUMNS and "://" not in line] == []


@each_page
def test_paragraphs_are_short(page: Path) -> None:
    """A paragraph, or an item of a list, has at most five lines."""
    long, lines = [], 0
    for number, line in prose(page):
        lines = 0 if not line.strip() else 1 if re.match(r"\s*(\*|\d+\.) ", line) else lines + 1
        if lines > PARAGRAPH_LINES:
            long.append(number)
    assert long == []


# Figures ------------------------------------------------------------------------------------------------------------


def row(page: str, name: str) -> list[str]:
    """Return the cells of the only table row whose first cell is `name`, without bold."""
    lines = [line for line in (ROOT / page).read_text().splitlines() if line.startswith(f"| {name} |")]
    assert len(lines) == 1, f"{page} has {len(lines)} rows {name!r}"
    return [cell.strip().replace("**", "") for cell in lines[0].strip("|").split("|")][1:]


def test_readme_and_results_show_the_same_two_runs() -> None:
    assert row("README.md", "the table above (AMD)") == row("docs/results.md", "README (AMD)")[:5]
    assert row("README.md", "another CPU (Intel)") == row("docs/results.md", "the other CPU (Intel)")[:5]


def test_the_two_runs_are_those_of_the_readmes_table() -> None:
    _, sft, dpd, _, _, rl = row("README.md", "all")
    assert row("README.md", "the table above (AMD)")[:3] == [sft, dpd, rl]
    assert row("README.md", "gain")[2] == row("README.md", "the table above (AMD)")[3]


def test_results_repeat_the_readmes_families() -> None:
    names = {
        "binary, after SFT": ("write in binary (science)", 1),
        "code, after SFT": ("write a Python function (code, run in the sandbox)", 1),
        "sort, after SFT": ("sort letters (maths)", 1),
        "words, after SFT": ("small chores with words", 1),
        "tool calls, after DPD": ("tool calls", 2),
    }
    for name, (family, column) in names.items():
        assert row("docs/results.md", name)[0] == row("README.md", family)[column], name


def test_results_repeat_the_readmes_sentences() -> None:
    readme, results = (" ".join((ROOT / page).read_text().split()) for page in ("README.md", "docs/results.md"))
    interval = r"\+?[−\d.]+ \([+−][\d.]+ … [+−][\d.]+\)"
    sentences = re.findall(rf"(?:raises|gains|and) [^.]*?{interval}", readme)
    gains = {gain.lstrip("+") for sentence in sentences for gain in re.findall(interval, sentence)}
    assert len(gains) >= 4
    assert [gain for gain in gains if gain not in results] == []
    at_the_papers_temperature = re.findall(r"have (48\.8)[^\d]+(66\.0)[^\d]+(65\.8)", readme)
    assert len(at_the_papers_temperature) == 1 and all(value in results for value in at_the_papers_temperature[0])


# What else is said twice --------------------------------------------------------------------------------------------


def test_the_picture_of_the_floors_is_the_table_of_the_floors() -> None:
    source = ast.parse((ROOT / "tests/test_floors.py").read_text())
    assigned = {t.id: node.value for node in source.body if isinstance(node, ast.Assign) for t in node.targets}  # type: ignore[attr-defined]
    table = [{name.removeprefix("nb_lightning.") for name in floor} for floor in ast.literal_eval(assigned["FLOORS"])]
    texts = ElementTree.parse(ROOT / "docs/images/floors.svg").getroot().iter("{http://www.w3.org/2000/svg}text")
    drawn: dict[float, set[str]] = {}
    for text in texts:
        if text.get("text-anchor") == "middle":
            drawn.setdefault(-float(text.attrib["y"]), set()).add(str(text.text).removesuffix(".py"))
    assert [drawn[y] for y in sorted(drawn)] == table


def test_architecture_names_every_package_and_file_of_the_library() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rooms = [path for path in (ROOT / "nb_lightning").iterdir() if not path.name.startswith(("_", "py"))]
    assert [path.name for path in rooms if f"{path.name}/`" not in text and path.name not in text] == []


def test_version_license_and_title_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["title"], citation["version"], citation["license"]) == (
        project["name"], project["version"], project["license"],
    )  # fmt: skip
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text().splitlines()[1]
    assert json.dumps(project["urls"]["Paper"]) in json.dumps(
        [reference["url"] for reference in citation["references"]]
    )
