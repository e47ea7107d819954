"""Judge which of two responses is better: by a pairwise reward model, or by a model behind an endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from data.calls.call import Call, Reply
from data.calls.caller import Caller
from data.calls.engine import Engine, OnReply
from nb_lightning.checkpoints.pretrained import find_origin
from nb_lightning.generation.sampling import Sampling
from nb_lightning.rewards.preference import load_reward_model

QUESTION = """Two answers to the same conversation follow. Which one is better: more correct, more helpful, clearer?

<conversation>
{conversation}
</conversation>

<answer_A>
{a}
</answer_A>

<answer_B>
{b}
</answer_B>

Say in a sentence why, then end with a line that is only A or B."""
VERDICT = Sampling(512, temperature=0.0)
UNDECIDED = 0.5


@dataclass(frozen=True)
class Comparison:
    """Two responses to the same messages, and the functions that both could call."""

    messages: Sequence[Mapping[str, Any]]
    first: str
    second: str
    tools: Sequence[Mapping[str, Any]] | None = None


class Judge(Protocol):
    """Judges which of two responses is better."""

    @property
    def engine(self) -> Engine:
        """Who is asked."""
        ...

    def calls(self, comparison: Comparison) -> list[Call]:
        """Return the calls that ask for one comparison."""
        ...

    def preference(self, replies: Sequence[Reply]) -> float:
        """Read the replies to these calls: the preference for the first response, from 0 to 1."""
        ...


def compare(judge: Judge, comparisons: Sequence[Comparison], caller: Caller) -> list[float | None]:
    """For each comparison, return the preference for the first response; None where a call got no reply."""
    calls = [judge.calls(comparison) for comparison in comparisons]
    replies = iter(caller.ask(judge.engine, [call for group in calls for call in group], "judge"))
    preferences: list[float | None] = []
    for group in calls:
        answers = [next(replies) for _ in group]
        whole = [reply for reply in answers if reply is not None]
        preferences.append(judge.preference(whole) if len(whole) == len(group) else None)
    return preferences


@dataclass
class RewardModelJudge:
    """A pairwise reward model on this machine. Responses too long for its context are undecided.

    It is itself an engine: its reply to a conversation with two answers at the end is a number.
    """

    path: str
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        self.model = load_reward_model(self.path, self.device, self.dtype)

    @property
    def engine(self) -> Engine:
        return self

    @cached_property
    def _about(self) -> dict[str, Any]:
        return {"name": self.model.name, "digest": find_origin(self.path).digest()}

    def about(self) -> dict[str, Any]:
        return dict(self._about)

    def calls(self, comparison: Comparison) -> list[Call]:
        answers = ({"role": "assistant", "content": text} for text in (comparison.first, comparison.second))
        return [Call([*comparison.messages, *answers], VERDICT, seed=0, tools=comparison.tools)]

    def preference(self, replies: Sequence[Reply]) -> float:
        return float(replies[0].message["content"])

    def answer(self, calls: Sequence[Call], on_reply: OnReply) -> None:
        for number, call in enumerate(calls):
            *messages, first, second = call.messages
            texts = first["content"], second["content"]
            tokens = sum(len(self.model.read(messages, text, call.tools)) for text in texts)
            fits = tokens <= self.model.context
            preference = self.model.compare(messages, [texts], call.tools)[0] if fits else UNDECIDED
            on_reply(number, Reply({"role": "assistant", "content": repr(preference)}, "stop", tokens, 1))


@dataclass
class EndpointJudge:
    """A chat model. It is asked in both orders, because it may prefer what it reads first."""

    engine: Engine

    def calls(self, comparison: Comparison) -> list[Call]:
        conversation = "\n\n".join(f"{m['role']}: {m.get('content', '')}" for m in comparison.messages)
        if comparison.tools:
            conversation = f"tools: {json.dumps(comparison.tools, ensure_ascii=False)}\n\n{conversation}"
        orders = (comparison.first, comparison.second), (comparison.second, comparison.first)
        questions = [QUESTION.format(conversation=conversation, a=a, b=b) for a, b in orders]
        return [Call([{"role": "user", "content": question}], VERDICT, seed=0) for question in questions]

    def preference(self, replies: Sequence[Reply]) -> float:
        as_given, swapped = map(verdict, replies)
        return (as_given + 1 - swapped) / 2


def verdict(reply: Reply) -> float:
    """Return 1 where the model calls A better, 0 where it calls B better, 0.5 where it names neither or was cut off."""
    letters = re.findall(r"^\W*([AB])\W*$", str(reply.message.get("content", "")), re.MULTILINE)
    return UNDECIDED if reply.is_cut or not letters else {"A": 1.0, "B": 0.0}[letters[-1]]
