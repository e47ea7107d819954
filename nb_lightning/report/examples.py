"""The same prompts through the models after each stage, out of what the recipe's evaluation kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nb_lightning.report.results import CHAIN, read_samples
from nb_lightning.report.runs import RUNS


@dataclass(frozen=True)
class Answer:
    stage: str
    text: str
    reward: float


@dataclass(frozen=True)
class Prompt:
    family: str
    chosen: str  # why this prompt is shown
    text: str
    answers: list[Answer]


def before_and_after(root: Path) -> list[Prompt]:
    """Of each family the first held-out task, and the first that the last model gets right and the first one did not;
    greedy."""
    answers: dict[tuple[str, str], list[Answer]] = {}
    prompts: dict[tuple[str, str], str] = {}
    for name in CHAIN:
        for line in read_samples(root / "recipe" / f"evaluate_{name}.jsonl"):
            if line["way"] == "greedy":
                key = (line["source"], line["id"])
                answers.setdefault(key, []).append(Answer(RUNS[name], line["completion"], line["reward"]))
                prompts[key] = "\n".join(str(m["content"]) for m in line["messages"] if m.get("content"))
    found = []
    for family in dict.fromkeys(source for source, _ in answers):
        keys = [key for key in answers if key[0] == family]
        learnt = next((key for key in keys if _learnt(answers[key])), None)
        found.append(Prompt(family, "the first", prompts[keys[0]], answers[keys[0]]))
        if learnt and learnt != keys[0]:
            found.append(Prompt(family, "the first that was learnt after SFT", prompts[learnt], answers[learnt]))
    return found


def _learnt(answers: Sequence[Answer]) -> bool:
    return answers[-1].reward == 1 and answers[0].reward < 1
