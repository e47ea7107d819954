"""The verifier "preference": a pairwise reward model (`python train.py stage=reward_model`) judges completions.

    model = load_reward_model("outputs/runs/reward_model")
    model.compare(messages, [(one, other)])        # the probability that `one` is the better response
    Preference(model).score(prompt, completions, reference)

Both orders of two responses are asked and averaged, so the order has no effect.
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
    """A model trained on comparisons. It may be called from several threads: one forward runs at a time.

    Attributes:
        context: the largest number of tokens in a comparison.
        name: of the run or checkpoint, for messages.
    """

    def __init__(self, model: Transformer, chat: ChatTokenizer, context: int, name: str) -> None:
        self.model, self.chat, self.context, self.name = model, chat, context, name
        self.form = ComparisonForm.of(chat)
        self._lock = threading.Lock()

    def read(self, messages: Sequence[Message], response: str, tools: Sequence[Any] | None = None) -> list[int]:
        """Encode a response's half of a comparison: prompt with its tools, response, end of turn.

        Raises:
            ChatError: messages that the template refuses, or a text that the tokenizer cannot encode.
        """
        return self.chat.answered(messages, response, tools=tools).ids

    def compare(
        self, messages: Sequence[Message], pairs: Sequence[tuple[str, str]], tools: Sequence[Any] | None = None
    ) -> list[float]:
        """Return the probability that the first of each pair is the better response; 0.5 for equal texts.

        Raises:
            ValueError: a comparison has more tokens than `context`.
            ChatError: see `read`.
        """
        texts = dict.fromkeys(text for pair in pairs for text in pair)
        halves = {text: self.read(messages, text, tools) for text in texts}
        # Each order once. Not in a set, whose own order would change the last bits from process to process.
        unique = dict.fromkeys(order for pair in pairs if pair[0] != pair[1] for order in (pair, pair[::-1]))
        orders = sorted(unique, key=lambda order: len(halves[order[0]]) + len(halves[order[1]]))
        rows = [comparison(halves[first], halves[second]) for first, second in orders]
        if rows and len(rows[-1]) > self.context:
            raise ValueError(f"a comparison has {len(rows[-1])} tokens, and {self.name} reads {self.context}")
        first_is_better = dict(zip(orders, self._judge(rows)))
        return [
            0.5 if one == other else (first_is_better[one, other] + 1 - first_is_better[other, one]) / 2
            for one, other in pairs
        ]

    def _judge(self, rows: list[list[int]]) -> list[float]:
        """Compute p(A) / (p(A) + p(B)) of each comparison."""
        with self._lock, torch.inference_mode():
            return [p for batch in _batches(rows) for p in self._forward(batch)]

    def _forward(self, rows: list[list[int]]) -> list[float]:
        """Judge the comparisons of one forward, packed into one row."""
        answers = self.form.answers
        # Which answer is packed does not matter: its label marks the position whose logits are read.
        packed, _ = pack_responses(rows, [[answers[0]]] * len(rows))
        packed = {name: tensor.to(self.model.head.weight.device) for name, tensor in packed.items()}
        labels = packed.pop("labels")

        def head(hidden: Tensor, head_weight: Tensor) -> Tensor:
            return answer_logits(hidden, head_weight, labels, answers)

        logits = self.model(**packed, head=head)  # [rows, 2]
        return (logits[:, 0] - logits[:, 1]).double().sigmoid().tolist()


def _batches(rows: list[list[int]]) -> Iterator[list[list[int]]]:
    """Cut rows into batches of at most `FORWARD_TOKENS` tokens, or of a single row."""
    batch: list[list[int]] = []
    for row in rows:
        if batch and sum(map(len, batch)) + len(row) > FORWARD_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def load_reward_model(path: str, device: str = "auto", dtype: str = "auto") -> RewardModel:
    """Load a model that stage=reward_model trained.

    Args:
        path: the run, one of its checkpoints, or a Hugging Face folder that nb_lightning.export made of it.
        device, dtype: see `load_pretrained`.

    Raises:
        ValueError: nothing to load there, not a reward model, a model whose files do not give its context, or one that
            was trained on comparisons of another form than its tokenizer, chat template and this version make.
    """
    origin = find_origin(path)
    form_digest = origin.comparison()
    if form_digest is None:
        raise ValueError(
            f"{path} is no reward model: stage=reward_model trains one; name its run, a checkpoint, or the folder that "
            "nb_lightning.export --to made of it"
        )
    if origin.context is None:
        raise ValueError(f"{path} does not give its model's context in tokens; export or train the model again")
    loaded = load_pretrained(str(origin.path), device, dtype)
    name = Path(path).resolve().name
    model = RewardModel(loaded.model, ChatTokenizer.of(loaded.tokenizer), origin.context, name)
    if model.form.digest != form_digest:
        raise ValueError(
            f"{path} was trained on comparisons written in another way: with another tokenizer or chat template than "
            "lies beside it, or by another version of nb_lightning; train it again"
        )
    return model


class Preference:
    """Rewards a completion with the probability that a reward model prefers it to its rivals.

    The rival is the reference. Without one, the other completions of the prompt are, and the reward is the mean.

    Some completions have another status than "compared":
        "too_long", reward 0: too long to be compared. With a reference, both together have more tokens than the model's
            context; without one, the completion and another of its length would. It is no rival of the others.
        "unreadable", reward 0: the tokenizer cannot encode it. It is no rival of the others.
        "alone", reward 0.5: no rival is left.

    Reference: a text, or null.
    """

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def check(self, reference: Any) -> None:
        if reference is not None and not (isinstance(reference, str) and reference.strip()):
            raise ValueError(f"the reference of 'preference' is {reference!r}; give a text that is not blank, or null")

    def score(self, prompt: str, completions: Sequence[str], reference: str | None) -> list[Score]:
        messages = [{"role": "user", "content": prompt}]
        context = self.model.context
        longest = context // 2 if reference is None else context - len(self.model.read(messages, reference))
        problems = {text: self._problem(messages, text, longest) for text in dict.fromkeys(completions)}
        comparable = [i for i, text in enumerate(completions) if problems[text] is None]
        wins: dict[int, list[float]] = {i: [] for i in comparable}  # the probabilities of winning against each rival
        if reference is None:
            pairs = list(combinations(comparable, 2))
            probabilities = self.model.compare(messages, [(completions[i], completions[j]) for i, j in pairs])
            for (i, j), p in zip(pairs, probabilities):
                wins[i].append(p)
                wins[j].append(1 - p)
        else:
            probabilities = self.model.compare(messages, [(completions[i], reference) for i in comparable])
            wins = {i: [p] for i, p in zip(comparable, probabilities)}
        return [
            _score(wins[i]) if i in wins else Score(0.0, {"status": problems[text]})
            for i, text in enumerate(completions)
        ]

    def _problem(self, messages: Sequence[Message], text: str, longest: int) -> str | None:
        """Return the status of a completion that cannot be compared; None for one that can."""
        try:
            return "too_long" if len(self.model.read(messages, text)) > longest else None
        except ChatError:
            return "unreadable"


def _score(wins: list[float]) -> Score:
    if not wins:
        return Score(0.5, {"status": "alone"})
    return Score(fsum(wins) / len(wins), {"status": "compared", "rivals": len(wins)})


def refuse_without_model() -> Preference:
    """Raise ValueError: `get_verifier("preference")` alone names no reward model."""
    raise ValueError(
        "the verifier 'preference' needs a reward model: name a run of stage=reward_model with stage.reward_model= in "
        "RL, or construct nb_lightning.rewards.preference.Preference(load_reward_model(path))"
    )
