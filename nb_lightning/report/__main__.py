"""Write the report: `python -m nb_lightning.report --root outputs` makes report/report.html and report/report.md there.

It reads the files that the runs left and works at any point of the recipe; a stage that is not there is shown as not
run. The page is one file: pictures are embedded, there are no scripts and no external resources.
"""

from __future__ import annotations

import argparse
import base64
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from nb_lightning.errors import one_line_errors
from nb_lightning.files import read_json
from nb_lightning.recipe.runner import clock
from nb_lightning.report.examples import choose_examples
from nb_lightning.report.pictures import plot_accuracy
from nb_lightning.report.results import results_of_evaluation, results_of_training
from nb_lightning.report.runs import Run, read_runs

TEMPLATES = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m nb_lightning.report", description="Report on the runs of a recipe.")
    p.add_argument("--root", type=Path, default=Path("outputs"), help="where the runs are (default: %(default)s)")
    p.add_argument("--output", type=Path, metavar="FOLDER", help="(default: report in --root)")
    a = p.parse_args(arguments)
    with one_line_errors():
        if not (a.root / "runs").is_dir():
            raise ValueError(f"--root {a.root} has no runs; it is what paths.root (or NB_ROOT) was")
        print(write(a.root, a.output or a.root / "report"))


def write(root: Path, output: Path) -> Path:
    """Write both forms of the report; return the path of the page."""
    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    content = gather(root)
    headline = images / "accuracy.png"
    headline.unlink(missing_ok=True)
    plot_accuracy(content["results"], headline)

    def link(path: Path) -> str:
        """Copy a run's picture beside the Markdown and return the link to it."""
        name = path.name if path.parent == images else f"{path.parent.name}_{path.name}"
        if path.parent != images:
            shutil.copyfile(path, images / name)
        return f"images/{name}"

    for name, picture in (("report.md", link), ("report.html", embed)):
        text = environment().get_template(f"{name}.jinja").render(content, picture=picture, headline=headline)
        (output / name).write_text(text, encoding="utf-8")
    return output / "report.html"


def gather(root: Path) -> dict[str, Any]:
    """Collect the variables of the templates."""
    runs = read_runs(root)
    steps = read_json(root / "recipe" / "state.json", {})
    return {
        "runs": runs,
        "steps": steps,
        "seconds": sum(step["seconds"] for step in steps.values()),
        "results": results_of_training(runs),
        "evaluation": results_of_evaluation(root),
        "examples": choose_examples(root),
        "versions": versions([run for run in runs if run.manifest]),
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }


def versions(runs: Sequence[Run]) -> dict[str, str]:
    """List versions, commit and device over all starts of the runs; several where they differ."""
    distinct: dict[str, dict[str, None]] = {}  # name -> its values as the keys of a dict, in order
    for run in runs:
        for start in run.manifest["starts"]:
            for name, version in start["versions"].items():
                distinct.setdefault(name, {})[version] = None
            if start["git"]:
                changed = " with changes" if start["git"]["modified"] else ""
                distinct.setdefault("commit", {})[start["git"]["commit"][:10] + changed] = None
            distinct.setdefault("device", {})[f"{start['device']}, {start['world_size']} process(es)"] = None
    return {name: ", ".join(values) for name, values in distinct.items()}


def embed(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def environment() -> jinja2.Environment:
    e = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
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
    """Put text into a block of Markdown that no fence inside it can close."""
    fence = "`" * max(4, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def points(share: float) -> str:
    """Format a difference in percentage points; a rounded zero has no sign."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def sign(interval: tuple[float, float] | None) -> str:
    """Return "up" or "down" for an interval entirely above or below zero, else "open"."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "open"
    return "up" if interval[0] > 0 else "down"


if __name__ == "__main__":
    main()
