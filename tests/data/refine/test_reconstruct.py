"""Chains of thought that are rebuilt: which are refused and why, and how much they lean on the answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.refine.anchoring import AnchoringModel, conclusion, contains_answer, lexical_anchoring
from data.refine.drafts import Draft, History
from data.refine.plan import Reconstruction as Settings
from data.refine.reconstruct import LEAKED, NO_CHAIN, NO_SKELETON, Reconstruction
from tests.data.refine.harness import (
    SKELETON,
    Line,
    Scripted,
    chain,
    make_plan,
    make_refinement,
    make_task,
    save_chat_model,
)

RIGHT = chain("2 + 3 = 5", "5")
MARK = "Answer:"


def history_of(content: str = "5", reasoning: str = "", reward: float = 1.0, **task: Any) -> History:
    draft = Draft("teacher-0", reasoning, content, "stop", "correct", {"correctness": reward}, reward, True)
    return History(make_task(**task), drafts=[draft], best=0)


def reconstruct(
    tmp_path: Path, history: History, settings: Settings | None = None, **lines: Line
) -> tuple[Scripted, Reconstruction]:
    plan = make_plan(reconstruct=settings or Settings())
    engine = Scripted(**{"skeleton": SKELETON, **lines})
    _, reconstruction, _ = make_refinement(tmp_path, plan, [history.task], engine)
    reconstruction.reconstruct([history])
    return engine, reconstruction


def problem(tmp_path: Path, said: str, settings: Settings | None = None, **history: Any) -> str:
    subject = history_of(**history)
    reconstruct(tmp_path, subject, settings, chain=said)
    assert subject.dropped == (f"chain: {subject.chains[-1].problem}" if subject.chains[-1].problem else "")
    return subject.chains[-1].problem


def test_a_chain_follows_a_skeleton_that_does_not_have_the_answer(tmp_path: Path) -> None:
    history = history_of()
    engine, _ = reconstruct(tmp_path, history, chain=RIGHT)
    assert engine.counts == {"skeleton": 1, "chain": 1}
    (made,) = history.chains
    assert (made.reasoning, made.own_answer, made.problem) == ("2 + 3 = 5", "5", "")
    assert made.skeleton == "1. Take both numbers.\n2. Add them."
    assert f"<outline>\n{made.skeleton}\n</outline>" in engine.prompts["chain"][0]
    assert "<final_answer>\n5\n</final_answer>" in engine.prompts["chain"][0]
    assert history.calls == {"skeleton": 1, "chain": 1} and history.dropped == ""


def test_the_answer_may_be_out_of_sight(tmp_path: Path) -> None:
    engine, _ = reconstruct(tmp_path, history_of(content="555", reference="555"), Settings(answer_in_sight=False),
                            chain=chain("add", "555"))  # fmt: skip
    assert "555" in engine.prompts["skeleton"][0]
    assert "555" not in engine.prompts["chain"][0]


def test_plain_chains_have_a_summary_and_no_skeleton(tmp_path: Path) -> None:
    history = history_of()
    said = f"<summary>Add.</summary>\n{RIGHT}"
    engine, _ = reconstruct(tmp_path, history, Settings(mode="plain"), chain=said)
    assert engine.counts == {"chain": 1}
    assert (history.chains[0].skeleton, history.chains[0].reasoning) == ("Add.", "2 + 3 = 5")
    assert problem(tmp_path / "2", RIGHT, Settings(mode="plain")) == NO_CHAIN


def test_without_reconstruction_the_drafts_own_reasoning_stays(tmp_path: Path) -> None:
    history = history_of(reasoning="The expected answer is 5.")
    engine, _ = reconstruct(tmp_path, history, Settings(mode="none"))
    assert engine.calls == [] and history.chains[0].reasoning == "The expected answer is 5." and not history.dropped
    assert problem(tmp_path / "2", "", Settings(mode="none")) == "too short"
    assert problem(tmp_path / "3", "", Settings(mode="none", min_chain_chars=0)) == ""


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (chain("2 + 3 = 6", "6"), "its own answer is another"),
        (chain("2 + 3 = 5", " 5 "), ""),
        (chain("As the given answer says, it is 5.", "5"), "it speaks of an answer that was given"),
        (chain("The Outline says to add: 5", "5"), "it speaks of an answer that was given"),
        (chain("给定答案是 5。", "5"), "it speaks of an answer that was given"),
        (chain("", "5"), NO_CHAIN),
        ("2 + 3 = 5", NO_CHAIN),
    ],
)
def test_checks(tmp_path: Path, said: str, why: str) -> None:
    assert problem(tmp_path, said) == why


def test_a_task_may_speak_of_a_given_answer(tmp_path: Path) -> None:
    said = chain("The given answer is 5, and 2 + 3 = 5.", "yes")
    assert problem(tmp_path, said, content="yes", question="Is the given answer 5 right?", reference="yes") == ""


def test_the_own_answer_may_be_written_in_another_way_if_the_verifier_takes_it(tmp_path: Path) -> None:
    refined: dict[str, Any] = dict(content="\\boxed{0.5}", verifier="math", reference="1/2")
    assert problem(tmp_path, chain("half", "\\boxed{\\frac{1}{2}}"), **refined) == ""
    assert problem(tmp_path / "2", chain("half", "\\boxed{0.6}"), **refined) == "its own answer is another"


@pytest.mark.parametrize(
    "own, says, problem",
    [
        ("Answer: a rose", None, ""),  # the same letters: nobody is asked
        ("a rose", None, ""),
        ("it is a rose", '{"same": true}', ""),
        ("a tulip", '{"same": false}', "its own answer is another"),
        ("a tulip", "yes", "its own answer is another"),  # not readable, twice
    ],
)
def test_without_a_verifier_the_critic_says_whether_the_own_answer_is_the_refined_one(
    tmp_path: Path, own: str, says: str | None, problem: str
) -> None:
    history = history_of(content="Let us see.\nAnswer: a  rose", verifier="preference", reference=None)
    engine = Scripted(skeleton=SKELETON, chain=chain("it is", own), **({"same": says} if says else {}))
    _, reconstruction, _ = make_refinement(tmp_path, make_plan(), [history.task], engine)
    reconstruction.reconstruct([history])
    assert history.chains[0].problem == problem
    assert engine.counts["same"] == {None: 0, "yes": 2}.get(says, 1)


def test_an_answer_of_partial_credit_needs_no_full_credit_of_its_chain(tmp_path: Path) -> None:
    class Half:
        def score(self, prompt: str, completions: list[str], reference: Any) -> list[Any]:
            from nb_lightning.rewards.verifier import Score

            return [Score(float(text.split()[-1]), {"status": "wrong"}) for text in completions]

    for own, why in (("0.5", ""), ("0.7", ""), ("0.4", "its own answer is another")):
        history = history_of(content="about 0.5", reward=0.5)
        plan, engine = make_plan(), Scripted(skeleton=SKELETON, chain=chain("so", own))
        _, reconstruction, _ = make_refinement(tmp_path / own, plan, [history.task], engine)
        replace(reconstruction, verifiers={"exact": Half()}).reconstruct([history])  # type: ignore[dict-item]
        assert history.chains[0].problem == why


def test_lines_are_replayed_of_every_chain_that_is_written(tmp_path: Path) -> None:
    settings = Settings(line_checks={"sums": "equations"}, attempts=3)
    history = history_of()
    reconstruct(tmp_path, history, settings, chain=[
        chain("2 + 3 = 6\nso 6", "6"), chain("2 + 3 = 6\n6 - 1 = 5\nhence 5", "5"), chain("2 + 3 = 5\n5 = 5", "5"),
    ])  # fmt: skip
    assert [(c.problem, c.lines_valid, c.lines_checked) for c in history.chains] == [
        ("a line does not hold", 0, 1), ("a line does not hold", 1, 2), ("", 1, 1),
    ]  # fmt: skip
    assert history.dropped == ""


def test_a_leaked_skeleton_is_refused_before_a_chain_is_paid_and_another_is_tried(tmp_path: Path) -> None:
    history = history_of()
    leaked = "<skeleton>\n1. Add.\n2. So it is 5.\n</skeleton>"
    engine, _ = reconstruct(tmp_path, history, Settings(attempts=2), skeleton=[leaked, SKELETON], chain=RIGHT)
    assert [c.problem for c in history.chains] == [LEAKED, ""]
    assert engine.counts == {"skeleton": 2, "chain": 1}
    first, second = (c for c in engine.calls if "Outline how" in c.messages[0]["content"])
    assert first.seed != second.seed and second.sampling.temperature >= 0.7

    dropped = history_of()
    reconstruct(tmp_path / "2", dropped, skeleton=leaked)
    assert dropped.dropped == f"chain: {LEAKED}"
    unreadable = history_of()
    reconstruct(tmp_path / "3", unreadable, skeleton="1. Add.")
    assert unreadable.dropped == f"chain: {NO_SKELETON}"


def test_only_histories_that_passed_get_a_chain(tmp_path: Path) -> None:
    history = history_of()
    history.drafts[0].passed = False
    engine, _ = reconstruct(tmp_path, history)
    assert engine.calls == [] and history.chains == []


@pytest.mark.parametrize(
    ("text", "answer", "leaks"),
    [
        ("1. Add.\n2. Check.\n3. Say it.", "3", False),  # the number of a step
        ("1) Add.\n2) Check 3.", "3", True),
        ("Step 3: combine steps 1, 2 and 3", "3", False),
        ("- **3.** Add", "3", False),
        ("第3步：相加", "3", False),
        ("The sum is 3", "3", True),
        ("The sum is 17", "7", False),
        ("Look for forty two.", "Answer: forty two", True),
        ("Look for 42.", "It is easy.\n\\boxed{42}", True),
        ("Look for the number.", "It is easy.\n\\boxed{42}", False),
        ("So def f(x): return x + 1 is it", "def f(x): return x + 1\n\nprint(f(1))", True),  # a long line
        ("Take 2.", "2", False),  # it is in the question
    ],
)
def test_whether_a_skeleton_has_the_answer(text: str, answer: str, leaks: bool) -> None:
    assert contains_answer(text, "What is 2 + x?", answer) is leaks


# Anchoring -----------------------------------------------------------------------------------------------------------


def test_lexical_anchoring_by_hand() -> None:
    question = "Who wrote it?"
    # The answer's trigrams: (a b c), (b c d). The first half of the chain, 4 words, has the first of them.
    assert lexical_anchoring(question, "x a b c y z b c d".removesuffix(" d"), f"{MARK} a b c d") == 0.5
    assert lexical_anchoring(question, "a b c d and so on x", f"{MARK} a b c d") == 1.0
    assert lexical_anchoring(question, "we work it out: a b c d", f"{MARK} a b c d") == 0.0
    assert lexical_anchoring(question, "7 is it, so the end is 7", "7") == 1.0
    assert lexical_anchoring(question, "17 is not it, so it is 7", "7") == 0.0
    assert lexical_anchoring(question, "答案为北京 因为别的原因", "北京") == 1.0
    assert lexical_anchoring("Is it 7?", "7", "7") is None  # the question has it
    assert lexical_anchoring(question, "x", "!") is None


def test_what_an_answer_comes_to() -> None:
    assert conclusion("So it is.\n\\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert conclusion("So.\nAnswer: 5").strip() == "5"
    assert conclusion("5") == "5"


def test_thresholds_refuse_and_no_threshold_only_reports(tmp_path: Path) -> None:
    early = chain("It is 5 as 2 and 3 are to be added here", "5")
    for threshold, why in ((None, ""), (1.0, ""), (0.9, "lexical anchoring above reconstruct.max_lexical")):
        history = history_of()
        reconstruct(tmp_path / str(threshold), history, Settings(max_lexical=threshold), chain=early)
        assert (history.chains[0].lexical, history.chains[0].problem) == (1.0, why)

    class Likelier:
        def anchoring(self, chains: list[Any]) -> list[float | None]:
            ((with_answer, without, reasoning),) = chains
            assert "<final_answer>\n5\n</final_answer>" in with_answer[0]["content"]
            assert without == history.task.messages and reasoning == "2 + 3 = 5"
            return [0.25]

    for threshold, why in ((None, ""), (0.25, ""), (0.2, "anchoring by probability above reconstruct.max_probability")):
        history = history_of()
        plan = make_plan(reconstruct=Settings(max_probability=threshold))
        engine = Scripted(skeleton=SKELETON, chain=RIGHT)
        _, reconstruction, _ = make_refinement(tmp_path / f"p{threshold}", plan, [history.task], engine)
        replace(reconstruction, anchoring=Likelier()).reconstruct([history])  # type: ignore[arg-type]
        assert (history.chains[0].probability, history.chains[0].problem) == (0.25, why)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "tiny")


def test_anchoring_by_probability_is_that_of_plain_log_softmax(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    model = AnchoringModel(str(folder), "cpu", "float32")
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()

    def mean_logprob(question: str, reasoning: str) -> float:
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = [model.chat.tokenizer.encode([text])[0][:-1] for text in (prompt, f"<think>\n{reasoning}\n</think>")]
        row = torch.tensor([[*ids[0], *ids[1]]])
        logprobs = theirs(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
        return float(logprobs[len(ids[0]) - 1 :].detach().double().mean())

    def ask(text: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": text}]

    chains = [("Explain 2 + 3\n\n5", "2 + 3", "2 + 3 = 5"), ("Explain 1 + 1\n\n2", "1 + 1", "1 and 1 make\n2")]
    wanted = [mean_logprob(seen, c) - mean_logprob(unseen, c) for seen, unseen, c in chains]
    measured = model.anchoring([(ask(seen), ask(unseen), c) for seen, unseen, c in chains])
    assert measured == pytest.approx(wanted, abs=2e-5)
    assert abs(wanted[0]) > 1e-3  # else nothing is compared
    monkeypatch.setattr("data.refine.anchoring.FORWARD_TOKENS", 1)  # each row a forward of its own
    assert model.anchoring([(ask(seen), ask(unseen), c) for seen, unseen, c in chains]) == pytest.approx(
        wanted, abs=2e-5
    )
    assert model.anchoring([]) == []


def test_a_chain_that_the_template_refuses_is_not_measured(folder: Path) -> None:
    model = AnchoringModel(str(folder), "cpu", "float32")
    good = [{"role": "user", "content": "a"}]
    measured = model.anchoring([([{"role": "robot", "content": "a"}], good, "x"), (good, good, "x")])
    assert measured == [None, pytest.approx(0, abs=1e-6)]
