"""Tokenize a rendered conversation in which messages may spell special tokens.

A special token that the template wrote becomes a control token; one that a message spells becomes plain text. To tell
them apart, the messages are rendered with private-use characters in place of what they spell (`guard`), and the text is
tokenized by a copy of the tokenizer whose special tokens are other private-use characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from tokenizers import Tokenizer

from nb_lightning.text.borders import BorderCutter, Tokens, crossed_borders, tokenize, tokens_before
from nb_lightning.text.messages import ChatError

# CONTROL + n is the special token number n where the template wrote it, LITERAL + n where a message did.
CONTROL, LITERAL, PLANE = 0xF0000, 0x100000, 0xFFFE


class GuardedTokenizer:
    """A tokenizer that keeps text apart from special tokens, and cuts tokens at borders.

    Safe to pickle and to carry across a fork.

    Attributes:
        added: the texts of the tokens that stand for themselves, special or not.
        added_ids: their ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.added, self.added_ids = tuple(token.content for token in added.values()), frozenset(added)
        self._special = {token.content: number for number, token in enumerate(t for t in added.values() if t.special)}
        if len(self._special) > PLANE:
            raise ValueError(
                f"the tokenizer has {len(self._special)} special tokens; more than {PLANE} cannot be told apart"
            )
        longest_first = sorted(self._special, key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def guard(self, value: Any) -> tuple[Any, bool]:
        """Replace special tokens that the strings of a value spell by `LITERAL` characters.

        Returns:
            The value, and whether it spells any. If so, `require_unguarded` is for all that is rendered with it.
        """
        if not any(map(self._any_special.search, _strings(value))):
            return value, False

        def replace(text: str) -> str:
            return self._any_special.sub(lambda match: chr(LITERAL + self._special[match[0]]), text)

        return _map_strings(value, replace), True

    @staticmethod
    def require_unguarded(value: Any) -> None:
        """Refuse what `guard` could not tell from its own characters.

        Raises:
            ChatError: the value has private-use characters.
        """
        if any(ord(character) >= CONTROL for text in _strings(value) for character in text):
            raise ChatError("a conversation has both special tokens and private-use characters")

    def encode(self, text: str, borders: list[int], guarded: bool) -> tuple[list[int], list[int]]:
        """Tokenize `text`, and count the tokens before each border (character positions, in order).

        Args:
            guarded: `text` was rendered from messages that `guard` changed.

        Raises:
            ChatError: a token reaches across a border and cannot be cut, or a message's text cannot be written.
        """
        if not guarded:
            return _encode(self.tokenizer, text, borders, lambda: self._cutter)
        tokenizer, renumbered = self._renamed
        pieces = [self._rename(text[a:b]) for a, b in pairwise([0, *borders, len(text)])]
        text, borders = "".join(pieces), list(accumulate(map(len, pieces[:-1])))
        ids, before = _encode(tokenizer, text, borders, lambda: self._renamed_cutter)
        ids = [renumbered.get(id, id) for id in ids]
        written = sum(CONTROL <= ord(character) < CONTROL + PLANE for character in text)
        if sum(id in self._special_ids for id in ids) != written:
            raise ChatError("a message spells a special token that this tokenizer cannot write as text")
        return ids, before

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
        spec = json.loads(self.tokenizer.to_str())
        for token in spec["added_tokens"]:
            if token["special"]:
                token["content"] = chr(CONTROL + self._special[token["content"]])
        renamed = Tokenizer.from_str(json.dumps(spec))
        vocabulary = renamed.get_vocab(with_added_tokens=True)
        return renamed, {vocabulary[token["content"]]: token["id"] for token in spec["added_tokens"]}

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        return frozenset(vocabulary[token] for token in self._special)

    @cached_property
    def _cutter(self) -> BorderCutter:
        return BorderCutter(self.tokenizer)

    @cached_property
    def _renamed_cutter(self) -> BorderCutter:
        return BorderCutter(self._renamed[0])

    def __getstate__(self) -> dict[str, Any]:
        rebuilt = ("_renamed", "_cutter", "_renamed_cutter")
        return {key: value for key, value in self.__dict__.items() if key not in rebuilt}


def _encode(
    tokenizer: Tokenizer, text: str, borders: list[int], cutter: Callable[[], BorderCutter]
) -> tuple[list[int], list[int]]:
    """Tokenize `text` so that no token reaches across a border, and count the tokens before each."""
    tokens = tokenize(tokenizer, text)
    if not crossed_borders(tokens, borders):
        return [id for id, *_ in tokens], tokens_before(tokens, borders)
    uncut = tokenizer.decode([id for id, *_ in tokens], skip_special_tokens=False)
    pieces: Tokens = []
    for start, stop in pairwise([0, *borders, len(text)]):
        pieces += [(id, start + a, start + b) for id, a, b in tokenize(tokenizer, text[start:stop])]
    ids, before = [id for id, *_ in pieces], tokens_before(pieces, borders)
    if tokenizer.decode(ids, skip_special_tokens=False) != uncut:  # a space is put in front of each piece
        ids, before = cutter().encode(text, borders)
        if tokenizer.decode(ids, skip_special_tokens=False) != uncut:
            raise ChatError("a token reaches across the border of an assistant turn, where this tokenizer cannot cut")
    return ids, before


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
