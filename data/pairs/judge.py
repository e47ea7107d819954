"""Judge which of two responses is better: by a pairwise reward model, or by a model behind an endpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from data.pairs.endpoint import connect, endpoint_errors
from nb_lightning.checkpoints.pretrained import find_origin
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


@dataclass(frozen=True)
class Comparison:
    """Two responses to the same messages."""

    messages: Sequence[Mapping[str, Any]]
    first: str
    second: str


class Judge(Protocol):
    """Judges which of two responses is better."""

    def about(self) -> dict[str, Any]:
        """Identify the judge, for its journal and the provenance of the pairs."""
        ...

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        """For each comparison, return the preference for the first response, from 0 to 1."""
        ...


@dataclass
class RewardModelJudge:
    """A pairwise reward model on this machine. Responses too long for its context are undecided: 0.5."""

    path: str
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        self.model = load_reward_model(self.path, self.device, self.dtype)

    def about(self) -> dict[str, Any]:
        return {"name": self.model.name, "digest": find_origin(self.path).digest()}

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        return [self._preference(c) for c in comparisons]

    def _preference(self, c: Comparison) -> float:
        if sum(len(self.model.read(c.messages, text)) for text in (c.first, c.second)) > self.model.context:
            return 0.5
        return self.model.compare(c.messages, [(c.first, c.second)])[0]


@dataclass
class EndpointJudge:
    """A model behind an endpoint. It is asked in both orders, because it may prefer what it reads first."""

    url: str
    model: str
    concurrency: int = 8
    max_tokens: int = 512

    def about(self) -> dict[str, Any]:
        return {"name": self.model, "url": self.url}

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        with connect(self.url) as endpoint, ThreadPoolExecutor(self.concurrency) as pool:
            as_given = [pool.submit(self._preference, endpoint, c.messages, c.first, c.second) for c in comparisons]
            swapped = [pool.submit(self._preference, endpoint, c.messages, c.second, c.first) for c in comparisons]
            return [(a.result() + 1 - b.result()) / 2 for a, b in zip(as_given, swapped)]

    def _preference(self, endpoint: Any, messages: Sequence[Mapping[str, Any]], a: str, b: str) -> float:
        """Return 1 where the model calls A better, 0 where it calls B better, 0.5 where it names neither."""
        conversation = "\n\n".join(f"{m['role']}: {m.get('content', '')}" for m in messages)
        question = QUESTION.format(conversation=conversation, a=a, b=b)
        with endpoint_errors(self.url):
            reply = endpoint.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": question}], temperature=0.0,
                max_tokens=self.max_tokens,
            )  # fmt: skip
            verdict = reply.choices[0].message.content or ""
        letters = re.findall(r"^\W*([AB])\W*$", verdict, re.MULTILINE)
        return {"A": 1.0, "B": 0.0}.get(letters[-1] if letters else "", 0.5)
