"""Deliberative refinement: checklist, candidates, scores, critique, revision (report, section SFT).

Each step asks its question about all instructions of a batch at once, so that an engine always has many calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from data.refine.asking import Question
from data.refine.drafts import REVISION, Draft, History
from data.refine.parse import (
    read_checklist,
    read_critiques,
    read_draft,
    read_line_critiques,
    read_scores,
    write_line_critiques,
)
from data.refine.plan import Dimension
from data.refine.prompts import task_text
from data.refine.work import Work
from nb_lightning.rewards.tasks import Task
from nb_lightning.rewards.verifier import SCORING_THREADS, score_texts

FAILED_CANDIDATES = "no candidate is a finished answer"
NOT_PASSED = "no draft passed"
# Messages, drafts -> index of the best; None if they cannot be compared.
Tournament = Callable[[Task, Sequence[Draft]], int | None]


@dataclass
class Refinement(Work):
    """Refines batches of instructions.

    Attributes:
        tournament: chooses among drafts that pass; None takes the first of the highest total.
    """

    tournament: Tournament | None = None

    def refine(self, tasks: Iterable[Task]) -> list[History]:
        """Run the loop over tasks; each history has a best draft that passed, or a reason in `dropped`."""
        histories = [History(task) for task in tasks]
        self._write_checklists(histories)
        self._sample_candidates(histories)
        self._choose(histories)
        stale = dict.fromkeys(map(id, histories), 0)  # rounds without a better draft
        criticised: dict[int, int | None] = {}  # the best draft that the critic has seen
        for number in range(1, self.plan.rounds + 1):
            open_ones = [
                h for h in histories if not h.passed and h.best is not None and stale[id(h)] < self.plan.patience
            ]
            if not open_ones:
                break
            before = [_total(h) for h in open_ones]
            self._criticise([h for h in open_ones if criticised.get(id(h)) != h.best])
            criticised |= {id(h): h.best for h in open_ones}
            self._revise(open_ones, number)
            self._choose(open_ones)
            for history, total in zip(open_ones, before):
                stale[id(history)] = 0 if _total(history) > total else stale[id(history)] + 1
        for history in histories:
            if history.best is None:
                history.dropped = FAILED_CANDIDATES
            elif not history.passed:
                history.dropped = NOT_PASSED
        return histories

    def _write_checklists(self, histories: Sequence[History]) -> None:
        for history in histories:
            verified = self.plan.by_verifier(history.task.verifier)
            history.checklist = [self.prompts.text("verifier_item")] if verified else []
        if not self.plan.checklist:
            return
        questions = [
            Question(h, "", self.prompts.messages("checklist", task=task_text(h.task)), read_checklist)
            for h in histories
        ]
        sampling = self.plan.sampling.checklist.sampling()
        for history, items in zip(histories, self.asker.ask("checklist", self.engines.critic, sampling, questions)):
            history.checklist += items or []

    def _sample_candidates(self, histories: Sequence[History]) -> None:
        sampling = self.plan.sampling.candidates.sampling()
        for role, engine in self.engines.candidates.items():
            questions = [
                Question(h, str(n), h.task.messages, partial(read_draft, name=f"{role}-{n}"), is_answer=True)
                for h in histories
                for n in range(self.plan.k)
            ]
            for question, draft in zip(questions, self.asker.ask(role, engine, sampling, questions)):
                if draft is not None:
                    question.history.drafts.append(draft)
        self._score([(h, draft) for h in histories for draft in h.drafts])

    # Scores ----------------------------------------------------------------------------------------------------------

    def _score(self, drafts: Sequence[tuple[History, Draft]]) -> None:
        """Score finished drafts: by the verifier, and then by the critic those that the verifier lets pass."""
        finished = [(h, draft) for h, draft in drafts if not draft.is_cut and draft.content]
        self._verify([(h, draft) for h, draft in finished if self.plan.by_verifier(h.task.verifier)])
        questions, asked = [], []
        for history, draft in finished:
            verifier = history.task.verifier
            names = [*self.plan.by_model(verifier)]
            if names and _passes(draft, self.plan.by_verifier(verifier)):
                messages = self.prompts.messages(
                    "score", dimensions={name: self.plan.dimensions[name].description for name in names},
                    **self._shown(history, draft),
                )  # fmt: skip
                questions.append(Question(history, draft.name, messages, partial(read_scores, dimensions=names)))
                asked.append(draft)
        sampling = self.plan.sampling.score.sampling()
        for draft, scores in zip(asked, self.asker.ask("score", self.engines.critic, sampling, questions)):
            draft.scores |= scores or {}
        for history, draft in finished:
            verifier = history.task.verifier
            dimensions = {**self.plan.by_verifier(verifier), **self.plan.by_model(verifier)}
            weighted = sum(d.weight * draft.scores.get(name, 0.0) for name, d in dimensions.items())
            draft.total = weighted / sum(d.weight for d in dimensions.values())
            draft.passed = _passes(draft, dimensions)

    def _verify(self, drafts: Sequence[tuple[History, Draft]]) -> None:
        """Set the scores of the dimensions that the task's verifier gives."""
        by_task: dict[int, tuple[History, list[Draft]]] = {}
        for history, draft in drafts:
            by_task.setdefault(id(history), (history, []))[1].append(draft)

        def verify(entry: tuple[History, list[Draft]]) -> None:
            history, own = entry
            for draft, score in zip(own, score_texts(self.verifiers, history.task, [draft.text for draft in own])):
                draft.status = score.info["status"]
                draft.scores = dict.fromkeys(self.plan.by_verifier(history.task.verifier), score.reward)

        with ThreadPoolExecutor(SCORING_THREADS) as threads:
            list(threads.map(verify, by_task.values()))

    def _choose(self, histories: Sequence[History]) -> None:
        """Choose the best draft: one that passes before others, then the highest total, then the first.

        Of revisions that do not pass and have one total, the last is chosen: the next round goes on from there, and not
        from the same draft with the same critiques.
        """
        for history in histories:
            scored = [i for i, draft in enumerate(history.drafts) if draft.scores]
            if not scored:  # an answer without any score can be mended too
                scored = [i for i, draft in enumerate(history.drafts) if not draft.is_cut and draft.content]
            if not scored:
                continue
            key = [_rank(i, history.drafts[i]) for i in scored]
            history.best = scored[key.index(max(key))]
            passing = [i for i in scored if history.drafts[i].passed]
            if self.tournament is not None and len(passing) > 1:
                winner = self.tournament(history.task, [history.drafts[i] for i in passing])
                history.best = history.best if winner is None else passing[winner]

    # Critique and revision -------------------------------------------------------------------------------------------

    def _criticise(self, histories: Sequence[History]) -> None:
        """Ask the critic about each best draft."""
        questions = []
        for history in histories:
            draft = history.best_draft
            assert draft is not None
            read = read_critiques if self.plan.critiques == "json" else read_line_critiques
            messages = self.prompts.messages("critique", verdict=verdict(draft), **self._shown(history, draft))
            reader = partial(read, draft=draft, items=len(history.checklist))
            questions.append(Question(history, draft.name, messages, reader))
        sampling = self.plan.sampling.critique.sampling()
        for history, critiques in zip(histories, self.asker.ask("critique", self.engines.critic, sampling, questions)):
            assert history.best_draft is not None
            history.best_draft.critiques = critiques

    def _revise(self, histories: Sequence[History], number: int) -> None:
        questions = []
        for history in histories:
            draft = history.best_draft
            assert draft is not None
            history.rounds = number
            messages = self.prompts.messages(
                "revise", critiques=draft.critiques or [], verdict=verdict(draft),
                verdicts=verdicts(draft) if self.plan.critiques == "lines" else "", **self._shown(history, draft),
            )  # fmt: skip
            for n in range(self.plan.revisions):
                name = f"{REVISION}{number}-{n}"
                questions.append(Question(history, name, messages, partial(read_draft, name=name), is_answer=True))
        new = []
        sampling = self.plan.sampling.revise.sampling()
        for question, draft in zip(questions, self.asker.ask("revise", self.engines.writer, sampling, questions)):
            if draft is not None:
                question.history.drafts.append(draft)
                new.append((question.history, draft))
        self._score(new)

    def _shown(self, history: History, draft: Draft) -> dict[str, Any]:
        """Return the variables that most templates share."""
        return {
            "task": task_text(history.task),
            "checklist": history.checklist,
            "reasoning": draft.reasoning,
            "answer": draft.content,
            "draft": "\n".join(draft.lines),
        }


def _rank(number: int, draft: Draft) -> tuple[bool, float, int]:
    return draft.passed, draft.total, number if draft.is_revision and not draft.passed else 0


def _total(history: History) -> float:
    assert history.best_draft is not None
    return history.best_draft.total


def _passes(draft: Draft, dimensions: Mapping[str, Dimension]) -> bool:
    return all(draft.scores.get(name, -1.0) >= dimension.least for name, dimension in dimensions.items())


def verdict(draft: Draft) -> str:
    """Say what the task's verifier found, for the critic; "" where there is no verifier or the draft is right."""
    return "" if draft.status in ("", "correct") else draft.status.replace("_", " ")


def verdicts(draft: Draft) -> str:
    """Write critiques by line as the signs of the lines; "" where the critic's reply could not be read."""
    if draft.critiques is None:
        return ""
    return write_line_critiques(draft, int(draft.critiques[0].where.split()[1]) - 1 if draft.critiques else None)
