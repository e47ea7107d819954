"""The report against the files that it reads: the same numbers, nothing from elsewhere, any stage may be missing."""

from __future__ import annotations

import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nb_lightning.evaluate.statistics import bootstrap
from nb_lightning.report.__main__ import fenced, gather, points, short, write
from nb_lightning.report.results import results_of_evaluation, results_of_training
from nb_lightning.report.runs import read_runs

pytestmark = pytest.mark.runs

FAMILIES = ("maths_sort", "code_functions")
TASKS = 20
PLAN = [
    {"name": "one", "tokens": 4000, "mixture": {"a": 0.5, "b": 0.5}, "global_batch_tokens": 1000},
    {"name": "two", "tokens": 2000, "mixture": {"a": 1.0}, "global_batch_tokens": 1000},
]


def rng(*words: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(words).encode()))


def entry(families: tuple[str, ...], right: float, *words: object, each: bool = True) -> dict[str, Any]:
    """As callbacks/task_accuracy.py writes it, with `right` of 8 samples right on average."""
    sources = {name: rng(name, *words).binomial(8, right, TASKS) / 8 for name in families}
    sources["all"] = np.concatenate(list(sources.values()))
    found = {}
    for name, means in sources.items():
        found[name] = {
            "tasks": len(means), "greedy": round(right, 2), "avg@8": float(means.mean()), "interval": bootstrap(means),
            "truncated": 0.0, "each": means.tolist(),
        }  # fmt: skip
        if not each:
            del found[name]["each"]
    return {"tokens_seen": 0, "k": 8, "sources": found}


def png(path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = zlib.compress(b"\0\xff\xff\xff")
    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def run(root: Path, name: str, phases: dict[str, Any] | None = None, finished: bool = True) -> None:
    folder = root / "runs" / name
    (folder / "metrics/version_0").mkdir(parents=True)
    start = {"versions": {"torch": "2.13.0"}, "git": {"commit": "abcdef0123456789", "modified": False}, "device": "cpu",
             "world_size": 1}  # fmt: skip
    manifest = {"starts": [start], "parameters": 804_992, "plan": PLAN, "finished": finished,
                "data": {"a": {"sha256": "a" * 64}}}  # fmt: skip
    if finished:
        manifest["tokens_seen"] = 6000
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text("seed: 7\ndata: {tasks: [x.jsonl], task_limit: 20, task_tokens: 64}\n")
    rows = [
        "tokens_seen,data/share/a,data/share/b,perf/tokens_per_sec",
        "2000,0.5,0.5,100", "4000,0.45,0.55,300", "6000,1.0,0.0,200",
    ]  # fmt: skip
    (folder / "metrics/version_0/metrics.csv").write_text("\n".join(rows))
    for picture in ("plan", "curves"):
        png(folder / f"{picture}.png")
    if phases:
        (folder / "accuracy.json").write_text(json.dumps(phases))


def evaluation(root: Path, name: str, right: float) -> None:
    """As the recipe's `nb_lightning.evaluate` leaves it."""
    (root / "recipe").mkdir(exist_ok=True)
    lines, sampled, greedy = [], {}, {}
    for family in FAMILIES:
        rewards = rng("evaluation", name, family).binomial(1, right, (TASKS, 8))
        for task in range(TASKS):
            line = {
                "id": f"{family}/{task}",
                "source": family,
                "messages": [{"role": "user", "content": f"<b>{task}</b>"}],
            }
            for way, row in (("sampled", rewards[task]), ("greedy", rewards[task, :1])):
                lines += [{**line, "way": way, "reward": float(r), "completion": f"`{r}` & <i>so</i>"} for r in row]
        sampled[family] = {"tasks": TASKS, "mean": rewards.mean(), "interval": bootstrap(rewards.mean(1))}
        greedy[family] = {"mean": rewards[:, 0].mean()}
    sampled["all"] = {
        "tasks": 2 * TASKS,
        "mean": np.mean([s["mean"] for s in sampled.values()]),
        "interval": [0.1, 0.9],
    }
    greedy["all"] = {"mean": 0.5}
    settings = {"model": name, "out": name, "samples": name, "k": 8, "temperature": 0.6, "top_p": 0.95}
    content = {"settings": settings, "tasks": {"sampled": sampled, "greedy": greedy}}
    (root / "recipe" / f"evaluate_{name}.json").write_text(json.dumps(content))
    (root / "recipe" / f"evaluate_{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Everything up to RL, which is in its first phase; no reward model."""
    after_sft = entry(FAMILIES, 0.4, "sft")
    run(tmp_path, "pretrain")
    run(
        tmp_path,
        "sft",
        {"before": entry(FAMILIES, 0.0, 0), "cold_start": entry(FAMILIES, 0.2, 1), "overall": after_sft},
    )
    run(tmp_path, "teacher", {"before": after_sft, "overall": entry(FAMILIES, 0.9, "teacher")})
    run(tmp_path, "dpd", {"before": after_sft, "distillation": entry(FAMILIES, 0.6, "dpd")})
    run(tmp_path, "rl", {"before": entry(FAMILIES, 0.6, "dpd"), "stem": entry(FAMILIES, 0.7, "rl")}, finished=False)
    counts = {"counts": [1] * 17, "kept": 13, "of": 17}
    (tmp_path / "runs/rl/on_policy_filter.json").write_text(json.dumps({"stem": {"maths_sort": counts}}))
    png(tmp_path / "runs/rl/on_policy_filter_stem.png")
    for name, right in (("sft", 0.5), ("dpd", 0.7)):
        evaluation(tmp_path, name, right)
    state = {"sft": {"seconds": 61.0, "state": "finished"}, "pairs": {"seconds": 5.0, "state": "running"}}
    (tmp_path / "recipe/state.json").write_text(json.dumps(state))
    return tmp_path


class Page(HTMLParser):
    """Tags with their attributes, and the cells of all tables row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == [], "tags that nothing closes"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.rows and {"td", "th"} & set(self.open) and data.strip():
            self.rows[-1][-1] += f" {data.strip()}"

    def row(self, first: str) -> list[str]:
        """Of the first table that has one."""
        return next([cell.strip() for cell in row[1:]] for row in self.rows if row and row[0].strip() == first)


def written(root: Path) -> tuple[Page, str]:
    page = write(root, root / "report")
    return Page(page.read_text()), (root / "report/report.md").read_text()


def test_the_table_has_the_numbers_of_the_files(root: Path) -> None:
    page, markdown = written(root)
    columns = [("sft", "before"), ("sft", "cold_start"), ("sft", "overall"), ("dpd", "distillation"), ("rl", "stem"),
               ("teacher", "overall")]  # fmt: skip
    heads = ["before SFT", "SFT: cold start", "SFT: overall", "DPD: distillation", "RL: stem", "Teacher: overall"]
    assert page.row("held-out tasks") == heads
    for family in (*FAMILIES, "all"):
        cells, lines = page.row(family.replace("_", " ")), []
        for cell, (name, when) in zip(cells, columns, strict=True):
            s = json.loads((root / f"runs/{name}/accuracy.json").read_text())[when]["sources"][family]
            mean, low, high, greedy = (f"{100 * x:.1f}" for x in (s["avg@8"], *s["interval"], s["greedy"]))
            assert cell == f"{mean} {low}–{high} greedy {greedy}"
            lines.append(f"{mean} ({low}–{high}) / {greedy}")
        assert f"| {family} | {' | '.join(lines)} |" in markdown


def test_gains_are_paired_task_by_task(root: Path) -> None:
    page, _ = written(root)
    for title, name, before, after in (
        ("SFT: cold start", "sft", "before", "cold_start"),
        ("DPD: distillation", "dpd", "before", "distillation"),
        ("RL: stem", "rl", "before", "stem"),
    ):
        of = json.loads((root / f"runs/{name}/accuracy.json").read_text())
        cells = page.row(title)
        for family, cell in zip((*FAMILIES, "all"), cells, strict=True):
            difference = np.subtract(*(of[when]["sources"][family]["each"] for when in (after, before)))
            mean, low, _, high = cell.split()
            assert mean == points(difference.mean())
            # Another draw of the same bootstrap: percentiles of the mean over tasks.
            bounds = [float(x.replace("−", "-")) / 100 for x in (low, high)]
            assert np.allclose(bounds, bootstrap(difference), atol=0.25 * difference.std() / np.sqrt(len(difference)))
    total = page.row("SFT: overall to RL: stem, all together")
    assert total[-1].split()[0] == points(
        np.mean(json.loads((root / "runs/rl/accuracy.json").read_text())["stem"]["sources"]["all"]["each"])
        - np.mean(json.loads((root / "runs/sft/accuracy.json").read_text())["overall"]["sources"]["all"]["each"])
    )


def test_without_each_task_a_gain_says_that_it_is_not_paired(tmp_path: Path) -> None:
    before, after = (entry(FAMILIES, right, right, each=False) for right in (0.2, 0.6))
    run(tmp_path, "sft", {"before": before, "overall": after})
    (gain,) = results_of_training(read_runs(tmp_path)).gains
    assert not gain.paired
    mean, (low, high) = gain.differences["all"]
    a, b = before["sources"]["all"], after["sources"]["all"]
    assert mean == pytest.approx(b["avg@8"] - a["avg@8"])
    widths = [s["interval"][1] - s["interval"][0] for s in (a, b)]
    assert high - low == pytest.approx(np.hypot(*widths)) and (low + high) / 2 == pytest.approx(mean)
    assert "not paired" in written(tmp_path)[1]


def test_a_stage_measured_on_fewer_families_has_no_mean_over_all(root: Path) -> None:
    """Of a stage that was measured on its own task, "all" is another thing than of the stage before."""
    run_dpd = root / "runs/dpd/accuracy.json"
    run_dpd.write_text(json.dumps({w: entry(FAMILIES[:1], 0.5, w) for w in ("before", "distillation")}))
    page, _ = written(root)
    assert page.row("all")[3] == "–" and page.row("code functions")[3] == "–" and page.row("maths sort")[3] != "–"
    assert page.row("DPD: distillation")[1:] == ["–", "–"]


def test_evaluation_is_paired_over_the_samples(root: Path) -> None:
    results = results_of_evaluation(root)
    each = {
        name: np.array([s["reward"] for s in map(json.loads, open(root / f"recipe/evaluate_{name}.jsonl"))
                        if s["way"] == "sampled" and s["source"] == FAMILIES[0]]).reshape(TASKS, 8).mean(1)
        for name in ("sft", "dpd")
    }  # fmt: skip
    assert results.gains[0].paired and results.gains[0].title == "SFT to DPD"
    assert results.gains[0].differences[FAMILIES[0]][0] == pytest.approx((each["dpd"] - each["sft"]).mean())
    assert [m.accuracies[FAMILIES[0]].mean for m in results.measurements] == pytest.approx(
        [e.mean() for e in each.values()]
    )


def test_an_evaluation_without_greedy_has_no_greedy_numbers(root: Path) -> None:
    path = root / "recipe/evaluate_dpd.json"
    content = json.loads(path.read_text())
    del content["tasks"]["greedy"]
    content["settings"]["temperature"] = 1.0
    path.write_text(json.dumps(content))
    results = results_of_evaluation(root)
    assert [m.accuracies["all"].greedy for m in results.measurements] == [0.5, None]
    assert not results.one_protocol and not results.gains[0].paired
    assert "Each model with other settings" in written(root)[1]


def test_runs_that_measured_other_tasks_are_not_paired(root: Path) -> None:
    path = root / "runs/dpd/accuracy.json"
    content = json.loads(path.read_text())
    for of in content["distillation"]["sources"].values():  # resumed with fewer tasks
        of["each"] = of["each"][: len(of["each"]) // 2]
    path.write_text(json.dumps(content))
    (gain,) = (g for g in results_of_training(read_runs(root)).gains if g.title == "DPD: distillation")
    assert not gain.paired


def test_only_the_teacher_measured_makes_no_picture(tmp_path: Path) -> None:
    run(tmp_path, "teacher", {"overall": entry(FAMILIES, 0.9, "teacher")})
    assert "accuracy.png" not in written(tmp_path)[1]


def test_numbers_are_short_and_no_answer_closes_its_fence() -> None:
    assert [short(n) for n in (7, 804_992, 3_933_637_120, 2.3e13)] == ["7", "805 K", "3.93 B", "23 T"]
    assert fenced("a\n`````\n# b") == "``````text\na\n`````\n# b\n``````"


def test_examples_are_the_first_task_and_the_first_learnt(root: Path) -> None:
    for example in gather(root)["examples"]:
        rewards = [answer.reward for answer in example.answers]
        assert len(rewards) == 2 and (example.reason == "the first" or rewards == [0.0, 1.0])
    text = write(root, root / "report").read_text()
    assert "<b>0</b>" not in text and "&lt;b&gt;0&lt;/b&gt;" in text and "<i>so</i>" not in text


def test_shares_are_weighted_by_tokens(root: Path) -> None:
    (_, run, *_) = read_runs(root)
    assert run.shares() == [
        ("a", pytest.approx((4000 * 0.5 + 2000) / 6000), pytest.approx((2000 * 0.5 + 2000 * 0.45 + 2000) / 6000)),
        ("b", pytest.approx(2000 / 6000), pytest.approx((2000 * 0.5 + 2000 * 0.55) / 6000)),
    ]
    assert run.tokens_per_sec == 200 and run.steps == 6


def test_the_page_is_one_file_without_scripts_or_external_resources(root: Path) -> None:
    page, markdown = written(root)
    text = (root / "report/report.html").read_text()
    assert "script" not in {tag for tag, _ in page.tags} and "link" not in {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            if attributes.get(name):
                assert re.match(r"data:image/png;base64,|#", attributes[name])
    assert not re.search(r"https?:|url\(|@import", text)
    anchors = {a["href"][1:] for tag, a in page.tags if tag == "a"}
    assert anchors <= {a["id"] for _, a in page.tags if "id" in a}
    assert sum(tag == "img" for tag, _ in page.tags) == 5 * 2 + 1 + 1  # plan and curves, a histogram, the result
    links = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(links) == 12 and all((root / "report" / link).is_file() for link in links)


def test_a_missing_stage_is_shown_as_not_run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    page, markdown = written(root)
    assert page.row("Reward model") == ["–", "–", "–", "–", "not run"] and page.row("RL")[-1] == "not finished"
    assert page.row("SFT") == ["6,000", "6", "200", "1:01", "finished"] and page.row("pairs")[-2:] == [
        "0:05",
        "running",
    ]
    assert "Reward model: not run" in markdown
    empty = tmp_path_factory.mktemp("empty")
    (empty / "runs").mkdir()
    page, markdown = written(empty)
    assert "No stage has measured held-out tasks yet." in markdown and page.row("Pretraining")[-1] == "not run"
    run(empty, "pretrain", finished=False)
    assert written(empty)[0].row("Pretraining")[-1] == "not finished"
