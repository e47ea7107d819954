"""How a reward model reads two responses, in training and in scoring alike:

    prompt, response A, end of turn; prompt, response B, end of turn -> "A" or "B", the better one

The prompt stands before each response, so that each is read as it was written: in the same tokens, at the same distance
from the prompt. The two halves are separated by control tokens of the chat template, which no response can spell
(nb_lightning/text/chat_tokens.py). So no response can write its rival's half, or a verdict.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from nb_lightning.text.chat_tokens import ChatTokenizer

FORM = 1  # version of the form; raise it when the tokens of a comparison change, and older reward models are refused
ANSWERS = ("A", "B")


@dataclass(frozen=True)
class ComparisonForm:
    """What the judgements of a reward model depend on besides its weights; a run records it in its checkpoints.

    Attributes:
        answers: ids of the tokens "A" and "B".
        digest: SHA-256 over the form, the tokenizer, the chat template and the answers.
    """

    answers: tuple[int, int]
    digest: str

    @classmethod
    def of(cls, chat: ChatTokenizer) -> ComparisonForm:
        """Return the form of comparisons that this tokenizer and chat template make.

        Raises:
            ValueError: an answer is not one token.
        """
        ids = []
        for answer in ANSWERS:
            answer_ids = chat.tokenizer.tokenizer.encode(answer, add_special_tokens=False).ids
            if len(answer_ids) != 1:
                raise ValueError(
                    f"a reward model answers in one token, and {answer!r} is {len(answer_ids)} of this tokenizer's"
                )
            ids += answer_ids
        template = chat.template
        used_special = {key: token for key, token in template.special.items() if key in template.source}
        content = [FORM, chat.tokenizer.digest, template.source, used_special, ids]
        return cls((ids[0], ids[1]), hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest())


def comparison(first: list[int], second: list[int]) -> list[int]:
    """Join two halves into the tokens before the answer.

    Args:
        first, second: prompt, response and end of turn, as `ChatTokenizer.answered` and `data.prepare --pairs` write
            them.
    """
    return [*first, *second]
