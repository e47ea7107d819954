"""A folder of refined samples: stopped and resumed, counted, tokenized, shown, and compared with other methods."""

from __future__ import annotations

import io
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data.calls.budget import Budget, BudgetSpent
from data.prepare.claim import claim_folder
from data.prepare.make import prepare
from data.prepare.settings import ChatSettings, SourceSettings
from data.refine.__main__ import main
from data.refine.drafts import Chain, Critique, Draft, History
from data.refine.ladder import RUNGS, rung_tokens, write_ladder
from data.refine.make import FILES as CLAIMED
from data.refine.make import conversation, describe_other_work, read_histories, refine_tasks, sample_of
from data.refine.report import Report, format_report
from data.refine.show import show, write_page
from nb_lightning.rewards.tasks import Task
from tests.data.prepare.chat_harness import stored, trained
from tests.data.refine.harness import (
    Scripted,
    make_plan,
    make_refinement,
    make_task,
    solve,
    write_sums,
)

FILES = ("samples.jsonl", "histories.jsonl", "dropped.jsonl")


def solver() -> Scripted:
    roles = ("candidate", "critique", "revise", "skeleton", "chain")
    return Scripted(**{role: partial(solve, role) for role in roles})


def run(folder: Path, tasks: list[Task], budget: Budget, batch: int = 4) -> tuple[dict[str, Any], Scripted]:
    engine = solver()
    refinement, reconstruction, caller = make_refinement(folder, make_plan(), tasks, engine, budget=budget)
    return refine_tasks(tasks, refinement, reconstruction, caller, {"claim": "x"}, folder, batch), engine


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    return write_sums(tmp_path_factory.mktemp("tasks") / "sums.jsonl", 22)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tasks: list[Task]) -> Path:
    folder = tmp_path_factory.mktemp("made")
    run(folder, tasks, Budget())
    return folder


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_task_is_a_sample_or_dropped_for_a_reason(made: Path, tasks: list[Task]) -> None:
    samples, dropped = lines_of(made / "samples.jsonl"), lines_of(made / "dropped.jsonl")
    assert [s["id"] for s in samples] == [str(i) for i in range(22) if i % 7 and i != 5]
    assert dropped == [
        {"id": str(i), "source": "sums", "reason": "no candidate is a finished answer" if i == 5 else "chain: no chain"}
        for i in (0, 5, 7, 14, 21)
    ]
    report = json.loads((made / "report.json").read_text())
    assert (report["tasks"], report["kept"]) == (22, 17)
    assert report["dropped"] == {"chain: no chain": 4, "no candidate is a finished answer": 1}
    assert report["sources"] == {"sums": {"tasks": 22, "first_right": 13, "kept": 17}}
    assert report["rounds"] == {"0": 13, "1": 8}
    assert report["judged_by"] == {"verifier": 17}
    assert report["verifier"] == {"correct": 21, "wrong": 8}
    # 22 candidates; 8 critiques and revisions; 21 skeletons; chains, those without one twice.
    assert report["tokens"] == {"teacher": 88, "critique": 32, "revise": 32, "skeleton": 84, "chain": 100, "all": 336}
    assert report["tokens_per_sample"] == 336 / 17
    assert report["rejection_sampling"] == {"kept": 13, "tokens_per_sample": 88 / 13}
    assert report["unreadable"] == {"chain": {"not exactly one <chain>...</chain>": 8}}
    assert report["calls"]["calls"] == 22 + 8 + 8 + 21 + 25
    assert report["calls"]["completion_tokens"] == 336
    assert sum(sum(h.tokens.values()) for h in read_histories(made)) == 336


def test_the_record_of_a_sample(made: Path) -> None:
    sample = lines_of(made / "samples.jsonl")[2]
    assert sample["messages"] == [
        {"role": "user", "content": "Add 3 and 4."},
        {"role": "assistant", "reasoning_content": "3 + 4 = 7", "content": "7"},
    ]
    assert sample["refine"] == {
        "draft": "round1-0", "judged_by": "verifier", "scores": {"correctness": 1.0}, "total": 1.0, "rounds": 1,
        "critiques": 0, "chains": 1, "lexical_anchoring": 0.0, "probability_anchoring": None,
        "calls": {"teacher": 1, "critique": 1, "revise": 1, "skeleton": 1, "chain": 1},
        "tokens": {"teacher": 4, "critique": 4, "revise": 4, "skeleton": 4, "chain": 4}, "claim": "x",
    }  # fmt: skip


def test_a_stop_at_any_call_leads_to_the_same_bytes_and_no_second_payment(
    tmp_path: Path, made: Path, tasks: list[Task]
) -> None:
    folder, paid, last = tmp_path / "out", [], 84
    folder.mkdir()
    for calls in (*range(1, last, 9), last + 1):
        try:
            _, engine = run(folder, tasks, Budget(calls=calls))
            paid += engine.calls
        except BudgetSpent:
            assert not (folder / "samples.jsonl").exists()
    assert [(folder / name).read_bytes() for name in FILES] == [(made / name).read_bytes() for name in FILES]
    assert len((folder / "calls/calls.jsonl").read_text().splitlines()) == last
    report, again = run(folder, tasks, Budget())
    assert again.calls == [] and report["calls"]["cached"] == last


@pytest.mark.parametrize("batch", [1, 100])
def test_the_batch_changes_nothing(tmp_path: Path, made: Path, tasks: list[Task], batch: int) -> None:
    run(tmp_path, tasks, Budget(), batch)
    assert [(tmp_path / name).read_bytes() for name in FILES] == [(made / name).read_bytes() for name in FILES]


def test_no_sample_at_all_is_an_error_that_says_why(tmp_path: Path, tasks: list[Task]) -> None:
    with pytest.raises(
        ValueError, match=r"^not one sample of 2 tasks: 1 chain: no chain, 1 no candidate is a finished"
    ):
        run(tmp_path, [tasks[0], tasks[5]], Budget())
    assert len(lines_of(tmp_path / "dropped.jsonl")) == 2


def test_prepare_takes_the_samples_as_they_stand_and_trains_reasoning_and_answer_alone(
    tmp_path: Path, made: Path
) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    task = make_task(messages=[
        {"role": "user", "content": "1?"}, {"role": "assistant", "content": "not this"},
        {"role": "user", "content": "2?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ])  # fmt: skip
    assert conversation(task, "thought", "answer")["messages"][1]["train"] is False
    history = History(task, drafts=[Draft("teacher-0", "", "answer", "stop")], best=0, chains=[Chain("thought")])
    multi = tmp_path / "multi.jsonl"
    multi.write_text(json.dumps(sample_of(history, {})) + "\n")
    settings = SourceSettings("bytes", val_fraction=0, chat=ChatSettings())
    for name, path, wanted in (
        ("sums", made / "samples.jsonl", "<think>\n1 + 2 = 3\n</think>\n\n3"),
        ("multi", multi, "<think>\nthought\n</think>\n\nanswer"),
    ):
        prepare([path], str(tmp_path / name), settings, on_bad="fail", progress=False)
        assert trained(stored(tmp_path / name)[0]) == f"[{wanted}<|im_end|>]"


# Claims --------------------------------------------------------------------------------------------------------------


def claim(folder: Path, content: dict[str, Any], overwrite: bool) -> None:
    claim_folder(folder, content, CLAIMED, overwrite, describe_other_work)


def test_a_changed_plan_is_refused_and_overwriting_keeps_the_paid_calls(tmp_path: Path, tasks: list[Task]) -> None:
    claim(tmp_path, {"plan": 1, "seed": 0}, overwrite=False)
    run(tmp_path, tasks, Budget())
    claim(tmp_path, {"plan": 1, "seed": 0}, overwrite=False)
    assert (tmp_path / "samples.jsonl").exists()
    with pytest.raises(ValueError, match=r"holds work with other plan; name another folder, or replace it with --over"):
        claim(tmp_path, {"plan": 2, "seed": 0}, overwrite=False)
    claim(tmp_path, {"plan": 2, "seed": 0}, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls", "claim.json"]
    _, engine = run(tmp_path, tasks, Budget())
    assert engine.calls == []


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds something else \(thesis.tex\); name another folder"):
        claim(tmp_path, {"plan": 1}, overwrite=True)


# Report --------------------------------------------------------------------------------------------------------------


def test_the_report_holds_counters_only() -> None:
    report = Report()
    sizes = []
    for n in range(300):
        draft = Draft("teacher-0", "", "5", "stop", "correct", {"correctness": 1.0}, 1.0, True)
        task = make_task(id=str(n))
        history = History(task, drafts=[draft], best=0, chains=[Chain("c", lexical=n / 299, probability=0.5)])
        report.add(history)
        sizes.append(len(repr(report)))
    content = report.as_json({}, {})
    assert content["chains"]["lexical_anchoring"] == pytest.approx(0.5)
    assert content["chains"]["probability_anchoring"] == 0.5
    assert sizes[-1] - sizes[10] < 60  # digits
    assert "samples.jsonl: 300 samples of 300 tasks" in format_report(content, "samples.jsonl")


# Ladder --------------------------------------------------------------------------------------------------------------


def test_the_ladders_records_and_costs_by_hand(tmp_path: Path, made: Path) -> None:
    numbers = write_ladder(made, tmp_path)
    assert {rung: n["samples"] for rung, n in numbers.items()} == {
        "raw": 21, "rejection": 13, "rejection_rebuilt": 11, "refined_old_chain": 21, "refined_rebuilt": 17,
    }  # fmt: skip
    # Of the 13 that are right at once, 2 have no chain: 2 × (4 + 8) tokens, and 11 × (4 + 4).
    assert numbers["raw"]["tokens_per_sample"] == 88 / 21
    assert numbers["rejection"]["tokens_per_sample"] == 88 / 13
    assert numbers["rejection_rebuilt"]["tokens_per_sample"] == (88 + 11 * 8 + 2 * 12) / 11
    assert numbers["refined_old_chain"]["tokens_per_sample"] == (88 + 64) / 21
    assert numbers["refined_rebuilt"]["tokens_per_sample"] == 336 / 17
    assert json.loads((tmp_path / "ladder.json").read_text()) == numbers
    by_rung = {rung: {r["id"]: r["messages"][-1] for r in lines_of(tmp_path / f"{rung}.jsonl")} for rung in RUNGS}
    assert by_rung["raw"]["3"] == {"role": "assistant", "content": "8"}
    assert "3" not in by_rung["rejection"]
    assert by_rung["refined_old_chain"]["3"] == {"role": "assistant", "content": "7"}
    assert by_rung["refined_rebuilt"]["3"] == {"role": "assistant", "reasoning_content": "3 + 4 = 7", "content": "7"}


def test_a_raw_sample_costs_the_mean_of_the_candidates() -> None:
    history = History(
        make_task(), calls={"teacher": 2, "student": 2}, tokens={"teacher": 30, "student": 10, "score": 9}
    )
    assert rung_tokens(history)["raw"] == 10
    assert rung_tokens(History(make_task()))["raw"] == 0


# Show ----------------------------------------------------------------------------------------------------------------


def shown_history(task_id: str = "1", source: str = "sums") -> History:
    drafts = [
        Draft("teacher-0", "think [red]", "<b>six</b>", "stop", "wrong", {"correctness": 0.0},
              critiques=[Critique(1, "six", "It is [/] wrong.", "Write five.")]),
        Draft("teacher-1", "", "", "length"),
        Draft("round1-0", "", "fi\x1b[31mve", "stop", "correct", {"correctness": 1.0}, 1.0, True, critiques=[]),
    ]  # fmt: skip
    chains = [
        Chain("chain one", "outline one", "6", "its own answer is another"),
        Chain("chain two", "", "5", lexical=0.5),
    ]
    task = make_task(f"What is <i>2 + 3</i>, {source}?", id=task_id, source=source)
    return History(task, ["It is right."], drafts, 2, 1, chains, tokens={"teacher": 4})


def write_histories(folder: Path, *histories: History) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "histories.jsonl").write_text("".join(json.dumps(h.as_json()) + "\n" for h in histories))


def test_a_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_histories(tmp_path, shown_history())
    assert list(read_histories(tmp_path)) == [shown_history()]
    with pytest.raises(ValueError, match=r"^nowhere has no histories.jsonl; data.refine writes it when it has gone"):
        list(read_histories(Path("nowhere")))


def printed(folder: Path, task_id: str) -> str:
    out = io.StringIO()
    show(folder, task_id, Console(file=out, width=100, color_system=None))
    return out.getvalue()


def test_everything_of_a_history_is_printed_and_no_text_is_obeyed(tmp_path: Path) -> None:
    write_histories(tmp_path, shown_history("1", "a"), shown_history("2"), shown_history("1", "b"))
    text = printed(tmp_path, "1")
    for part in (
        "It is right.", "teacher-0", "think [red]", "<b>six</b>", "✗ item 1, six: It is [/] wrong. → Write five.",
        "teacher-1", "(no answer)", "round1-0", r"fi\x1b[31mve", "the critic finds no problem", "chain one",
        "outline one", "its own answer is another", "chain two", "→ 5", "lexical anchoring 0.50", "tokens: teacher 4",
    ):  # fmt: skip
        assert part in text, part
    assert "\x1b" not in text
    assert "3</i>, a?" in text and "3</i>, b?" in text  # two sources have the id
    with pytest.raises(ValueError, match=r"has no instruction '3'; it has 1, 2, 1$"):
        printed(tmp_path, "3")
    write_histories(tmp_path, *(shown_history(str(n)) for n in range(1000)))
    with pytest.raises(ValueError, match=r"it has 0, 1, 2 and 997 more$"):
        printed(tmp_path, "x")


def test_the_page_has_every_draft_and_its_html_is_escaped(tmp_path: Path) -> None:
    write_histories(tmp_path, shown_history())
    write_page(tmp_path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for part in (
        "teacher-0", "think [red]", "&lt;b&gt;six&lt;/b&gt;", "It is [/] wrong. → Write five.", "teacher-1", "round1-0",
        "the critic finds no problem", "chain one", "outline one", "its own answer is another", "chain two", "→ 5",
        "2 + 3&lt;/i&gt;",
    ):  # fmt: skip
        assert part in page, part
    assert "<b>six" not in page and "<i>" not in page


@pytest.mark.parametrize(
    ("revised", "direct", "shown"), [(9, 9, (2, 2)), (1, 9, (1, 3)), (9, 1, (3, 1)), (1, 1, (1, 1))]
)
def test_half_of_a_page_has_revisions_where_there_are_enough(
    tmp_path: Path, revised: int, direct: int, shown: tuple[int, int]
) -> None:
    histories = [History(make_task(id=f"{rounds}-{n}"), rounds=rounds)
                 for rounds, count in ((0, direct), (1, revised)) for n in range(count)]  # fmt: skip
    write_histories(tmp_path, *histories)
    write_page(tmp_path, tmp_path / "page.html", samples=4)
    page = (tmp_path / "page.html").read_text()
    assert (page.count("<h2>1-"), page.count("<h2>0-")) == shown


def test_the_command_shows_a_history_and_writes_a_page(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--output", str(made), "--show", "3", "--page", str(tmp_path / "page.html")])
    out = capsys.readouterr().out
    assert "Add 3 and 4." in out and out.endswith(f"{tmp_path / 'page.html'}\n")
    assert (tmp_path / "page.html").read_text().count("<article>") == 22
    for arguments, problem in (
        (["--output", str(made), "--show", "x"], f"{made} has no instruction 'x'; it has 0, 1, 2 and 19 more"),
        (["--output", str(tmp_path), "--show", "1"], f"{tmp_path} has no histories.jsonl; data.refine writes it when"),
    ):
        with pytest.raises(SystemExit, match=f"^error: {re.escape(problem)}"):
            main(arguments)
