"""Conversations into tokens, and which tokens the assistant wrote.

A special token in the text is a control token where the template wrote it, and plain text where a message did: nobody
ends his turn, or begins another's, by spelling `<|im_end|>`. Tokens that a tokenizer lists without calling them special
(`<think>` in Qwen's) are text that anybody may write.

The end of a prompt is a border between tokens, as it is in generation, where the prompt's tokens are fixed before the
first new one is drawn.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from tokenizers import Tokenizer

from nb_lightning.text.chat_template import ChatTemplate, Turn
from nb_lightning.text.messages import ChatError, Message, outcome
from nb_lightning.text.tokenizer import TextTokenizer

# One character of the private planes for each special token: CONTROL stands for it where the template wrote it, and
# LITERAL where a message did. Used only for conversations in which a message spells one.
CONTROL, LITERAL, PLANE = 0xF0000, 0x100000, 0xFFFE


@dataclass(frozen=True)
class TurnTokens:
    """Tokens [start, stop) were written by message number `index`, the last of them its end of turn.

    `thought` is False where the message has `reasoning_content` and the template left it out, as many do in turns
    before the last question.
    """

    index: int
    start: int
    stop: int
    thought: bool = True


@dataclass(frozen=True)
class ChatTokens:
    ids: list[int]
    turns: list[TurnTokens]


class ChatTokenizer:
    """A tokenizer and a chat template.

    Safe to pickle and to carry across a fork.
    """

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate) -> None:
        self.tokenizer, self.template = tokenizer, template
        added = tokenizer.tokenizer.get_added_tokens_decoder()
        self._added, self._added_ids = tuple(token.content for token in added.values()), frozenset(added)
        self._special = {token.content: number for number, token in enumerate(t for t in added.values() if t.special)}
        if len(self._special) > PLANE:
            raise ValueError(
                f"the tokenizer has {len(self._special)} special tokens; more than {PLANE} cannot be told apart"
            )
        longest_first = sorted(self._special, key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @classmethod
    def of(cls, tokenizer: TextTokenizer, template: str | None = None, now: str | None = None) -> ChatTokenizer:
        """With the template `template` (Jinja source), else the tokenizer's own, else ChatML.

        Args:
            now: see `ChatTemplate`.
        """
        source = template or tokenizer.chat_template or ChatTemplate.chatml().source
        return cls(tokenizer, ChatTemplate(source, tokenizer.special, now))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids up to where the assistant begins to write.

        Raises:
            ChatError: as `ChatTemplate.render`.
        """
        messages, tools, guarded = self._guard(messages, tools)
        return self._encode(self.template.render(messages, tools, add_generation_prompt=True), [], guarded)[0]

    def encode(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> ChatTokens:
        """Token ids of a whole conversation, and where in it the assistant's turns lie.

        Raises:
            ChatError: as `ChatTemplate.render_turns`; or a turn's end is no token, and no model would learn to stop.
        """
        (found,) = self.encode_many([(messages, tools)])
        if isinstance(found, ChatError):
            raise found
        return found

    def encode_many(
        self, conversations: Sequence[tuple[Sequence[Message], Sequence[Any] | None]]
    ) -> list[ChatTokens | ChatError]:
        """`encode` of many conversations (messages and tools) at a time, which is faster; or its error."""
        guarded = [outcome(self._guard, messages, tools) for messages, tools in conversations]
        good = [g for g in guarded if not isinstance(g, ChatError)]
        texts = iter(self.template.render_many([(messages, tools) for messages, tools, _ in good]))
        found: list[Any] = []
        for g in guarded:
            text = g if isinstance(g, ChatError) else next(texts)
            found.append(text if isinstance(text, ChatError) else outcome(self._tokens, g[0], *text, g[2]))
        return found

    def _tokens(self, messages: Sequence[Message], text: str, turns: list[Turn], guarded: bool) -> ChatTokens:
        ids, borders = self._encode(text, [border for turn in turns for border in (turn.start, turn.end)], guarded)
        tokens = []
        for number, turn in enumerate(turns):
            written = text[turn.start : turn.end]
            if not written.rstrip().endswith(self._added):
                raise ChatError(
                    "an assistant turn does not end in a token of its own",
                    f"message {turn.index}",
                    f", but in {written[-20:]!r}; is the template this tokenizer's?",
                )
            reasoning = messages[turn.index].get("reasoning_content") or ""
            start, stop = borders[2 * number : 2 * number + 2]
            tokens.append(TurnTokens(turn.index, start, stop, reasoning.strip() in written))
        return ChatTokens(ids, tokens)

    @cached_property
    def end_id(self) -> int:
        """The token that ends an assistant turn: where generation stops.

        Raises:
            ChatError: as `encode`, of the smallest conversation.
        """
        tokens = self.encode([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}])
        written = tokens.ids[tokens.turns[0].start : tokens.turns[0].stop]
        return next(id for id in reversed(written) if id in self._added_ids)  # white space may follow it

    def answered(
        self, messages: Sequence[Message], answer: str, ended: bool = True, tools: Sequence[Any] | None = None
    ) -> ChatTokens:
        """Token ids of a prompt and of what was written after it, letter for letter; the one turn is the answer.

        Args:
            answer: as it was written, reasoning and calls included.
            ended: the token that ends a turn comes after it, and is the turn's last.

        Raises:
            ChatError: as `ChatTemplate.render`, and `end_id`.
        """
        (asked, answer), tools, guarded = self._guard([messages, answer], tools)
        prompt = self.template.render(asked, tools, add_generation_prompt=True)
        ids, (start,) = self._encode(prompt + answer, [len(prompt)], guarded)
        ids = [*ids, self.end_id] if ended else ids
        return ChatTokens(ids, [TurnTokens(len(messages), start, len(ids))])

    def _encode(self, text: str, borders: list[int], guarded: bool) -> tuple[list[int], list[int]]:
        """Ids of `text`, and the number of tokens before each border (character positions, in order)."""
        tokenizer, renumbered = self.tokenizer.tokenizer, {}
        if guarded:
            tokenizer, renumbered = self._renamed
            pieces = [self._rename(text[a:b]) for a, b in pairwise([0, *borders, len(text)])]
            text, borders = "".join(pieces), list(accumulate(map(len, pieces[:-1])))
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets  # each access builds a list
        ends = [end for _, end in offsets]
        before = [bisect_right(ends, border) for border in borders]
        if any(n < len(ids) and offsets[n][0] < border for n, border in zip(before, borders)):
            # A token reaches across a border: the pieces are tokenized one by one.
            pieces = [text[a:b] for a, b in pairwise([0, *borders, len(text)])]
            parts = [tokenizer.encode(piece, add_special_tokens=False).ids for piece in pieces]
            ids = [id for part in parts for id in part]
            before = list(accumulate(map(len, parts[:-1])))
            if tokenizer.decode(ids, skip_special_tokens=False) != tokenizer.decode(
                encoding.ids, skip_special_tokens=False
            ):
                raise ChatError(
                    "a token reaches across the border of an assistant turn, where this tokenizer cannot cut"
                )
        if guarded:
            written = sum(CONTROL <= ord(character) < CONTROL + PLANE for character in text)
            ids = [renumbered.get(id, id) for id in ids]
            if sum(id in self._special_ids for id in ids) != written:
                raise ChatError("a message spells a special token that this tokenizer cannot write as text")
        return ids, before

    # A message that spells a special token ----------------------------------------------------------------------------

    def _guard(self, messages: Any, tools: Any) -> tuple[Any, Any, bool]:
        """Messages and tools with a `LITERAL` character for each special token they spell, and whether they do."""
        if not any(map(self._any_special.search, _strings([messages, tools]))):
            return messages, tools, False
        if any(ord(character) >= CONTROL for text in _strings([messages, tools]) for character in text):
            raise ChatError("a message has both special tokens and private-use characters")

        def replace(text: str) -> str:
            return self._any_special.sub(lambda match: chr(LITERAL + self._special[match[0]]), text)

        return _map_strings(messages, replace), _map_strings(tools, replace), True

    def _rename(self, text: str) -> str:
        """Text for the renamed tokenizer: a `CONTROL` character for the template's tokens, the messages' spelt out."""
        text = self._any_special.sub(lambda match: chr(CONTROL + self._special[match[0]]), text)
        contents = list(self._special)
        return re.sub(
            f"[{chr(LITERAL)}-{chr(LITERAL + PLANE - 1)}]", lambda match: contents[ord(match[0]) - LITERAL], text
        )

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer whose special tokens are `CONTROL` characters, and how to number its added tokens as before."""
        spec = json.loads(self.tokenizer.tokenizer.to_str())
        for token in spec["added_tokens"]:
            if token["special"]:
                token["content"] = chr(CONTROL + self._special[token["content"]])
        renamed = Tokenizer.from_str(json.dumps(spec))
        return renamed, {renamed.token_to_id(token["content"]): token["id"] for token in spec["added_tokens"]}

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(map(self.tokenizer.tokenizer.token_to_id, self._special))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_renamed"}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.items():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value
