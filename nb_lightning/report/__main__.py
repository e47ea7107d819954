"""The report: `python -m nb_lightning.report --root outputs` writes report/report.html and report/report.md there.

It reads what the runs left behind and works at any point of the recipe; what is not there is shown as not run. The page
is one file: pictures inside, no scripts, nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import base64
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from nb_lightning.files import read_json
from nb_lightning.recipe.runner import clock
from nb_lightning.report.examples import before_and_after
from nb_lightning.report.pictures import plot_accuracy
from nb_lightning.report.results import at_the_end, while_training
from nb_lightning.report.runs import Run, read_runs

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m nb_lightning.report", description=__doc__.partition("\n")[0])
    p.add_argument("--root", type=Path, default=Path("outputs"), help="where the runs are (default: %(default)s)")
    p.add_argument("--output", type=Path, metavar="FOLDER", help="(default: report in --root)")
    a = p.parse_args(arguments)
    if not (a.root / "runs").is_dir():
        sys.exit(f"error: --root {a.root} has no runs; it is what paths.root (or NB_ROOT) was")
    print(write(a.root, a.output or a.root / "report"))


def write(root: Path, output: Path) -> Path:
    """Both forms of the report; returns the page."""
    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    found = gather(root)
    headline = images / "accuracy.png"
    headline.unlink(missing_ok=True)
    plot_accuracy(found["results"], headline)

    def beside(path: Path) -> str:
        """A copy of a picture of a run, as a link from the Markdown."""
        name = path.name if path.parent == images else f"{path.parent.name}_{path.name}"
        if path.parent != images:
            shutil.copyfile(path, images / name)
        return f"images/{name}"

    for name, picture in (("report.md", beside), ("report.html", embedded)):
        text = environment().get_template(f"{name}.jinja").render(found, picture=picture, headline=headline)
        (output / name).write_text(text, encoding="utf-8")
    return output / "report.html"


def gather(root: Path) -> dict[str, Any]:
    """What the templates are made of."""
    runs = read_runs(root)
    steps = read_json(root / "recipe" / "state.json", {})
    there = [run for run in runs if run.manifest]
    return {
        "runs": runs,
        "steps": steps,
        "seconds": sum(step["seconds"] for step in steps.values()),
        "results": while_training(runs),
        "evaluation": at_the_end(root),
        "samples": before_and_after(root),
        "versions": versions(there),
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }


def versions(runs: Sequence[Run]) -> dict[str, str]:
    """Of all starts of all runs; more than one where they differ."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for start in run.manifest["starts"]:
            for name, version in start["versions"].items():
                found.setdefault(name, {})[version] = None
            if start["git"]:
                changed = " with changes" if start["git"]["modified"] else ""
                found.setdefault("commit", {})[start["git"]["commit"][:10] + changed] = None
            found.setdefault("device", {})[f"{start['device']}, {start['world_size']} process(es)"] = None
    return {name: ", ".join(values) for name, values in found.items()}


def embedded(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def environment() -> jinja2.Environment:
    e = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    e.filters |= {"percent": percent, "points": points, "sign": sign, "fenced": fenced}
    e.filters |= {"clock": clock, "count": "{:,}".format, "short": short}
    return e


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def short(number: float) -> str:
    """804_992 -> "805 K", 3.93e9 -> "3.93 B"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def fenced(text: str) -> str:
    """A block of Markdown that the text, a model's say, cannot end."""
    fence = "`" * max(4, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def points(share: float) -> str:
    """A difference in percentage points; no sign where it is written as zero."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def sign(interval: tuple[float, float] | None) -> str:
    """Whether an interval is all above zero, all below, or neither."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "open"
    return "up" if interval[0] > 0 else "down"


if __name__ == "__main__":
    main()
