"""Turn conversations into tokens, and find which tokens the assistant wrote.

A special token that the template wrote becomes a control token; one that a message, a tool or a template's variable
spells becomes plain text (nb_lightning/text/guarded.py). So a message cannot end a turn, or begin another, by spelling
`<|im_end|>`. Added tokens that are not special (`<think>` in Qwen's tokenizer) are text that any message may write.

No token reaches across the end of a prompt, as in generation, where the prompt's tokens are fixed before the first new
token is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.text.guarded import GuardedTokenizer
from nb_lightning.text.left_out import compare_turn, missing_part, missing_tool
from nb_lightning.text.messages import ChatError, Message, or_raise, outcome
from nb_lightning.text.thoughts import END_OF_THINK, THINK, closed_thought, empty_thought, opened_thought
from nb_lightning.text.tokenizer import TextTokenizer
from nb_lightning.text.turns import Turn
from nb_lightning.text.variables import Variables


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

    def __init__(
        self, tokenizer: TextTokenizer, template: ChatTemplate, guarded: GuardedTokenizer | None = None
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._guarded = guarded or GuardedTokenizer(tokenizer.tokenizer)
        variables, self._variables_spell_tokens = self._guarded.guard(template.variables)
        self._rendering = template.with_variables(variables) if self._variables_spell_tokens else template

    @classmethod
    def of(cls, tokenizer: TextTokenizer, template: str | None = None, now: str | None = None) -> ChatTokenizer:
        """Choose the template: `template` (Jinja source), else the tokenizer's, else ChatML.

        Args:
            now: see `ChatTemplate`.
        """
        source = template or tokenizer.chat_template or ChatTemplate.chatml().source
        return cls(tokenizer, ChatTemplate(source, tokenizer.special, now))

    def with_variables(self, variables: Variables) -> ChatTokenizer:
        """Return the same with further variables of the template, which win over its own.

        Raises:
            ChatError: as `ChatTemplate.with_variables`.
        """
        if not variables:
            return self
        return ChatTokenizer(self.tokenizer, self.template.with_variables(variables), self._guarded)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, require_tools: bool = False
    ) -> list[int]:
        """Tokenize a conversation up to where the assistant begins to write.

        Raises:
            ChatError: as `ChatTemplate.render`; or, with `require_tools`, the template leaves out a tool.
        """
        messages, tools, guarded = self._guard(messages, tools)
        text = self._rendering.render(messages, tools, add_generation_prompt=True)
        if require_tools and (missing := missing_tool(tools, text)):
            raise missing
        return self._guarded.encode(text, [], guarded)[0]

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
        rendered = iter(self._rendering.render_many([(messages, tools) for messages, tools, _ in valid]))
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
        positions = [position for turn in turns for position in (turn.start, turn.end)]
        ids, borders = self._guarded.encode(text, positions, guarded)
        tokens = []
        for number, turn in enumerate(turns):
            written = text[turn.start : turn.end]
            if not written.rstrip().endswith(self._guarded.added):
                raise ChatError(
                    "an assistant turn does not end in a token of its own",
                    f"message {turn.index}",
                    f", but in {written[-20:]!r}; is the template this tokenizer's?",
                )
            message = messages[turn.index]
            opens = END_OF_THINK in (message.get("content") or "") and self.template.opens_thought
            has_thought, missing = compare_turn(message, turn.index, written, opens)
            left_out = left_out or missing
            start, stop = borders[2 * number : 2 * number + 2]
            tokens.append(TurnTokens(turn.index, start, stop, has_thought))
        spans = {turn.index: (turn.start, turn.end) for turn in turns}
        return ChatTokens(ids, tokens, left_out or missing_part(messages, tools, text, spans))

    @cached_property
    def end_id(self) -> int:
        """The token that ends an assistant turn, at which generation stops.

        Raises:
            ChatError: as `encode`, for a small conversation.
        """
        return self._end_id(None)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """All tokens that end an assistant turn: another template may write conversations with tools.

        Raises:
            ChatError: as `end_id`. If only the template for tools does not show where a turn ends, its end is left out.
        """
        with_tools = outcome(self.end_id_of, True)
        return tuple(dict.fromkeys([self.end_id, *([] if isinstance(with_tools, ChatError) else [with_tools])]))

    def end_id_of(self, with_tools: bool) -> int:
        """Return the token that ends an assistant turn of a conversation with or without tools."""
        return self._end_id_with_tools if with_tools and self.template.differs_with_tools else self.end_id

    @cached_property
    def _end_id_with_tools(self) -> int:
        return self._end_id([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])

    def _end_id(self, tools: list[Any] | None) -> int:
        tokens = self.encode([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}], tools)
        written = tokens.ids[tokens.turns[0].start : tokens.turns[0].stop]
        return next(id for id in reversed(written) if id in self._guarded.added_ids)  # white space may follow it

    def answered(
        self, messages: Sequence[Message], answer: str, ended: bool = True, tools: Sequence[Any] | None = None
    ) -> ChatTokens:
        """Tokenize a prompt and the exact text of an answer to it; the one turn is the answer.

        Where the prompt opens a thought, or closes an empty one, the answer may bring it again: it is written once.
        Where it opens one, an answer without any thought is written as the template writes a plain turn, not as the
        beginning of a thought.

        Args:
            answer: as the model wrote it, reasoning and calls included.
            ended: append the token that ends a turn.

        Raises:
            ChatError: as `ChatTemplate.render`, and `end_id`; or a thought, where the prompt closes it.
        """
        (asked, text), guarded_tools, guarded = self._guard([messages, answer], tools)
        prompt = self._rendering.render(asked, guarded_tools, add_generation_prompt=True)
        opening, closed = opened_thought(prompt), closed_thought(prompt)
        if (opening or closed) and text.lstrip().startswith(THINK):
            text = text.lstrip()
        if opening:
            if text.startswith(THINK):
                text = text.removeprefix(opening if text.startswith(opening) else THINK)
            elif END_OF_THINK not in text:
                return self._plain_turn(messages, answer, ended, tools)
        elif closed:
            text = text.removeprefix(closed if text.startswith(closed) else empty_thought(text))
            if text.startswith(THINK):
                raise ChatError("reasoning where the generation prompt closes the thought")
        ids, (start,) = self._guarded.encode(prompt + text, [len(prompt)], guarded)
        ids = [*ids, self.end_id_of(bool(tools))] if ended else ids
        left_out = missing_part(asked, guarded_tools, prompt, {})
        return ChatTokens(ids, [TurnTokens(len(messages), start, len(ids))], left_out)

    def _plain_turn(self, messages: Sequence[Message], answer: str, ended: bool, tools: Any) -> ChatTokens:
        """Tokenize an answer as the last message of a conversation."""
        tokens = self.encode([*messages, {"role": "assistant", "content": answer}], tools)
        turn = tokens.turns[-1]
        end_id = self.end_id_of(bool(tools))
        stop = turn.stop if ended else max(i for i in range(turn.stop) if tokens.ids[i] == end_id)
        return ChatTokens(tokens.ids[:stop], [replace(turn, stop=stop)], tokens.left_out)

    def _guard(self, messages: Any, tools: Any) -> tuple[Any, Any, bool]:
        """Guard messages and tools; return them, and whether they or the template's variables spell special tokens."""
        guarded, spell = self._guarded.guard([messages, tools])
        if is_guarded := spell or self._variables_spell_tokens:
            self._guarded.require_unguarded([messages, tools, self.template.variables])
        return *guarded, is_guarded

    def opened_thought(self, prompt_ids: Sequence[int]) -> str:
        """Return the `<think>` that the tokens of a prompt end with, and the white space after it; "" without one."""
        return thought_opened_by(self.tokenizer, prompt_ids)


def thought_opened_by(tokenizer: TextTokenizer, prompt_ids: Sequence[int]) -> str:
    """Do `opened_thought` for the tokens of a prompt."""
    return opened_thought(tokenizer.decode(list(prompt_ids[-16:])))


def ends_of_turn(tokenizer: TextTokenizer, template: ChatTemplate | None = None) -> tuple[int, ...]:
    """Return the tokens that end an assistant turn of a template, by default the tokenizer's own.

    Returns:
        Several, the usual one first, if conversations with tools end otherwise; none without a template, or if the
        template does not show where a turn ends.
    """
    if template is None and tokenizer.chat_template is None:
        return ()
    try:
        return (ChatTokenizer(tokenizer, template) if template else ChatTokenizer.of(tokenizer)).end_ids
    except ChatError:
        return ()
