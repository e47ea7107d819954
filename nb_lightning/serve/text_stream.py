"""From the tokens of a row to text that may be shown: whole characters, no stop string, parts by their tags."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

from nb_lightning.generation.decoder import NewToken

REASONING, TOOL_CALL = "<think>", "<tool_call>"
END = {REASONING: "</think>", TOOL_CALL: "</tool_call>"}
FIELD = {"": "content", REASONING: "reasoning_content", TOOL_CALL: "tool_calls"}


class TokenBytes:
    """The bytes that a token stands for: a character's bytes may be spread over several tokens.

    Knows byte-level vocabularies (GPT-2 and its heirs) and SentencePiece ones ("▁" for a space, <0xE4> for a byte).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._byte_level = "ByteLevel" in repr(tokenizer.decoder)
        # GPT-2's alphabet: printable bytes are their own character, the others come after character 255 in order.
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


def unfinished(text: str, words: Iterable[str]) -> int:
    """How many characters at the end of `text` could be the beginning of one of `words`."""
    return max(
        (k for word in words for k in range(1, min(len(word), len(text) + 1)) if text.endswith(word[:k])), default=0
    )


class TextStream:
    """The text of one row as its tokens come.

    Args:
        stop: the row ends before the first of these strings.

    Attributes:
        finish_reason: "" while the row goes on, then "stop" or "length".
        tokens: how many were added.
    """

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str] = ()) -> None:
        self.finish_reason = ""
        self.tokens = 0
        self._bytes, self._stop = token_bytes, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps the beginning of a character
        self._held = ""  # may become a stop string
        self._shown = 0  # characters returned
        self._waiting: deque[tuple[int, NewToken]] = deque()  # tokens and the characters before each

    def add(self, token: NewToken) -> tuple[str, list[tuple[int, NewToken]]]:
        """What can be shown now: text, and the tokens that began in it with the number of characters before each."""
        self.tokens += 1
        data = b""
        if token.finish_reason != "stop":  # a stop token is no text
            data = self._bytes(token.id)
            # What the last token began and this one does not go on with becomes one replacement character.
            broken = bool(self._decoder.getstate()[0] and data and data[0] & 0xC0 != 0x80)
            self._waiting.append((self._shown + len(self._held) + broken, token))
        self._held += self._decoder.decode(data, final=bool(token.finish_reason))
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        show = min(found) if found else len(self._held)
        if found or token.finish_reason:
            self.finish_reason = "stop" if found else token.finish_reason
        else:
            show -= unfinished(self._held, self._stop)
        text, self._held = self._held[:show], self._held[show:]
        self._shown += show
        tokens = []
        while self._waiting and (self._waiting[0][0] < self._shown or (self.finish_reason and not found)):
            tokens.append(self._waiting.popleft())
        return text, tokens


class Parts:
    """Splits a reply by its tags as its text comes, into pairs of OpenAI's field of a message and text for it.

    Reasoning is returned as it comes, a tool call when it is whole; one that never ends is content.

    Args:
        tags: which of REASONING and TOOL_CALL to look for.
        inside: the tag that the prompt has opened already.
    """

    def __init__(self, tags: Sequence[str] = (), inside: str = "") -> None:
        self._tags, self._inside = tags, inside
        self._held = ""
        self._strip = bool(inside)  # the line breaks around tags belong to neither side

    def add(self, text: str, final: bool) -> list[tuple[str, str]]:
        self._held += text
        parts: list[tuple[str, str]] = []
        while True:
            words = [END[self._inside]] if self._inside else self._tags
            found = [(at, word) for word in words if (at := self._held.find(word)) >= 0]
            if not found:
                break
            at, word = min(found)
            before, self._held = self._held[:at], self._held[at + len(word) :]
            self._show(parts, before.rstrip("\n") if self._inside else before)
            self._inside = "" if self._inside else word
            self._strip = True
        if self._inside == TOOL_CALL and not final:
            return parts
        if self._inside == TOOL_CALL:
            self._held, self._inside, self._strip = TOOL_CALL + self._held, "", False
        shown = self._held if final else self._held[: len(self._held) - unfinished(self._held, words)]
        if self._inside and not final:
            shown = shown.rstrip("\n")
        self._held = self._held[len(shown) :]
        self._show(parts, shown)
        return parts

    def _show(self, parts: list[tuple[str, str]], text: str) -> None:
        if self._strip:
            text = text.lstrip("\n")
            self._strip = not text
        if text:
            parts.append((FIELD[self._inside], text))
