"""The verifier "preference": a pairwise reward model (`python train.py stage=reward_model`) judges completions.

    model = load_reward_model("outputs/runs/reward_model")
    model.compare(messages, [(one, other)])        # how likely `one` is the better response
    Preference(model).score(prompt, completions, reference)

Both orders are asked and averaged, so which response comes first says nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import fsum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nb_lightning.batch import pack_responses
from nb_lightning.checkpoints.pretrained import find_origin, load_pretrained
from nb_lightning.losses.pairwise import answer_logits
from nb_lightning.model.transformer import Transformer
from nb_lightning.rewards.comparison_form import ComparisonForm, comparison
from nb_lightning.rewards.verifier import Score
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.messages import ChatError, Message

FORWARD_TOKENS = 16_384  # packed comparisons of one forward, unless a single one is longer


class RewardModel:
    """A model trained on comparisons. Safe to call from several threads: one forward runs at a time.

    Attributes:
        context: tokens that a comparison may have.
        name: for humans: the run's or checkpoint's.
    """

    def __init__(self, model: Transformer, chat: ChatTokenizer, context: int, name: str) -> None:
        self.model, self.chat, self.context, self.name = model, chat, context, name
        self.form = ComparisonForm.of(chat)
        self._lock = threading.Lock()

    def read(self, messages: Sequence[Message], response: str) -> list[int]:
        """A response's half of a comparison: prompt, response, end of turn.

        Raises:
            ChatError: messages that the template refuses, or a text that the tokenizer cannot write.
        """
        return self.chat.answered(messages, response).ids

    def compare(self, messages: Sequence[Message], pairs: Sequence[tuple[str, str]]) -> list[float]:
        """How likely the first of each pair is the better response to `messages`, in [0, 1]; of equal texts 0.5.

        Raises:
            ValueError: a comparison has more tokens than `context`.
            ChatError: see `read`.
        """
        read = {text: self.read(messages, text) for text in dict.fromkeys(text for pair in pairs for text in pair)}
        # Each once, and in an order of their own: in a set's, the last bits would differ from process to process.
        asked = dict.fromkeys(order for pair in pairs if pair[0] != pair[1] for order in (pair, pair[::-1]))
        orders = sorted(asked, key=lambda order: len(read[order[0]]) + len(read[order[1]]))
        rows = [comparison(read[first], read[second]) for first, second in orders]
        if rows and len(rows[-1]) > self.context:
            raise ValueError(f"a comparison has {len(rows[-1])} tokens, and {self.name} reads {self.context}")
        first_is_better = dict(zip(orders, self._answers(rows)))
        return [
            0.5 if one == other else (first_is_better[one, other] + 1 - first_is_better[other, one]) / 2
            for one, other in pairs
        ]

    def _answers(self, rows: list[list[int]]) -> list[float]:
        """Of each comparison p(A) / (p(A) + p(B))."""
        with self._lock, torch.inference_mode():
            return [answer for some in _forwards(rows) for answer in self._forward(some)]

    def _forward(self, rows: list[list[int]]) -> list[float]:
        """`_answers` of rows that go into one forward, packed."""
        answers = self.form.answers
        packed, _ = pack_responses(
            rows, [[answers[0]]] * len(rows)
        )  # either answer: what counts is that there is a label
        packed = {name: tensor.to(self.model.head.weight.device) for name, tensor in packed.items()}
        labels = packed.pop("labels")

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            return answer_logits(hidden, weight, labels, answers)

        logits = self.model(**packed, head=head)
        return (logits[:, 0] - logits[:, 1]).double().sigmoid().tolist()


def _forwards(rows: list[list[int]]) -> Iterator[list[list[int]]]:
    """Some rows at a time, `FORWARD_TOKENS` or a single one."""
    some: list[list[int]] = []
    for row in rows:
        if some and sum(map(len, some)) + len(row) > FORWARD_TOKENS:
            yield some
            some = []
        some.append(row)
    if some:
        yield some


def load_reward_model(path: str, device: str = "auto", dtype: str = "auto") -> RewardModel:
    """Load what stage=reward_model trained.

    Args:
        path: the run, one of its checkpoints, or a Hugging Face folder that nb_lightning.export made of it.
        device, dtype: see `load_pretrained`.

    Raises:
        ValueError: nothing to load there, no reward model, or one that was trained on comparisons of another form than
            its tokenizer and chat template, or this version, make.
    """
    origin = find_origin(path)
    trained = origin.comparison()
    if trained is None:
        raise ValueError(
            f"{path} is no reward model: stage=reward_model trains one; name its run, a checkpoint, or the folder that "
            "nb_lightning.export --to made of it"
        )
    loaded = load_pretrained(str(origin.path), device, dtype)
    name = Path(path).resolve().name
    model = RewardModel(loaded.model, ChatTokenizer.of(loaded.tokenizer), origin.context, name)
    if model.form.digest != trained:
        raise ValueError(
            f"{path} was trained on comparisons written in another way: with another tokenizer or chat template than "
            "lies beside it, or by another version of nb_lightning; train it again"
        )
    return model


class Preference:
    """A completion is worth how often a reward model prefers it: to the reference, or without one, on average, to each
    of the other completions of its prompt.

    A completion that is too long to be compared is worth 0, status "too_long": with a reference, where both together
    have more tokens than the model's context; without one, where the completion and another like it would. It is
    nobody's rival then; as one that the tokenizer cannot write, status "unreadable". Where a completion has no rival
    left it is worth 0.5, status "alone".

    Reference: a text, or null.
    """

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def check(self, reference: Any) -> None:
        if reference is not None and not (isinstance(reference, str) and reference.strip()):
            raise ValueError(f"the reference of 'preference' is {reference!r}; give a text that is not blank, or null")

    def score(self, prompt: str, completions: Sequence[str], reference: str | None) -> list[Score]:
        messages = [{"role": "user", "content": prompt}]
        room = self.model.context
        longest = room // 2 if reference is None else room - len(self.model.read(messages, reference))
        unfit = {text: self._unfit(messages, text, longest) for text in dict.fromkeys(completions)}
        fit = [i for i, text in enumerate(completions) if unfit[text] is None]
        wins: dict[int, list[float]] = {i: [] for i in fit}
        if reference is None:
            rivals = list(combinations(fit, 2))
            won = self.model.compare(messages, [(completions[i], completions[j]) for i, j in rivals])
            for (i, j), p in zip(rivals, won):
                wins[i].append(p)
                wins[j].append(1 - p)
        else:
            won = self.model.compare(messages, [(completions[i], reference) for i in fit])
            wins = {i: [p] for i, p in zip(fit, won)}
        return [
            _score(wins[i]) if i in wins else Score(0.0, {"status": unfit[text]}) for i, text in enumerate(completions)
        ]

    def _unfit(self, messages: Sequence[Message], text: str, longest: int) -> str | None:
        """Why a completion cannot be compared."""
        try:
            return "too_long" if len(self.model.read(messages, text)) > longest else None
        except ChatError:
            return "unreadable"


def _score(wins: list[float]) -> Score:
    if not wins:
        return Score(0.5, {"status": "alone"})
    return Score(fsum(wins) / len(wins), {"status": "compared", "rivals": len(wins)})


def refuse_without_model() -> Preference:
    """What `get_verifier("preference")` comes to: the name alone says of no model."""
    raise ValueError(
        "the verifier 'preference' needs a reward model: name a run of stage=reward_model with stage.reward_model= in "
        "RL, or construct nb_lightning.rewards.preference.Preference(load_reward_model(path))"
    )
