"""Rebuild the chain of thought of a refined answer: revision has broken the old one (report, section SFT).

skeleton: from instruction and answer an outline that does not contain the answer, then the chain along it.
plain: a summary, then the chain (the report's way). none: the draft's own reasoning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from data.calls.call import Reply
from data.refine.anchoring import AnchoringModel, contains_answer, lexical_anchoring
from data.refine.asking import Question, warmer
from data.refine.drafts import Chain, History, with_thought
from data.refine.line_checks import LINE_CHECKS
from data.refine.parse import finished_answer, read_same, read_tagged, read_thought_chain
from data.refine.plan import RoleSampling
from data.refine.prompts import task_text
from data.refine.work import Work
from nb_lightning.generation.sampling import Sampling
from nb_lightning.rewards.exact import final_answer
from nb_lightning.rewards.extract import fold
from nb_lightning.rewards.verifier import SCORING_THREADS, score_texts

# A chain that says so was written backwards from the answer.
QUOTES = (
    "given answer", "provided answer", "reference answer", "expected answer", "known answer", "target answer",
    "stated answer", "answer provided", "answer given", "answer we were given", "final_answer", "the outline",
    "给定答案", "给定的答案", "给出的答案", "所给答案", "参考答案", "提供的答案", "已知答案", "目标答案", "提纲",
)  # fmt: skip
NO_SKELETON, LEAKED = "no skeleton", "the skeleton contains the answer"
NO_CHAIN = "no chain"


@dataclass
class Reconstruction(Work):
    """Writes and checks the chains of histories whose best draft passed.

    Attributes:
        anchoring: measures anchoring by probability; None measures none.
    """

    anchoring: AnchoringModel | None = None

    def reconstruct(self, histories: Sequence[History]) -> None:
        """Add a chain to each history that passed, or the reason why it has none."""
        left = [h for h in histories if h.passed]
        if self.plan.reconstruct.mode == "none":
            for history in left:
                assert history.best_draft is not None
                history.chains.append(Chain(history.best_draft.reasoning, own_answer=history.best_draft.content))
            self._check(left)
            left = [h for h in left if h.chains[-1].problem]
        else:
            for attempt in range(self.plan.reconstruct.attempts):
                skeletons = self._write_skeletons(left, attempt) if self.plan.reconstruct.mode == "skeleton" else {}
                self._write_chains(left, skeletons, attempt)
                self._check([h for h in left if not h.chains[-1].problem])
                left = [h for h in left if h.chains[-1].problem]
        for history in left:
            history.dropped = f"chain: {history.chains[-1].problem}"

    def _write_skeletons(self, histories: Sequence[History], attempt: int) -> dict[str, str | None]:
        """Return the skeleton of each history by its task's key; None where none could be read."""
        questions = [
            Question(
                h, str(attempt), self.prompts.messages("skeleton", task=task_text(h.task), answer=answer_of(h)),
                self._read_skeleton,
            )
            for h in histories
        ]  # fmt: skip
        sampling = self._sampling(self.plan.sampling.skeleton, attempt)
        skeletons = self.asker.ask("skeleton", self.engines.writer, sampling, questions)
        return {h.task.key: skeleton for h, skeleton in zip(histories, skeletons)}

    def _sampling(self, role: RoleSampling, attempt: int) -> Sampling:
        return warmer(role.sampling()) if attempt else role.sampling()

    def _read_skeleton(self, reply: Reply) -> str:
        if self.plan.reconstruct.chains == "thought":
            return finished_answer(reply)
        return read_tagged(reply, ["skeleton"])["skeleton"]

    def _write_chains(self, histories: Sequence[History], skeletons: Mapping[str, str | None], attempt: int) -> None:
        settings, questions = self.plan.reconstruct, []
        for history in histories:
            chain = Chain("")
            history.chains.append(chain)
            if settings.mode == "skeleton":
                skeleton = skeletons[history.task.key]
                chain.skeleton = skeleton or ""
                if skeleton is None:
                    chain.problem = NO_SKELETON
                elif contains_answer(skeleton, task_text(history.task), answer_of(history)):
                    chain.problem = LEAKED
            if not chain.problem:
                shown = answer_of(history) if settings.answer_in_sight else ""
                messages = self.prompts.messages(
                    "chain", task=task_text(history.task), answer=shown, skeleton=chain.skeleton
                )
                questions.append(Question(history, str(attempt), messages, partial(self._read_chain, bool(shown))))
        sampling = self._sampling(self.plan.sampling.chain, attempt)
        for question, parts in zip(questions, self.asker.ask("chain", self.engines.writer, sampling, questions)):
            chain = question.history.chains[-1]
            if parts is None:
                chain.problem = NO_CHAIN
            else:
                chain.reasoning, chain.own_answer = parts["chain"], parts["answer"]
                chain.skeleton = chain.skeleton or parts.get("summary", "")

    def _read_chain(self, answer_shown: bool, reply: Reply) -> dict[str, str]:
        if self.plan.reconstruct.chains == "thought":
            return read_thought_chain(reply)
        summary = ["summary"] if self.plan.reconstruct.mode == "plain" and answer_shown else []
        return read_tagged(reply, [*summary, "chain", "answer"])

    # Checks ----------------------------------------------------------------------------------------------------------

    def _check(self, histories: Sequence[History]) -> None:
        """Set the problem of each last chain that fails a check, and measure its anchoring."""
        for history in histories:
            history.chains[-1].problem = self._problem(history)
        if self.plan.reconstruct.mode != "none":  # else nobody saw an answer
            self._require_same_answer([h for h in histories if not h.chains[-1].problem])
        self._measure([h for h in histories if not h.chains[-1].problem])

    def _problem(self, history: History) -> str:
        settings, chain, task = self.plan.reconstruct, history.chains[-1], task_text(history.task)
        check = LINE_CHECKS.get(settings.line_checks.get(history.task.source, ""))
        if check is not None:
            verdicts = [verdict for verdict in check(task, chain.reasoning) if verdict is not None]
            chain.lines_checked, chain.lines_valid = len(verdicts), sum(verdicts)
        if len(chain.reasoning) < settings.min_chain_chars:
            return "too short"
        lowered, question = chain.reasoning.lower(), task.lower()
        if settings.mode != "none" and any(quote in lowered and quote not in question for quote in QUOTES):
            return "it speaks of an answer that was given"
        if chain.lines_valid < chain.lines_checked:
            return "a line does not hold"
        return ""

    def _require_same_answer(self, histories: Sequence[History]) -> None:
        """Refuse chains whose own answer is not the refined one.

        Answers that differ in their letters are compared by the task's verifier; where it has none, the critic says
        whether they are the same.
        """
        others = [h for h in histories if fold(final_answer(_own_answer(h))) != fold(final_answer(answer_of(h)))]
        verified = [h for h in others if self.plan.by_verifier(h.task.verifier)]
        with ThreadPoolExecutor(SCORING_THREADS) as threads:
            same = dict(zip(map(id, verified), threads.map(self._is_as_good, verified)))
        asked = [h for h in others if id(h) not in same]
        questions = [
            Question(
                h, str(len(h.chains)), self.prompts.messages(
                    "same", task=task_text(h.task), answer=answer_of(h), own_answer=_own_answer(h)
                ), read_same,
            )
            for h in asked
        ]  # fmt: skip
        answers = self.asker.ask("same", self.engines.critic, self.plan.sampling.same.sampling(), questions)
        same |= dict(zip(map(id, asked), answers))
        for history in others:
            if not same[id(history)]:  # None: the critic's reply could not be read
                history.chains[-1].problem = "its own answer is another"

    def _is_as_good(self, history: History) -> bool:
        """Whether the chain with the writer's own answer has the reward of the refined answer."""
        chain, draft = history.chains[-1], history.best_draft
        assert draft is not None
        text = with_thought(chain.reasoning, chain.own_answer)
        reward = score_texts(self.verifiers, history.task, [text])[0].reward
        return reward >= max(draft.scores[name] for name in self.plan.by_verifier(history.task.verifier))

    def _measure(self, histories: Sequence[History]) -> None:
        settings = self.plan.reconstruct
        for history in histories:
            chain = history.chains[-1]
            chain.lexical = lexical_anchoring(task_text(history.task), chain.reasoning, answer_of(history))
            if settings.max_lexical is not None and (chain.lexical or 0.0) > settings.max_lexical:
                chain.problem = "lexical anchoring above reconstruct.max_lexical"
        if self.anchoring is None:
            return
        chains = [
            (
                self.prompts.messages("chain", task=task_text(h.task), answer=answer_of(h), skeleton=""),
                h.task.messages,
                h.chains[-1].reasoning,
            )
            for h in histories
        ]
        for history, value in zip(histories, self.anchoring.anchoring(chains)):
            chain = history.chains[-1]
            chain.probability = value
            limit = settings.max_probability
            if value is not None and limit is not None and value > limit and not chain.problem:
                chain.problem = "anchoring by probability above reconstruct.max_probability"


def answer_of(history: History) -> str:
    """Return the refined answer, without its reasoning."""
    assert history.best_draft is not None
    return history.best_draft.content


def _own_answer(history: History) -> str:
    return history.chains[-1].own_answer
