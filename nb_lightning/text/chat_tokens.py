"""Turn conversations into tokens, and find which tokens the assistant wrote.

A special token that the template wrote becomes a control token; one that a message spells becomes plain text. So a
message cannot end a turn, or begin another, by spelling `<|im_end|>`. Added tokens that are not special (`<think>` in
Qwen's tokenizer) are text that any message may write.

No token reaches across the end of a prompt, as in generation, where the prompt's tokens are fixed before the first new
token is drawn.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from tokenizers import Tokenizer

from nb_lightning.text.borders import BorderCutter, crossed_borders
from nb_lightning.text.chat_template import ChatTemplate, Turn, opened_thought
from nb_lightning.text.left_out import missing_call, missing_part, missing_tool
from nb_lightning.text.messages import END_OF_THINK, THINK, ChatError, Message, or_raise, outcome, thought_of
from nb_lightning.text.tokenizer import TextTokenizer

# Private-use characters that stand for special tokens, used only for conversations in which a message spells one.
# CONTROL + n is the special token number n where the template wrote it, LITERAL + n where a message did.
CONTROL, LITERAL, PLANE = 0xF0000, 0x100000, 0xFFFE


@dataclass(frozen=True)
class TurnTokens:
    """An assistant turn: message number `index` wrote the tokens [start, stop), its end of turn included.

    `thought` is False if the message has reasoning (in `reasoning_content`, or at the beginning of the content) that
    the template left out, as many templates do in turns before the last question.
    """

    index: int
    start: int
    stop: int
    thought: bool = True


@dataclass(frozen=True)
class ChatTokens:
    """The token ids of a conversation, and the assistant's turns in it.

    `left_out` says which turn, tool, tool call, or content beside a call the template did not write.
    """

    ids: list[int]
    turns: list[TurnTokens]
    left_out: ChatError | None = field(default=None, compare=False)


class ChatTokenizer:
    """A tokenizer and a chat template, safe to pickle and to carry across a fork."""

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
        """Choose the template: `template` (Jinja source), else the tokenizer's, else ChatML.

        Args:
            now: see `ChatTemplate`.
        """
        source = template or tokenizer.chat_template or ChatTemplate.chatml().source
        return cls(tokenizer, ChatTemplate(source, tokenizer.special, now))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Tokenize a conversation up to where the assistant begins to write.

        Raises:
            ChatError: as `ChatTemplate.render`.
        """
        messages, tools, guarded = self._guard(messages, tools)
        return self._encode(self.template.render(messages, tools, add_generation_prompt=True), [], guarded)[0]

    def encode(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> ChatTokens:
        """Tokenize a conversation, and locate the assistant's turns in it.

        Raises:
            ChatError: as `ChatTemplate.render_turns`; or a turn does not end with a token of its own, so that no model
                could learn to stop.
        """
        return or_raise(self.encode_many([(messages, tools)])[0])

    def encode_many(
        self, conversations: Sequence[tuple[Sequence[Message], Sequence[Any] | None]]
    ) -> list[ChatTokens | ChatError]:
        """Do `encode` for many conversations (messages and tools) at once, which is faster.

        Returns:
            For each conversation its tokens, or the error that `encode` would raise.
        """
        guarded = [outcome(self._guard, messages, tools) for messages, tools in conversations]
        valid = [g for g in guarded if not isinstance(g, ChatError)]
        rendered = iter(self.template.render_many([(messages, tools) for messages, tools, _ in valid]))
        results: list[ChatTokens | ChatError] = []
        for g in guarded:
            if isinstance(g, ChatError):
                results.append(g)
                continue
            messages, tools, is_guarded = g
            text = next(rendered)
            if isinstance(text, ChatError):
                results.append(text)
            else:
                results.append(outcome(self._tokens, messages, tools, *text, is_guarded))
        return results

    def _tokens(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, text: str, turns: list[Turn], guarded: bool
    ) -> ChatTokens:
        """Tokenize a rendered conversation; its turns end at borders between tokens."""
        left_out = missing_tool(tools, text)
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
            left_out = left_out or missing_call(messages[turn.index], turn.index, written)
            start, stop = borders[2 * number : 2 * number + 2]
            tokens.append(TurnTokens(turn.index, start, stop, thought_of(messages[turn.index]) in written))
        spans = {turn.index: (turn.start, turn.end) for turn in turns}
        return ChatTokens(ids, tokens, left_out or missing_part(messages, tools, text, spans))

    @cached_property
    def end_id(self) -> int:
        """The token that ends an assistant turn, at which generation stops.

        Raises:
            ChatError: as `encode`, for a small conversation.
        """
        tokens = self.encode([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}])
        written = tokens.ids[tokens.turns[0].start : tokens.turns[0].stop]
        return next(id for id in reversed(written) if id in self._added_ids)  # white space may follow it

    def answered(
        self, messages: Sequence[Message], answer: str, ended: bool = True, tools: Sequence[Any] | None = None
    ) -> ChatTokens:
        """Tokenize a prompt and the exact text of an answer to it; the one turn is the answer.

        Where the prompt opens a thought, the answer may open it again: it is written once. There an answer without any
        thought is written as the template writes a plain turn, not as the beginning of a thought.

        Args:
            answer: as the model wrote it, reasoning and calls included.
            ended: append the token that ends a turn.

        Raises:
            ChatError: as `ChatTemplate.render`, and `end_id`.
        """
        (asked, text), tools_guarded, guarded = self._guard([messages, answer], tools)
        prompt = self.template.render(asked, tools_guarded, add_generation_prompt=True)
        if opening := opened_thought(prompt):
            if text.startswith(THINK):
                text = text.removeprefix(opening if text.startswith(opening) else THINK)
            elif END_OF_THINK not in text:
                return self._plain_turn(messages, answer, ended, tools)
        ids, (start,) = self._encode(prompt + text, [len(prompt)], guarded)
        ids = [*ids, self.end_id] if ended else ids
        left_out = missing_tool(tools_guarded, prompt) or missing_part(asked, tools_guarded, prompt, {})
        return ChatTokens(ids, [TurnTokens(len(messages), start, len(ids))], left_out)

    def _plain_turn(self, messages: Sequence[Message], answer: str, ended: bool, tools: Any) -> ChatTokens:
        """Tokenize an answer as the last message of a conversation."""
        tokens = self.encode([*messages, {"role": "assistant", "content": answer}], tools)
        turn = tokens.turns[-1]
        stop = turn.stop if ended else max(i for i in range(turn.stop) if tokens.ids[i] == self.end_id)
        return ChatTokens(tokens.ids[:stop], [replace(turn, stop=stop)], tokens.left_out)

    def opened_thought(self, prompt_ids: Sequence[int]) -> str:
        """Return the `<think>` that the tokens of a prompt end with, and the white space after it; "" without one."""
        return thought_opened_by(self.tokenizer, prompt_ids)

    def _encode(self, text: str, borders: list[int], guarded: bool) -> tuple[list[int], list[int]]:
        """Tokenize `text`, and count the tokens before each border (character positions, in order)."""
        tokenizer, renumbered = self.tokenizer.tokenizer, {}
        if guarded:
            tokenizer, renumbered = self._renamed
            pieces = [self._rename(text[a:b]) for a, b in pairwise([0, *borders, len(text)])]
            text, borders = "".join(pieces), list(accumulate(map(len, pieces[:-1])))
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets  # each access builds a list
        ends = [end for _, end in offsets]
        before = [bisect_right(ends, border) for border in borders]
        if crossed_borders(offsets, borders):
            pieces = [text[a:b] for a, b in pairwise([0, *borders, len(text)])]
            piece_ids = [tokenizer.encode(piece, add_special_tokens=False).ids for piece in pieces]
            uncut = tokenizer.decode(ids, skip_special_tokens=False)
            ids = [id for ids in piece_ids for id in ids]
            before = list(accumulate(map(len, piece_ids[:-1])))
            if tokenizer.decode(ids, skip_special_tokens=False) != uncut:  # a space is put in front of each piece
                ids, before = (self._renamed_cutter if guarded else self._cutter).encode(text, borders)
                if tokenizer.decode(ids, skip_special_tokens=False) != uncut:
                    raise ChatError(
                        "a token reaches across the border of an assistant turn, where this tokenizer cannot cut"
                    )
        if guarded:
            written = sum(CONTROL <= ord(character) < CONTROL + PLANE for character in text)
            ids = [renumbered.get(id, id) for id in ids]
            if sum(id in self._special_ids for id in ids) != written:
                raise ChatError("a message spells a special token that this tokenizer cannot write as text")
        return ids, before

    @cached_property
    def _cutter(self) -> BorderCutter:
        return BorderCutter(self.tokenizer.tokenizer)

    @cached_property
    def _renamed_cutter(self) -> BorderCutter:
        return BorderCutter(self._renamed[0])

    # A message that spells a special token ----------------------------------------------------------------------------

    def _guard(self, messages: Any, tools: Any) -> tuple[Any, Any, bool]:
        """Replace special tokens that messages and tools spell by `LITERAL` characters.

        Returns:
            Messages, tools, and whether they spell any.
        """
        if not any(map(self._any_special.search, _strings([messages, tools]))):
            return messages, tools, False
        if any(ord(character) >= CONTROL for text in _strings([messages, tools]) for character in text):
            raise ChatError("a message has both special tokens and private-use characters")

        def replace(text: str) -> str:
            return self._any_special.sub(lambda match: chr(LITERAL + self._special[match[0]]), text)

        return _map_strings(messages, replace), _map_strings(tools, replace), True

    def _rename(self, text: str) -> str:
        """Write text for the renamed tokenizer: `CONTROL` for the template's tokens, the messages' spelt out again."""
        text = self._any_special.sub(lambda match: chr(CONTROL + self._special[match[0]]), text)
        contents = list(self._special)
        return re.sub(
            f"[{chr(LITERAL)}-{chr(LITERAL + PLANE - 1)}]", lambda match: contents[ord(match[0]) - LITERAL], text
        )

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[int, int]]:
        """A tokenizer whose special tokens are `CONTROL` characters, and its ids of added tokens -> ours."""
        spec = json.loads(self.tokenizer.tokenizer.to_str())
        for token in spec["added_tokens"]:
            if token["special"]:
                token["content"] = chr(CONTROL + self._special[token["content"]])
        renamed = Tokenizer.from_str(json.dumps(spec))
        vocabulary = renamed.get_vocab(with_added_tokens=True)
        return renamed, {vocabulary[token["content"]]: token["id"] for token in spec["added_tokens"]}

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        vocabulary = self.tokenizer.tokenizer.get_vocab(with_added_tokens=True)
        return frozenset(vocabulary[token] for token in self._special)

    def __getstate__(self) -> dict[str, Any]:
        rebuilt = ("_renamed", "_cutter", "_renamed_cutter")
        return {key: value for key, value in self.__dict__.items() if key not in rebuilt}


def thought_opened_by(tokenizer: TextTokenizer, prompt_ids: Sequence[int]) -> str:
    """Do `opened_thought` for the tokens of a prompt."""
    return opened_thought(tokenizer.decode(list(prompt_ids[-16:])))


def end_of_turn(tokenizer: TextTokenizer, template: ChatTemplate | None = None) -> int | None:
    """Return the token that ends an assistant turn of a template, by default the tokenizer's own.

    Returns:
        None without a template, or if the template does not show where a turn ends.
    """
    if template is None and tokenizer.chat_template is None:
        return None
    try:
        return (ChatTokenizer(tokenizer, template) if template else ChatTokenizer.of(tokenizer)).end_id
    except ChatError:
        return None


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
