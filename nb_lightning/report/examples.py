"""The answers of each stage's model to the same prompts, from the samples of the recipe's evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nb_lightning.report.results import CHAIN, read_samples
from nb_lightning.report.runs import RUNS


@dataclass(frozen=True)
class Answer:
    """The greedy answer of one stage's model."""

    stage: str
    text: str
    reward: float


@dataclass(frozen=True)
class Example:
    """A held-out prompt and its answers in the order of the recipe.

    Attributes:
        reason: why this prompt is shown.
    """

    family: str
    reason: str
    prompt: str
    answers: list[Answer]


def choose_examples(root: Path) -> list[Example]:
    """Choose of each family the first task, and the first that the last model solves and the first model did not."""
    answers: dict[tuple[str, str], list[Answer]] = {}
    prompts: dict[tuple[str, str], str] = {}
    for run in CHAIN:
        for sample in read_samples(root / "recipe" / f"evaluate_{run}.jsonl"):
            if sample["way"] == "greedy":
                task = (sample["source"], sample["id"])
                answers.setdefault(task, []).append(Answer(RUNS[run], sample["completion"], sample["reward"]))
                prompts[task] = "\n".join(str(m["content"]) for m in sample["messages"] if m.get("content"))
    examples = []
    for family in dict.fromkeys(source for source, _ in answers):
        tasks = [task for task in answers if task[0] == family]
        first, learnt = tasks[0], next((task for task in tasks if _is_learnt(answers[task])), None)
        examples.append(Example(family, "the first", prompts[first], answers[first]))
        if learnt and learnt != first:
            reason = "the first that was learnt after SFT"
            examples.append(Example(family, reason, prompts[learnt], answers[learnt]))
    return examples


def _is_learnt(answers: Sequence[Answer]) -> bool:
    return answers[-1].reward == 1 and answers[0].reward < 1
