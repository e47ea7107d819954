"""The loop: calls and rounds counted by hand, with engines that answer by a script."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.calls.call import Failure
from data.refine.asking import RETRY_TEMPERATURE, TRIES
from data.refine.drafts import Chain, Draft, History
from data.refine.loop import FAILED_CANDIDATES, NOT_PASSED
from data.refine.make import sample_of
from data.refine.plan import Dimension, RefinePlan
from data.refine.tournament import choose
from nb_lightning.rewards.tasks import Task
from nb_lightning.text.messages import ChatError
from tests.data.refine.harness import (
    APPROVAL,
    Line,
    Scripted,
    make_plan,
    make_refinement,
    make_task,
    problems,
    reply,
    scores,
)

BOTH = {"correctness": Dimension(4, 1, "verifier"), "format": Dimension(1, 0.5), "safety": Dimension(1, 0.8)}


def refine(tmp_path: Path, plan: RefinePlan, verifier: str = "exact", **lines: Line) -> tuple[History, Scripted]:
    engine, task = Scripted(**lines), make_task(verifier=verifier)
    refinement, _, caller = make_refinement(tmp_path, plan, [task], engine)
    (history,) = refinement.refine([task])
    summary = caller.summary()
    replies = {role: n["calls"] - n["failed"] for role, n in summary["roles"].items()}
    assert history.calls == {role: n for role, n in replies.items() if n}
    assert sum(history.tokens.values()) == summary["completion_tokens"]
    return history, engine


def test_a_right_candidate_needs_no_other_call(tmp_path: Path) -> None:
    history, engine = refine(tmp_path, make_plan(k=3), candidate=["6", "5", "5"])
    assert engine.counts == {"candidate": 3}
    assert [d.name for d in history.drafts] == ["teacher-0", "teacher-1", "teacher-2"]
    assert [d.passed for d in history.drafts] == [False, True, True]
    assert (history.best, history.rounds, history.dropped) == (1, 0, "")
    assert history.calls == {"teacher": 3} and history.tokens == {"teacher": 12}


def test_a_wrong_draft_is_criticised_and_revised_until_it_is_right(tmp_path: Path) -> None:
    plan = make_plan(rounds=5, patience=5)
    history, engine = refine(tmp_path, plan, candidate="6", critique=problems("It is not 6."), revise=["7", "8", "5"])
    # Of drafts that are equally wrong the next round goes on from the last one, with critiques of its own.
    assert engine.counts == {"candidate": 1, "critique": 3, "revise": 3}
    assert [f"<draft>\n{answer}\n</draft>" in prompt for answer, prompt in zip("678", engine.prompts["revise"])] == [
        True
    ] * 3
    assert [d.name for d in history.drafts] == ["teacher-0", "round1-0", "round2-0", "round3-0"]
    assert (history.best, history.rounds, history.dropped) == (3, 3, "")
    assert "It is not 6." in engine.prompts["revise"][0]
    assert "The task's checker says: wrong." in engine.prompts["critique"][0]


@pytest.mark.parametrize(("rounds", "patience", "revisions"), [(4, 1, 1), (4, 2, 2), (4, 9, 4), (2, 9, 2), (0, 1, 0)])
def test_rounds_and_patience(tmp_path: Path, rounds: int, patience: int, revisions: int) -> None:
    plan = make_plan(rounds=rounds, patience=patience)
    history, engine = refine(tmp_path, plan, candidate="6", critique=APPROVAL, revise="7")
    assert engine.counts["revise"] == history.rounds == revisions
    assert engine.counts["critique"] == revisions
    assert history.dropped == NOT_PASSED


def test_a_better_draft_is_criticised_anew_and_resets_the_patience(tmp_path: Path) -> None:
    dimensions = {"format": Dimension(1, 0.9)}
    history, engine = refine(
        tmp_path, make_plan(dimensions, rounds=4, patience=1), candidate="a", revise=["b", "c", "d"],
        critique=problems("Ugly."), score=[scores(format=n) for n in (3, 5, 7, 7)],
    )  # fmt: skip
    assert engine.counts == {"candidate": 1, "score": 4, "critique": 3, "revise": 3}
    assert [d.total for d in history.drafts] == [0.3, 0.5, 0.7, 0.7]
    assert (history.best, history.rounds, history.dropped) == (3, 3, NOT_PASSED)  # the last of two at .7
    assert [d.critiques is not None for d in history.drafts] == [True, True, True, False]


def test_the_verifier_decides_correctness_and_the_model_scores_what_it_lets_pass(tmp_path: Path) -> None:
    history, engine = refine(
        tmp_path, make_plan(BOTH, k=3, rounds=0), candidate=["6", "5", "5"],
        score=[scores(format=4, safety=9), scores(format=10, safety=8)],
    )  # fmt: skip
    assert engine.counts == {"candidate": 3, "score": 2}
    assert "correctness" not in engine.prompts["score"][0]
    assert [d.scores for d in history.drafts] == [
        {"correctness": 0.0},
        {"correctness": 1.0, "format": 0.4, "safety": 0.9},
        {"correctness": 1.0, "format": 1.0, "safety": 0.8},
    ]
    assert [d.total for d in history.drafts] == pytest.approx([0, (4 + 0.4 + 0.9) / 6, (4 + 1 + 0.8) / 6])
    assert [d.passed for d in history.drafts] == [False, False, True]
    assert history.best == 2


def test_a_right_draft_is_better_than_a_wrong_one_whatever_the_model_thinks_of_it(tmp_path: Path) -> None:
    plan = make_plan({**BOTH, "correctness": Dimension(1, 1, "verifier")}, k=2, rounds=0)
    history, _ = refine(tmp_path, plan, candidate=["6", "5"], score=scores(format=0, safety=1))
    assert [d.total for d in history.drafts] == pytest.approx([0, 1.1 / 3])
    assert history.best == 1


def test_scores_that_cannot_be_read_do_not_pass(tmp_path: Path) -> None:
    history, engine = refine(tmp_path, make_plan(BOTH, rounds=0), candidate="5", score="ten of ten")
    assert engine.counts["score"] == TRIES == history.calls["score"]
    assert history.drafts[0].scores == {"correctness": 1.0}
    assert history.drafts[0].total == pytest.approx(4 / 6)
    assert history.dropped == NOT_PASSED


def test_without_a_reference_the_critic_judges_everything(tmp_path: Path) -> None:
    history, engine = refine(
        tmp_path,
        make_plan(BOTH),
        verifier="preference",
        candidate="6",
        score=scores(correctness=10, format=9, safety=9),
    )
    assert engine.counts == {"candidate": 1, "score": 1}
    assert history.drafts[0].status == "" and history.checklist == []
    assert history.drafts[0].total == pytest.approx((4 + 0.9 + 0.9) / 6)
    assert history.passed


def test_the_checklist_begins_with_the_verifiers_item(tmp_path: Path) -> None:
    said = '{"items": ["It is short."]}'
    plan = make_plan(checklist=True, rounds=1)
    history, engine = refine(tmp_path, plan, checklist=said, candidate="6", critique=APPROVAL, revise="5")
    assert history.checklist == ["The result is right. (The task's own checker decides this.)", "It is short."]
    assert f"1. {history.checklist[0]}\n2. It is short.\n" in engine.prompts["critique"][0]
    (tmp_path / "zh").mkdir()
    history, _ = refine(tmp_path / "zh", make_plan(checklist=True, language="zh"), candidate="5")
    assert history.checklist == ["结果正确。（由题目的检验程序判定。）"]


def test_items_of_critiques_count_the_verifiers_item(tmp_path: Path) -> None:
    said = '{"problems": [{"item": 2, "where": "6", "problem": "p", "fix": "f"}]}'
    history, _ = refine(
        tmp_path, make_plan(checklist=True, rounds=1), checklist='{"items": ["It is short."]}', candidate="6",
        critique=said, revise="5",
    )  # fmt: skip
    assert history.drafts[0].critiques and history.drafts[0].critiques[0].item == 2


def test_a_place_that_reads_like_a_lines_is_the_critics_own_word(tmp_path: Path) -> None:
    said = '{"problems": [{"item": null, "where": "line 3 and on", "problem": "p", "fix": "f"}]}'
    history, engine = refine(tmp_path, make_plan(rounds=1), candidate="6", critique=said, revise="5")
    assert "1. line 3 and on: p To fix it: f" in engine.prompts["revise"][0]
    assert history.passed


def test_a_critique_that_cannot_be_read_is_asked_twice_and_the_draft_revised_all_the_same(tmp_path: Path) -> None:
    plan = make_plan(rounds=3, patience=3)
    history, engine = refine(tmp_path, plan, candidate="6", critique="Looks good!", revise=["7", "8", "5"])
    assert engine.counts == {"candidate": 1, "critique": 3 * TRIES, "revise": 3}
    assert history.drafts[0].critiques is None
    assert "None is listed, but the task's checker refuses the draft: wrong." in engine.prompts["revise"][0]
    # The second try is another call: warmer, and with a number of its own.
    first, second, *_ = (call for call in engine.calls if "Find what is wrong" in call.messages[0]["content"])
    assert (first.number, second.number) == (0, 1)
    assert (first.sampling.temperature, second.sampling.temperature) == (1.0, 1.0)
    assert RETRY_TEMPERATURE == 0.7


def test_a_greedy_call_is_asked_again_warmer(tmp_path: Path) -> None:
    plan = make_plan(rounds=1)
    plan.sampling.critique.temperature = 0.0
    _, engine = refine(tmp_path, plan, candidate="6", critique=["?", APPROVAL], revise="5")
    temperatures = [c.sampling.temperature for c in engine.calls if "Find what" in c.messages[0]["content"]]
    assert temperatures == [0.0, 0.7]


def test_line_critiques_are_shown_as_signs(tmp_path: Path) -> None:
    engine = Scripted()
    plan = make_plan(language="compact", critiques="lines", rounds=1)
    replies = {"Check 2 + 3 = ?\n6": "6 -", "Mend 2 + 3 = ?\n6\n6 -": "5", "2 + 3 = ?": "6"}
    engine.lines["candidate"] = replies.__getitem__
    task = make_task()
    refinement, _, _ = make_refinement(tmp_path, plan, [task], engine)
    (history,) = refinement.refine([task])
    assert [d.content for d in history.drafts] == ["6", "5"] and history.passed


def test_candidates_that_are_no_answer(tmp_path: Path) -> None:
    said = [reply("5", "length"), "", reply("<think>\nhm", "length"), Failure("no answer")]
    history, engine = refine(tmp_path, make_plan(k=4), candidate=said)
    assert engine.counts == {"candidate": 4}
    assert [(d.finish, d.passed, d.scores) for d in history.drafts] == [
        ("length", False, {}), ("stop", False, {}), ("length", False, {}),
    ]  # fmt: skip
    assert history.calls == {"teacher": 3}  # the fourth got no reply
    assert (history.best, history.dropped) == (None, FAILED_CANDIDATES)


def test_a_tasks_tools_reach_who_answers_and_are_shown_to_who_judges(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    wanted = {"name": "add", "arguments": {"a": 2}}
    task = make_task("Use add.", [wanted], "tool_call", tools=tools)
    called = reply("", "tool_calls", tool_calls=[{"id": "1", "type": "function", "function": wanted}])
    engine = Scripted(candidate="It is 5.", critique=APPROVAL, revise=called)
    refinement, _, _ = make_refinement(tmp_path, make_plan(rounds=1), [task], engine)
    (history,) = refinement.refine([task])
    assert [(d.status, d.passed) for d in history.drafts] == [("no_answer", False), ("correct", True)]
    assert [call.tools for call in engine.calls] == [tools, None, tools]
    assert '"name": "add"' in engine.prompts["critique"][0]
    history.chains.append(Chain("add"))
    assert sample_of(history, {})["tools"] == tools


def test_two_tasks_with_one_id_are_two_tasks(tmp_path: Path) -> None:
    tasks = [make_task(id="1", source=source) for source in ("a", "b")]
    engine = Scripted(candidate=["5", "6"])
    refinement, _, _ = make_refinement(tmp_path, make_plan(rounds=0), tasks, engine)
    assert [h.drafts[0].content for h in refinement.refine(tasks)] == ["5", "6"]
    assert len({call.seed for call in engine.calls}) == 2


def test_candidates_come_from_every_engine(tmp_path: Path) -> None:
    task = make_task()
    critic, teacher, student = Scripted("c"), Scripted("t", candidate="6"), Scripted("s", candidate="5")
    refinement, _, _ = make_refinement(tmp_path, make_plan(k=2), [task], critic, teacher)
    object.__setattr__(refinement.engines, "candidates", {"teacher": teacher, "student": student})
    (history,) = refinement.refine([task])
    assert [d.name for d in history.drafts] == ["teacher-0", "teacher-1", "student-0", "student-1"]
    assert history.best == 2 and critic.calls == []


# Tournament ----------------------------------------------------------------------------------------------------------


TOOLS = [{"type": "function", "function": {"name": "f"}}]


class Preferring:
    """A reward model that prefers longer texts, by the ratio of their lengths."""

    context = 100

    def read(self, messages: object, text: str, tools: object) -> list[int]:
        assert tools == TOOLS
        if text == "unreadable":
            raise ChatError("no")
        return [0] * len(text)

    def compare(self, messages: object, pairs: list[tuple[str, str]], tools: object) -> list[float]:
        assert tools == TOOLS
        return [len(a) / (len(a) + len(b)) for a, b in pairs]


def test_a_tournament_takes_the_most_expected_wins() -> None:
    def chosen(*texts: str) -> int | None:
        task = Task("t", "s", [], "exact", "", TOOLS)
        return choose(Preferring(), task, [Draft("", "", text, "stop") for text in texts])  # type: ignore[arg-type]

    assert chosen("a", "bbb", "cc") == 1
    assert chosen("aa", "bb") == 0  # equal: the first
    assert chosen("a", "b" * 50) == 1
    assert chosen("a", "b" * 51) is None  # two such are longer than the context
    assert chosen("a", "unreadable") is None


def test_a_tournament_is_among_drafts_that_pass(tmp_path: Path) -> None:
    seen = []

    def tournament(task: object, drafts: object) -> int | None:
        seen.append([d.name for d in drafts])  # type: ignore[attr-defined]
        return 1 if len(seen) == 1 else None

    task = make_task()
    for best in (3, 1):
        engine = Scripted(candidate=["6", "5", "6", "5"])
        refinement, _, _ = make_refinement(tmp_path / str(best), make_plan(k=4), [task], engine, tournament=tournament)
        (history,) = refinement.refine([task])
        assert history.best == best
    assert seen == [["teacher-1", "teacher-3"]] * 2
