"""Records for a refiner and a writer of chains: what they ask, and by hand what they answer."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.refine.drafts import Draft
from data.refine.parse import read_critiques, read_line_critiques, read_tagged
from data.refine.plan import Reconstruction, RefinePlan
from data.refine.prompts import read_prompts
from data.refine.train_data import Worked, corrupt, first_wrong_line, main, make_records, outline_of, read_worked
from tests.data.refine.harness import make_plan, make_task, reply, role_of

ANSWER = Draft("worked", "2 + 3 = 5\n5 + 1 = 6", "Answer: 6", "stop")
WORKED = Worked(make_task("2 + 3 + 1?", "6", id="sums/1"), ANSWER)
REPLAYED = make_plan(reconstruct=Reconstruction(line_checks={"sums": "equations"}))


def draft(reasoning: str, content: str = "Answer: 6") -> Draft:
    return Draft("student-0", reasoning, content, "stop")


@pytest.mark.parametrize(
    ("reasoning", "content", "compared", "replayed"),
    [
        ("2 + 3 = 5\n5 + 1 = 6", "Answer: 6", None, None),
        ("2 + 3 = 6\n6 + 1 = 7", "Answer: 7", 0, 0),
        ("2 + 3 = 5\n5 + 1 = 7", "Answer: 7", 1, 1),
        ("2 + 3 = 5\n\n5 + 1 = 7", "Answer: 7", 1, 1),  # blank lines are no lines
        ("2 + 3 = 5\n5 + 1 = 6", "Answer: 7", 2, 2),
        ("1 + 3 = 4\n4 + 2 = 6", "Answer: 6", 0, None),  # right in other words
        ("1 + 3 = 4\n4 + 2 = 6", "Answer: 5", 0, 2),
        ("2 + 3 = 5", "Answer: 6", None, None),
        ("", "Answer: 6", None, None),
        ("", "Answer: 5", 0, 0),
        ("", "Answer:   6\n", None, None),
        ("", "Answer: 6\nOr 7.", 1, 1),
    ],
)
def test_the_first_wrong_line(reasoning: str, content: str, compared: int | None, replayed: int | None) -> None:
    assert first_wrong_line(draft(reasoning, content), WORKED, make_plan()) == compared
    assert first_wrong_line(draft(reasoning, content), WORKED, REPLAYED) == replayed


def test_an_answer_that_comes_before_its_lines_is_wrong_where_it_comes() -> None:
    plan = make_plan(reconstruct=Reconstruction(line_checks={"sums": "sorting"}))
    sort = Worked(make_task("Sort cab", "abc", id="sums/1"), Draft("worked", "a cb\nb c\nc", "abc", "stop"))
    assert first_wrong_line(draft("a cb\nb c\nc", "abc"), sort, plan) is None
    assert first_wrong_line(draft("a cb\nb c", "abc"), sort, plan) == 2


def test_an_answer_whose_end_is_missing_is_wrong_in_its_last_line() -> None:
    worked = Worked(make_task(id="sums/1"), Draft("worked", "", "one\ntwo\nthree", "stop"))
    assert first_wrong_line(draft("", "one\ntwo"), worked, make_plan()) == 1


def test_an_outline_has_the_shape_of_lines_and_none_of_their_contents() -> None:
    assert outline_of("7 + 5 = 12\n12 / 4 = 3") == "n + n = n\nn / n = n"
    assert outline_of("a cb\nb c\nc") == "w w x2\nw"
    assert outline_of("Add 17, then\n\n\nstop") == "w n , w\nw"


def test_a_corruption_stays_within_a_line() -> None:
    rng, changed = random.Random(0), Counter()
    for _ in range(500):
        lines = corrupt(ANSWER, rng).lines
        assert len(lines) in (2, 3)  # a line of one character may be left without any
        if len(lines) == 3:
            changed[tuple(i for i in range(3) if lines[i] != ANSWER.lines[i])] += 1
    assert set(changed) == {(), (0,), (1,), (2,)}
    assert 0.15 < changed[()] / 500 < 0.35  # a fifth is left right, and a letter may be replaced by itself


def records(
    plan: RefinePlan, drafts: list[Draft], n: int = 300, worked: Worked = WORKED
) -> list[tuple[str, list[Any]]]:
    prompts = read_prompts(plan.language, plan.prompts, plan.critiques)
    return list(make_records([worked], {worked.task.key: drafts}, plan, prompts, n, random.Random(0)))


def test_a_critique_names_the_place_and_the_worked_line() -> None:
    wrong = draft("2 + 3 = 5\n5 + 1 = 7", "Answer: 7")
    made = [messages for kind, messages in records(make_plan(), [wrong]) if kind == "critique"]
    of_student = [m for m in made if "5 + 1 = 7\n" in m[0]["content"] and "Answer: 7" in m[0]["content"]]
    assert 0.5 < len(of_student) / len(made) < 0.7
    for messages in of_student:
        (critique,) = read_critiques(reply(messages[1]["content"]), wrong, 0)
        assert (critique.where, critique.fix) == ("5 + 1 = 7", "It is: 5 + 1 = 6")


def test_a_fix_does_not_quote_a_line_of_another_way() -> None:
    other = draft("1 + 3 = 4\n4 + 2 = 7", "Answer: 7")
    made = [messages for kind, messages in records(REPLAYED, [other]) if kind == "critique"]
    fixes = {m[1]["content"] for m in made if "4 + 2 = 7" in m[0]["content"]}
    assert len(fixes) == 1
    (critique,) = read_critiques(reply(fixes.pop()), other, 0)
    assert (critique.where, critique.fix) == ("4 + 2 = 7", "Work it out again.")


def test_every_record_is_what_the_command_asks_and_reads() -> None:
    plan = make_plan()
    made = records(plan, [draft("2 + 3 = 6", "Answer: 7")])
    assert {kind for kind, _ in made} == {"critique", "revise", "skeleton", "chain"}
    for kind, (asked, answered) in made:
        assert role_of(asked["content"]) == kind
        assert answered["role"] == "assistant"
        said = reply(answered["content"])
        if kind == "critique":
            read_critiques(said, ANSWER, 0)
        elif kind == "revise":
            assert (answered["content"], answered["reasoning_content"]) == (ANSWER.content, ANSWER.reasoning)
        elif kind == "skeleton":
            assert read_tagged(said, ["skeleton"]) == {"skeleton": outline_of(ANSWER.reasoning)}
        else:
            parts = ["summary"] if "<outline>" not in asked["content"] else []
            read = read_tagged(said, [*parts, "chain", "answer"])
            assert (read["chain"], read["answer"]) == (ANSWER.reasoning, ANSWER.content)
    share = Counter(kind for kind, _ in made)
    assert share["revise"] > share["critique"] > share["chain"] > share["skeleton"]


def test_line_critiques_are_signs_of_the_draft_that_is_shown() -> None:
    plan = make_plan(critiques="lines", language="compact")
    for kind, (asked, answered) in records(plan, [draft("2 + 3 = 5\n5 + 1 = 7", "Answer: 7")]):
        if kind == "critique":
            shown = draft("", asked["content"].split("\n", 1)[1])
            critiques = read_line_critiques(reply(answered["content"]), shown, 0)
            assert (critiques == []) == (shown.lines == ANSWER.lines)


def test_an_answer_out_of_sight_is_not_shown_to_the_writer() -> None:
    plan = make_plan(reconstruct=Reconstruction(answer_in_sight=False))
    chains = [messages for kind, messages in records(plan, []) if kind == "chain"]
    assert chains and not any("Answer: 6" in messages[0]["content"] for messages in chains)


# The command ---------------------------------------------------------------------------------------------------------


def write_worked(path: Path, n: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i in range(n):
            answer = {"role": "assistant", "reasoning_content": f"{i} + 1 = {i + 1}", "content": f"It is\u2028{i + 1}"}
            messages = [{"role": "user", "content": f"{i} + 1?"}, answer]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def test_the_command_writes_what_prepare_takes_and_the_same_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worked, out = write_worked(tmp_path / "in/sums.jsonl"), tmp_path / "out"
    arguments = ["--worked", str(worked), "--output", str(out), "--records", "50"]
    main(arguments)
    written = (out / "sums.jsonl").read_bytes()
    assert len(written.splitlines()) == 50
    assert f"{out / 'sums.jsonl'}: " in capsys.readouterr().out
    main(arguments)
    assert (out / "sums.jsonl").read_bytes() == written
    assert len(read_worked(out / "sums.jsonl")) == 50  # conversations that end in an answer


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("no", ":1: no conversation: "),
        ("[1]", ":1: no conversation: messages are not a list"),
        ('{"text": "a"}', ":1: no conversation: messages are not a list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', ":1: it does not end in an assistant's answer with text"),
        ("\n", " holds no worked answer"),
    ],
)
def test_a_line_that_is_no_worked_answer(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError) as error:
        read_worked(path)
    assert str(error.value).startswith(f"{path}{problem}")


def test_no_file_is_replaced_by_another(tmp_path: Path) -> None:
    one, two = write_worked(tmp_path / "a/sums.jsonl"), write_worked(tmp_path / "b/sums.jsonl")
    before = one.read_bytes()
    with pytest.raises(
        SystemExit, match=r"is the folder of .*sums.jsonl, which would be replaced; name another folder"
    ):
        main(["--worked", str(one), "--output", str(tmp_path / "a")])
    assert one.read_bytes() == before
    with pytest.raises(SystemExit, match=rf"^error: --output {two} is no folder$"):
        main(["--worked", str(one), "--output", str(two)])
    with pytest.raises(SystemExit, match="--worked names 2 files that are called sums; the name is their source"):
        main(["--worked", str(one), str(two), "--output", str(tmp_path / "out")])
