"""How two responses are put to a reward model, in training and in scoring alike:

    prompt, response A, end of turn; prompt, response B, end of turn -> "A" or "B", the better one

The prompt stands before each, so that every response is read exactly as its author wrote it: in the same tokens, at the
same distance from what was asked. What lies between the two are the template's own control tokens, which no response
can spell (nb_lightning/text/chat_tokens.py): none can write its rival's part, or a verdict.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from nb_lightning.text.chat_tokens import ChatTokenizer

FORM = 1  # raise it when the tokens of a comparison change: an older reward model is then refused
ANSWERS = ("A", "B")


@dataclass(frozen=True)
class ComparisonForm:
    """What a reward model's numbers depend on besides its weights; a run records it in its checkpoints.

    Attributes:
        answers: ids of the tokens "A" and "B".
        digest: over the form, the tokenizer, the chat template and the answers.
    """

    answers: tuple[int, int]
    digest: str

    @classmethod
    def of(cls, chat: ChatTokenizer) -> ComparisonForm:
        """Raises ValueError where an answer is not one token."""
        ids = []
        for answer in ANSWERS:
            found = chat.tokenizer.tokenizer.encode(answer, add_special_tokens=False).ids
            if len(found) != 1:
                raise ValueError(
                    f"a reward model answers in one token, and {answer!r} is {len(found)} of this tokenizer's"
                )
            ids += found
        template = chat.template
        asked = {key: token for key, token in template.special.items() if key in template.source}
        made_of = [FORM, chat.tokenizer.digest, template.source, asked, ids]
        return cls((ids[0], ids[1]), hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest())


def comparison(first: list[int], second: list[int]) -> list[int]:
    """The tokens before the answer.

    Args:
        first, second: prompt and response, as `ChatTokenizer.answered` and `data.prepare --pairs` write them.
    """
    return [*first, *second]
