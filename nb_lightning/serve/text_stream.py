"""Turn the tokens of a row into text for the client: whole characters, without stop strings, split at tags."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

from nb_lightning.generation.decoder import NewToken
from nb_lightning.text.thoughts import END_OF_THINK, THINK
from nb_lightning.text.tool_calls import CLOSE, OPEN, CallEnd

REASONING, TOOL_CALL = THINK, OPEN
END = {REASONING: END_OF_THINK, TOOL_CALL: CLOSE}
FIELD = {"": "content", REASONING: "reasoning_content", TOOL_CALL: "tool_calls"}


class TokenBytes:
    """Maps a token id to its bytes; a character's bytes may be spread over several tokens.

    Supports byte-level vocabularies (GPT-2's scheme) and SentencePiece ones ("▁" for a space, <0xE4> for a byte).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._byte_level = "ByteLevel" in repr(tokenizer.decoder)
        # GPT-2's alphabet: a printable byte is its own character, the others are characters 256, 257, ... in order.
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self._bytes = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

    def __call__(self, id: int) -> bytes:
        token = self._tokenizer.id_to_token(id)
        if token is None:  # a row of the head that no token uses
            return b""
        if id in self._added:
            return token.encode()
        if self._byte_level and all(char in self._bytes for char in token):
            return bytes(self._bytes[char] for char in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()


def partial_match(text: str, markers: Iterable[str]) -> int:
    """Count the characters at the end of `text` that could be the beginning of one of `markers`."""
    lengths = (
        length
        for marker in markers
        for length in range(1, min(len(marker), len(text) + 1))
        if text.endswith(marker[:length])
    )
    return max(lengths, default=0)


class TextStream:
    """The text of one row, token by token.

    Args:
        stop: the row ends before the first of these strings.

    Attributes:
        finish_reason: "" while the row is decoded, then "stop" or "length".
        tokens: the number of tokens so far.
    """

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str] = ()) -> None:
        self.finish_reason = ""
        self.tokens = 0
        self._bytes, self._stop = token_bytes, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds an incomplete character back
        self._pending = ""  # may be the beginning of a stop string
        self._returned = 0  # characters
        self._waiting: deque[tuple[int, NewToken]] = deque()  # (characters before it, token)

    def add(self, token: NewToken) -> tuple[str, list[tuple[int, NewToken]]]:
        """Add a token; return the text that is final now, and (offset in characters, token) of the tokens in it."""
        self.tokens += 1
        data = b""
        if token.finish_reason != "stop":  # a stop token has no text
            data = self._bytes(token.id)
            # A character that the last token began and this one does not continue becomes one replacement character.
            broken = bool(self._decoder.getstate()[0] and data and data[0] & 0xC0 != 0x80)
            self._waiting.append((self._returned + len(self._pending) + broken, token))
        self._pending += self._decoder.decode(data, final=bool(token.finish_reason))
        stop_places = [place for place in map(self._pending.find, self._stop) if place >= 0]
        final = min(stop_places) if stop_places else len(self._pending)
        if stop_places or token.finish_reason:
            self.finish_reason = "stop" if stop_places else token.finish_reason
        else:
            final -= partial_match(self._pending, self._stop)
        text, self._pending = self._pending[:final], self._pending[final:]
        self._returned += final
        tokens = []
        while self._waiting and (self._waiting[0][0] < self._returned or (self.finish_reason and not stop_places)):
            tokens.append(self._waiting.popleft())
        return text, tokens


class TagSplitter:
    """Splits the text of a reply at its tags into pairs: a field of OpenAI's message, and text for it.

    Reasoning is returned as it comes, a tool call when it is complete. A tool call that never ends is content.
    nb_lightning/text/tool_calls.py says where a call ends.

    Args:
        tags: the ones of REASONING and TOOL_CALL to look for.
        inside: the tag that the prompt has opened already, or "".
    """

    def __init__(self, tags: Sequence[str] = (), inside: str = "") -> None:
        self._tags, self._inside = tags, inside
        self._call_end = CallEnd()
        self._pending = ""  # a call that is not closed, or what may be the beginning of a tag
        self._strip = bool(inside)  # line breaks around tags belong to neither side

    def add(self, text: str, final: bool) -> list[tuple[str, str]]:
        """Add text; with `final` it is the last. Return the pairs that are complete now."""
        self._pending += text
        pairs: list[tuple[str, str]] = []
        while (next_tag := self._next_tag(final)) is not None:
            place, tag = next_tag
            before, self._pending = self._pending[:place], self._pending[place + len(tag) :]
            if self._inside == TOOL_CALL:
                pairs.append((FIELD[TOOL_CALL], before))
            else:
                self._append(pairs, before.rstrip("\n") if self._inside else before)
            self._inside = "" if self._inside else tag
            self._strip = True
            self._call_end.begin()
        if self._inside == TOOL_CALL and not final:
            return pairs
        tags = [END[self._inside]] if self._inside else self._tags
        if self._inside == TOOL_CALL:
            self._pending, self._inside, self._strip = TOOL_CALL + self._pending, "", False
        text = self._pending if final else self._pending[: len(self._pending) - partial_match(self._pending, tags)]
        if self._inside and not final:
            text = text.rstrip("\n")
        self._pending = self._pending[len(text) :]
        self._append(pairs, text)
        return pairs

    def _next_tag(self, final: bool) -> tuple[int, str] | None:
        """Find the next tag of the pending text: its position, and which it is."""
        if self._inside == TOOL_CALL:
            place = self._call_end.find(self._pending, is_complete=final)
            return (place, CLOSE) if place >= 0 else None
        tags = [END[self._inside]] if self._inside else self._tags
        return min(((place, tag) for tag in tags if (place := self._pending.find(tag)) >= 0), default=None)

    def _append(self, pairs: list[tuple[str, str]], text: str) -> None:
        if self._strip:
            text = text.lstrip("\n")
            self._strip = not text
        if text:
            pairs.append((FIELD[self._inside], text))
