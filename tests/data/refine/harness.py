"""Engines in this process that answer by a script, and what a refinement with them is made of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.calls.budget import Budget
from data.calls.call import Call, Failure, Reply
from data.calls.caller import NO_LIMIT, Caller
from data.calls.engine import OnReply
from data.refine.asking import Asker
from data.refine.loop import Refinement, Tournament
from data.refine.plan import Dimension, RefinePlan
from data.refine.prompts import read_prompts
from data.refine.reconstruct import Reconstruction
from data.refine.work import Engines
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.rewards.registry import get_verifiers
from nb_lightning.rewards.tasks import Task, write_tasks
from nb_lightning.text.chat_template import ChatTemplate
from tests.dpd_harness import POLICY, random_model, save_model

# What the English prompts begin with.
BEGINNINGS = {
    "You are preparing the evaluation": "checklist",
    "Score an answer": "score",
    "Find what is wrong": "critique",
    "Write a better answer": "revise",
    "A task and its answer": "skeleton",
    "Write out the reasoning": "chain",
    "Two answers to one task": "same",
}
Said = str | Reply | Failure
Line = Said | Sequence[Said] | Callable[[str], Said]  # what is always said; in turn; or to a prompt
SKELETON = "<skeleton>\n1. Take both numbers.\n2. Add them.\n</skeleton>"
APPROVAL = '{"problems": []}'


def role_of(prompt: str) -> str:
    return next((role for beginning, role in BEGINNINGS.items() if prompt.startswith(beginning)), "candidate")


def reply(content: str, finish: str = "stop", tokens: int = 4, **message: Any) -> Reply:
    return Reply({"role": "assistant", "content": content, **message}, finish, 10, tokens)


def scores(**by_dimension: Any) -> str:
    return json.dumps({"scores": by_dimension})


def problems(*texts: str) -> str:
    return json.dumps({"problems": [{"item": None, "where": "", "problem": text, "fix": "fix it"} for text in texts]})


def chain(reasoning: str, answer: str) -> str:
    return f"<chain>\n{reasoning}\n</chain>\n<answer>{answer}</answer>"


class Scripted:
    """An engine that says by role what it is told to, and keeps what it was asked."""

    def __init__(self, name: str = "scripted", /, **lines: Line) -> None:
        self.name, self.lines = name, lines
        self.prompts: dict[str, list[str]] = {}
        self.calls: list[Call] = []

    @property
    def counts(self) -> Counter[str]:
        return Counter({role: len(prompts) for role, prompts in self.prompts.items()})

    def about(self) -> dict[str, Any]:
        return {"name": self.name}

    def answer(self, calls: Sequence[Call], on_reply: OnReply) -> None:
        for number, call in enumerate(calls):
            on_reply(number, self.say(call))

    def say(self, call: Call) -> Reply | Failure:
        prompt = call.messages[-1]["content"]
        role = role_of(prompt)
        asked = self.prompts.setdefault(role, [])
        asked.append(prompt)
        self.calls.append(call)
        line = self.lines[role]
        said = (
            line(prompt)
            if callable(line)
            else line
            if isinstance(line, str | Reply | Failure)
            else line[len(asked) - 1]
        )
        return reply(said) if isinstance(said, str) else said


def make_task(question: str = "2 + 3 = ?", reference: Any = "5", verifier: str = "exact", **more: Any) -> Task:
    fields: dict[str, Any] = {"id": question, "source": "sums", "messages": [{"role": "user", "content": question}]}
    return Task(**{**fields, "verifier": verifier, "reference": reference, **more})


def make_plan(dimensions: Mapping[str, Dimension] | None = None, **fields: Any) -> RefinePlan:
    by_verifier = {"correctness": Dimension(least=1, by="verifier")}
    return RefinePlan(**{"dimensions": dict(dimensions or by_verifier), "k": 1, "checklist": False, **fields})


def make_asker(folder: Path, budget: Budget = NO_LIMIT) -> Asker:
    return Asker(Caller(folder / "calls", budget, max_failed=1), seed=0)


def make_refinement(
    folder: Path, plan: RefinePlan, tasks: Sequence[Task], engine: Scripted, teacher: Scripted | None = None,
    tournament: Tournament | None = None, budget: Budget = NO_LIMIT,
) -> tuple[Refinement, Reconstruction, Caller]:  # fmt: skip
    asker = make_asker(folder, budget)
    prompts = read_prompts(plan.language, plan.prompts, plan.critiques)
    verifiers = get_verifiers(task for task in tasks if task.verifier != "preference")
    engines = Engines({"teacher": teacher or engine}, engine, engine)
    refinement = Refinement(plan, prompts, engines, asker, verifiers, tournament)
    return refinement, Reconstruction(plan, prompts, engines, asker, verifiers), asker.caller


def solve(role: str, prompt: str) -> str:
    """Answer what is asked about the tasks of `write_sums`.

    Candidates are wrong at every third task, and mended in the first round. Every seventh has no chain, and task 5 no
    answer at all.
    """
    words = prompt[prompt.index("Add ") :].split(".")[0].split()
    a, b = int(words[1]), int(words[3])
    if role == "candidate":
        return "" if a == 5 else str(a + b + (a % 3 == 0))
    if role == "chain":
        return "I cannot." if a % 7 == 0 else chain(f"{a} + {b} = {a + b}", str(a + b))
    return {"critique": APPROVAL, "skeleton": SKELETON}.get(role) or str(a + b)


def write_sums(path: Path, n: int, source: str = "sums") -> list[Task]:
    """Write tasks "Add 3 and 4." with their sums."""
    tasks = [make_task(f"Add {i} and {i + 1}.", str(2 * i + 1), id=str(i), source=source) for i in range(n)]
    write_tasks(path, tasks)
    return tasks


def save_chat_model(folder: Path) -> Path:
    """Save a tiny random model over bytes that chats in ChatML, as a Hugging Face folder."""
    save_model(random_model(POLICY, 0), folder)
    load_tokenizer("bytes").save(folder, ChatTemplate.chatml().source)
    return folder
