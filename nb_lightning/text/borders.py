"""Tokenize a text so that no token reaches across certain borders.

The text before a border is tokenized as a prompt is, and the text after it as what continues it: tokenizers that put a
space in front of a text put none there.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

Tokens = list[tuple[int, int, int]]  # id, start, end (character positions)


def tokenize(tokenizer: Tokenizer, text: str) -> Tokens:
    """Tokenize a text without special tokens of the tokenizer's own around it."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return [(id, start, end) for id, (start, end) in zip(encoding.ids, encoding.offsets)]


def tokens_before(tokens: Tokens, borders: Sequence[int]) -> list[int]:
    """Count the tokens that end at or before each border."""
    ends = [end for *_, end in tokens]
    return [bisect_right(ends, border) for border in borders]


def crossed_borders(tokens: Tokens, borders: Sequence[int]) -> list[int]:
    """List the borders inside a token."""
    before = tokens_before(tokens, borders)
    return [border for n, border in zip(before, borders) if n < len(tokens) and tokens[n][1] < border]


class BorderCutter:
    """A tokenizer that can cut tokens, safe to carry across a fork."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self._unprefixed = tokenizer, _without_prefix(tokenizer)

    def encode(self, text: str, borders: Sequence[int]) -> tuple[list[int], list[int]]:
        """Tokenize `text`, cut only where a token would reach across a border.

        Returns:
            The ids, and the number of tokens before each border (character positions, in order).
        """
        cuts: list[int] = []
        while True:
            tokens: Tokens = []
            for start, stop in pairwise([0, *cuts, len(text)]):
                part = self._continue(text[start:stop]) if start else tokenize(self.tokenizer, text[:stop])
                tokens += [(id, start + a, start + b) for id, a, b in part]
            crossed = crossed_borders(tokens, borders)
            if not crossed:
                return [id for id, *_ in tokens], tokens_before(tokens, borders)
            cuts = sorted({*cuts, *crossed})  # cuts only grow, because no token reaches across one

    def _continue(self, text: str) -> Tokens:
        """Tokenize text that continues another: no space in front of it, but one after added tokens as ever."""
        tokens = tokenize(self._unprefixed, text)
        added = self._unprefixed.get_added_tokens_decoder()
        for n, (id, start, end) in enumerate(tokens):
            if id in added and text[start:end].strip() == added[id].content.strip():
                rest = tokenize(self.tokenizer, text[start:])
                return [*tokens[:n], *((id, start + a, start + b) for id, a, b in rest)]
        return tokens


def _without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """Copy a tokenizer; the copy never puts a space in front of a text."""
    content = json.loads(tokenizer.to_str())
    for step in ("normalizer", "pre_tokenizer"):
        content[step] = _step_without_prefix(content[step])
    return Tokenizer.from_str(json.dumps(content))


def _step_without_prefix(step: Any) -> Any:
    """Change a normalizer or pre-tokenizer, as tokenizer.json spells it; None for one that only adds a prefix."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    for key in ("normalizers", "pretokenizers"):
        if key in step:
            changed = [_step_without_prefix(part) for part in step[key]]
            step = {**step, key: [part for part in changed if part is not None]}
    return step
