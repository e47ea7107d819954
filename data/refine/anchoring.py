"""Measure how much a chain of thought leans on an answer that was in sight when it was written (arXiv 2602.14469).

* lexical: the share of the answer's n-grams that stand in the first half of the chain, before a solver would know them.
* probability: how much likelier the chain is after the prompt of a chain's writer, which shows the answer, than after
  the task alone, in nats per token.

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
from nb_lightning.rewards.extract import boxed
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.messages import ChatError
from nb_lightning.text.thoughts import END_OF_THINK, THINK

N_GRAM = 3
WORD = re.compile(r"[\u4e00-\u9fff]|[^\W_]+")  # a Chinese character is a word
# "2.", "Step 2:", "steps 2 and 3", "第2步" of a skeleton: no numbers of an answer.
STEP_NUMBER = re.compile(
    r"^[ \t]*(?:[-*#]+[ \t]*)?\**\d+[.):、．]|\bsteps?[ \t]+\d+(?:(?:[ \t]*,[ \t]*|[ \t]+(?:and|or|to)[ \t]+|[-–])\d+)*"
    r"|第[ \t]*\d+[ \t]*步|步骤[ \t]*\d+",
    re.IGNORECASE | re.MULTILINE,
)
LONG_LINE = 20  # characters of a line of an answer that is told from others
FORWARD_TOKENS = 16_384  # of one packed forward, unless one chain is longer
Messages = Sequence[dict[str, Any]]
Row = tuple[list[int], list[int]]  # token ids of a prompt, and of the chain after it


def lexical_anchoring(question: str, chain: str, answer: str) -> float | None:
    """Return the share of the answer's n-grams that are in the first half of the chain and not in the question.

    n is 3, or the number of words of a shorter answer.

    Returns:
        From 0 to 1; None where all of the answer is in the question, or it has no words.
    """
    words = _words(conclusion(answer))
    n = min(N_GRAM, len(words))
    if not n:
        return None
    chain_words = _words(chain)
    new = _n_grams(words, n) - _n_grams(_words(question), n)
    early = _n_grams(chain_words[: len(chain_words) // 2], n)
    return len(new & early) / len(new) if new else None


def conclusion(answer: str) -> str:
    """Return what an answer comes to: the content of its last \\boxed{}, what follows "Answer:", or all of it."""
    return boxed(answer) or final_answer(answer)


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _n_grams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def contains_answer(text: str, question: str, answer: str) -> bool:
    """Whether a skeleton gives the answer away, all of a short one or a line of a long one, and the question does not.

    Short answers are compared word by word, so that "7" is not found in "17", nor in the number of the skeleton's
    seventh step. Lines of long ones need `LONG_LINE` characters.
    """
    words = tuple(_words(conclusion(answer)))
    n = len(words)
    if n and words in _n_grams(_words(STEP_NUMBER.sub(" ", text)), n) - _n_grams(_words(question), n):
        return True
    lines = (line for line in map(str.strip, answer.splitlines()) if len(line) >= LONG_LINE)
    return any(line in text and line not in question for line in lines)


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

    def anchoring(self, chains: Sequence[tuple[Messages, Messages, str]]) -> list[float | None]:
        """Return (log p(chain | with) - log p(chain | without)) / tokens, in nats per token.

        Args:
            chains: messages whose prompt shows the answer, messages whose prompt does not, and the chain.

        Returns:
            None for a chain that the model's chat template or tokenizer refuses.
        """
        pairs = [self._pair(*chain) for chain in chains]
        rows = [row for pair in pairs if pair is not None for row in pair]
        means = iter([mean for batch in _batches(rows) for mean in self._forward(batch)])
        return [None if pair is None else next(means) - next(means) for pair in pairs]

    def _pair(self, with_answer: Messages, without: Messages, chain: str) -> tuple[Row, Row] | None:
        try:
            return self._row(with_answer, chain), self._row(without, chain)
        except ChatError:
            return None

    def _row(self, messages: Messages, chain: str) -> Row:
        """Encode a prompt, and the chain as the thought that answers it."""
        tokens = self.chat.answered(messages, f"{THINK}\n{chain}\n{END_OF_THINK}", ended=False)
        start = tokens.turns[0].start
        return tokens.ids[:start], tokens.ids[start:]

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Row]) -> list[float]:
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


def _batches(rows: Sequence[Row]) -> list[list[Row]]:
    batches: list[list[Row]] = []
    tokens = FORWARD_TOKENS
    for row in rows:
        length = len(row[0]) + len(row[1])
        if tokens + length > FORWARD_TOKENS:
            batches.append([])
            tokens = 0
        batches[-1].append(row)
        tokens += length
    return batches
