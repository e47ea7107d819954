"""Build the samples of marked tokens of conversations, which is where reasoning and history are decided."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from data.prepare.conversations import Chat, question_of, without_thoughts
from nb_lightning.text.chat_tokens import ChatTokenizer, ChatTokens, TurnTokens
from nb_lightning.text.messages import ChatError, Message, outcome
from nb_lightning.text.thoughts import END_OF_THINK, split_thought, thought_of
from nb_lightning.text.turns import Turn
from nb_lightning.token_source import TRAINED

HISTORY = ("expand", "mask", "keep")  # see `SampleBuilder._samples`
Parsed = tuple[str, list[list[int]]]  # of a record: its question, and the marked tokens of each of its samples
Rendered = tuple[str, list[Turn]]


@dataclass(frozen=True)
class SampleBuilder:
    """Builds the samples of conversations that share the variables of their template.

    Attributes:
        think: False removes the reasoning.
        history: one of `HISTORY`, see `_samples`.
    """

    encoder: ChatTokenizer
    think: bool = True
    history: str = "expand"

    def build_many(self, chats: list[Chat]) -> list[Parsed | ChatError]:
        """Build the samples of each conversation; a bad one gives its error. All are rendered at once."""
        results: list[Any] = list(chats)
        if not self.think:
            results = [outcome(without_thoughts, chat, self.encoder.template.opens_thought) for chat in chats]
        numbers = [number for number, chat in enumerate(results) if isinstance(chat, Chat)]
        good = self.spell_thoughts([results[number] for number in numbers])
        encodings = self.encoder.encode_many([(chat.messages, chat.tools) for chat in good])
        for number, chat, tokens in zip(numbers, good, encodings):
            results[number] = tokens if isinstance(tokens, ChatError) else outcome(self._parse, chat, tokens)
        return results

    def _parse(self, chat: Chat, tokens: ChatTokens) -> Parsed:
        if tokens.left_out is not None:
            raise tokens.left_out
        return question_of(chat.messages[: chat.question], chat.tools), self._samples(chat, tokens)

    def spell_thoughts(self, chats: list[Chat]) -> list[Chat]:
        """Move thoughts in the content to `reasoning_content` where the template does not write them as they stand.

        A template may leave such a thought out, or write an empty one before it. Where it does not know
        `reasoning_content`, they stay. What it does shows in the conversation up to the last thought.
        """
        spelled = list(chats)
        inline = [
            i
            for i, chat in enumerate(chats)
            if any(END_OF_THINK in message["content"] and self._thought_of(message) for message in chat.messages)
        ]
        texts = self._render([chats[i] for i in inline])
        changed = [i for i, text in zip(inline, texts) if not self._writes_as_it_stands(chats[i], text)]
        split = [replace(chats[i], messages=[self._split_thought(m) for m in chats[i].messages]) for i in changed]
        stands, moved = (self._render([self._up_to_last_thought(chat) for chat in side])
                         for side in ([chats[i] for i in changed], split))  # fmt: skip
        for i, chat, stand, move in zip(changed, split, stands, moved):
            if self._writes_last_thought(chat, move) or not self._writes_last_thought(chats[i], stand):
                spelled[i] = chat
        return spelled

    def _render(self, chats: list[Chat]) -> list[Rendered | ChatError]:
        return self.encoder.template.render_many([(chat.messages, chat.tools) for chat in chats])

    def _thought_of(self, message: Message) -> str:
        return thought_of(message, self.encoder.template.opens_thought)

    def _split_thought(self, message: Message) -> dict[str, Any]:
        return split_thought(message, self.encoder.template.opens_thought)

    def _up_to_last_thought(self, chat: Chat) -> Chat:
        last = max(i for i, message in enumerate(chat.messages) if self._thought_of(message))
        return replace(chat, messages=chat.messages[: last + 1])

    def _writes_last_thought(self, chat: Chat, rendered: Rendered | ChatError) -> bool:
        """Whether the text of a conversation up to its last thought has that thought."""
        if isinstance(rendered, ChatError):
            return False
        text, turns = rendered
        return self._thought_of(chat.messages[turns[-1].index]) in text[turns[-1].start : turns[-1].end]

    def _writes_as_it_stands(self, chat: Chat, rendered: Rendered | ChatError) -> bool:
        """Whether a text has each content that begins with a thought, and no other thought beside it."""
        if isinstance(rendered, ChatError):
            return True  # encoding it raises the error
        text, turns = rendered
        for turn in turns:
            message, written = chat.messages[turn.index], text[turn.start : turn.end]
            content = message["content"].strip()
            is_inline = END_OF_THINK in content and not message.get("reasoning_content") and self._thought_of(message)
            if is_inline and (content not in written or written.count(END_OF_THINK) > content.count(END_OF_THINK)):
                return False
        return True

    def _samples(self, chat: Chat, tokens: ChatTokens) -> list[list[int]]:
        """Build the samples of a conversation.

        Many templates leave the reasoning out of turns before the last question. To train on such a turn would teach
        the model to answer without thinking; to train on a later turn of the same exchange would show it a prompt that
        no generation has. `history` decides what happens to both:

        * "expand" gives each a sample that ends with it, where it is the last turn and keeps its reasoning;
        * "mask" does not train on them;
        * "keep" trains on them as they are.

        Args:
            tokens: of the whole conversation.

        Raises:
            ChatError: the template or the tokenizer cannot write the conversation, or no turn is left to train on.
        """
        turns = [turn for turn in tokens.turns if turn.index in chat.trained]
        changed = [] if self.history == "keep" else self._changed_by_history(chat, tokens)
        samples = []
        if self.history == "expand":
            for turn in changed:
                beginning = self._up_to(chat, turn)
                if not beginning.turns[-1].thought:
                    raise ChatError("the template leaves out the reasoning", f"message {turn.index}")
                samples.append(mark_trained(beginning, beginning.turns[-1:]))
        if trained := [turn for turn in turns if turn not in changed]:
            samples.append(mark_trained(tokens, trained))
        if not samples:
            raise ChatError("the template leaves out the reasoning of every turn to train on")
        return samples

    def _changed_by_history(self, chat: Chat, tokens: ChatTokens) -> list[TurnTokens]:
        """List the turns to train on that lack their reasoning, or whose prompt lacks that of its own exchange."""
        changed = []
        is_lost = False  # reasoning after the last question so far
        previous = 0
        for turn in tokens.turns:
            is_lost = is_lost and all(message["role"] != "user" for message in chat.messages[previous : turn.index])
            is_changed = not turn.thought or (is_lost and not self._keeps_prompt(chat, tokens, turn))
            if turn.index in chat.trained and is_changed:
                changed.append(turn)
            is_lost, previous = is_lost or not turn.thought, turn.index
        return changed

    def _keeps_prompt(self, chat: Chat, tokens: ChatTokens, turn: TurnTokens) -> bool:
        """Whether the tokens before a turn are those of a conversation that ends with it."""
        beginning = self._up_to(chat, turn)
        return beginning.ids[: beginning.turns[-1].start] == tokens.ids[: turn.start]

    def _up_to(self, chat: Chat, turn: TurnTokens) -> ChatTokens:
        return self.encoder.encode(chat.messages[: turn.index + 1], chat.tools)


def mark_trained(tokens: ChatTokens, turns: list[TurnTokens]) -> list[int]:
    """Build the marked tokens of a sample that trains on `turns` and ends with the last of them."""
    marked = tokens.ids[: turns[-1].stop]
    for turn in turns:
        for place in range(max(turn.start, 1), turn.stop):  # no token precedes the first one to predict it
            marked[place] |= TRAINED
    return marked
