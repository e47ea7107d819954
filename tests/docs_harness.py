"""The pages of the documentation, and how to read them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
PACKAGES = ("nb_lightning", "data", "callbacks", "conf", "tests", "benchmarks", "docs")
CODE_SPAN = re.compile(r"`([^`\n]+)`")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: Path, code_blocks: bool = True) -> str:
    text = page.read_text()
    return text if code_blocks else re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def code_spans(page: Path) -> list[str]:
    return CODE_SPAN.findall(text_of(page, code_blocks=False))
