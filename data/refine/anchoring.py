"""Measure how much a chain of thought leans on an answer that was in sight when it was written (arXiv 2602.14469).

* lexical: the share of the answer's n-grams that stand in the first half of the chain, before a solver would know them.
* probability: how much likelier the chain is with the answer in the prompt than without, in nats per token.

The paper measures at three levels, with its own definitions; the two here are ours. Entropy is not measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nb_lightning.batch import pack_responses
from nb_lightning.checkpoints.pretrained import load_pretrained
from nb_lightning.losses.head import token_logprobs
from nb_lightning.rewards.exact import final_answer
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.thoughts import END_OF_THINK, THINK

N_GRAM = 3
WORD = re.compile(r"[\u4e00-\u9fff]|[^\W_]+")  # a Chinese character is a word
FORWARD_TOKENS = 16_384  # of one packed forward, unless one chain is longer
Messages = Sequence[dict[str, Any]]


def lexical_anchoring(question: str, chain: str, answer: str) -> float | None:
    """Return the share of the answer's n-grams that are in the first half of the chain and not in the question.

    n is 3, or the number of words of a shorter answer.

    Returns:
        From 0 to 1; None where all of the answer is in the question, or it has no words.
    """
    words = WORD.findall(final_answer(answer).lower())
    n = min(N_GRAM, len(words))
    if not n:
        return None
    chain_words = WORD.findall(chain.lower())
    new = _n_grams(words, n) - _n_grams(WORD.findall(question.lower()), n)
    early = _n_grams(chain_words[: len(chain_words) // 2], n)
    return len(new & early) / len(new) if new else None


def _n_grams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def contains_answer(text: str, question: str, answer: str) -> bool:
    """Whether a skeleton gives the answer away, all of a short one or a line of a long one, and the question does not.

    Short answers are compared word by word, so that "7" is not found in "17"; lines of long ones need 20 characters.
    """
    answer_words, text_words = WORD.findall(final_answer(answer).lower()), WORD.findall(text.lower())
    n = len(answer_words)
    if n and tuple(answer_words) in _n_grams(text_words, n):
        return tuple(answer_words) not in _n_grams(WORD.findall(question.lower()), n)
    return any(line in text and line not in question for line in map(str.strip, answer.splitlines()) if len(line) >= 20)


class AnchoringModel:
    """A local model that says how likely a chain is after two prompts.

    Args:
        path: a run, a checkpoint, a Hugging Face folder or a .gguf file.
    """

    def __init__(self, path: str, device: str = "auto", dtype: str = "auto") -> None:
        pretrained = load_pretrained(path, device, dtype)
        if pretrained.chat is None:
            raise ValueError(f"--anchoring-model {path} has no chat template; name an instruction-tuned model")
        self.model, self.chat = pretrained.model, ChatTokenizer(pretrained.tokenizer, pretrained.chat)

    def anchoring(self, chains: Sequence[tuple[Messages, Messages, str]]) -> list[float]:
        """Return (log p(chain | with) - log p(chain | without)) / tokens, in nats per token.

        Args:
            chains: messages whose prompt shows the answer, messages whose prompt does not, and the chain.
        """
        rows = [
            self._row(messages, chain) for with_answer, without, chain in chains for messages in (with_answer, without)
        ]
        means = [mean for batch in _batches(rows) for mean in self._forward(batch)]
        return [seen - unseen for seen, unseen in zip(means[::2], means[1::2])]

    def _row(self, messages: Messages, chain: str) -> tuple[list[int], list[int]]:
        """Encode a prompt, and the chain as the thought that answers it."""
        tokens = self.chat.answered(messages, f"{THINK}\n{chain}\n{END_OF_THINK}", ended=False)
        start = tokens.turns[0].start
        return tokens.ids[:start], tokens.ids[start:]

    @torch.inference_mode()
    def _forward(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Return the mean log-probability of each response's tokens."""
        packed, index = pack_responses(*zip(*rows))
        device = self.model.embedding.weight.device
        packed = {name: tensor.to(device) for name, tensor in packed.items()}
        labels = packed.pop("labels")
        logprobs = self.model(**packed, head=partial(_label_logprobs, labels=labels)).double().cpu()  # [N]
        flat = index.flatten()
        return [float(logprobs[flat == i].mean()) for i in range(len(rows))]


def _label_logprobs(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    return token_logprobs(hidden[0], head_weight, labels[0])


def _batches(rows: Sequence[tuple[list[int], list[int]]]) -> list[list[tuple[list[int], list[int]]]]:
    batches: list[list[tuple[list[int], list[int]]]] = []
    tokens = FORWARD_TOKENS
    for row in rows:
        length = len(row[0]) + len(row[1])
        if tokens + length > FORWARD_TOKENS:
            batches.append([])
            tokens = 0
        batches[-1].append(row)
        tokens += length
    return batches
