"""Conversations whose first written token would merge with the prompt's last: cut there, with no space made up."""

from __future__ import annotations

import json
import pickle
import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from nb_lightning.text.borders import BorderCutter
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.tokenizer import TextTokenizer, text_tokenizer

# As Nanbeige 4.2's: the prompt opens a thought, and a message without reasoning has an empty one.
OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
SPACES: dict[str, tuple[Any, Any]] = {
    "prepend": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "always": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
    "words": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True)),
    "never": (normalizers.Replace(" ", "▁"), None),
    "bytes": (None, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "bytes with a space": (None, pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(True, use_regex=False)])),
}


@pytest.fixture(params=SPACES)
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    """A vocabulary that merges new lines, also with letters on both sides of a border."""
    by_bytes = request.param.startswith("bytes")
    space, line = ("Ġ", "Ċ") if by_bytes else ("▁", "\n")
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) if by_bytes else [f"<0x{b:02X}>" for b in range(256)]
    tokens += [t for t in [space, line, *"abcdefghijklmnopqrstuvwxyz<>/|_"] if t not in tokens]
    merges = [(line, line), (line * 2, line * 2), (space, space), (space, line), (space, "h"), ("h", "e"), (line, "a")]
    tokens += [a + b for a, b in merges]
    model = models.BPE({t: i for i, t in enumerate(tokens)}, merges, byte_fallback=not by_bytes)
    tokenizer = Tokenizer(model)
    normalizer, pre_tokenizer = SPACES[request.param]
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    replaced = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [] if request.param == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.ByteLevel() if by_bytes else decoders.Sequence([*replaced, *strip])
    for token in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        tokenizer.add_tokens([AddedToken(token, special="im" in token, normalized=False)])
    return text_tokenizer(tokenizer, {"eos_token": "<|im_end|>"}, OPENS, "test")


def written(chat: ChatTokenizer, answer: dict[str, str]) -> tuple[list[int], list[str]]:
    """The tokens of the prompt as `encode` has them, and the tokens of the answer."""
    encoded = chat.encode([{"role": "user", "content": "hi"}, {"role": "assistant", **answer}])
    (turn,) = encoded.turns
    ids = encoded.ids[turn.start : turn.stop]
    tokens = [str(chat.tokenizer.tokenizer.id_to_token(id)).replace("Ċ", "\n").replace("Ġ", "▁") for id in ids]
    return encoded.ids[: turn.start], tokens


def test_an_empty_thought_after_a_prompt_that_opens_one(tokenizer: TextTokenizer) -> None:
    chat = ChatTokenizer.of(tokenizer)
    assert any("\n\n" in token or "ĊĊ" in token for token in tokenizer.tokenizer.encode("<think>\n\n</think>").tokens)
    prompt, tokens = written(chat, {"content": "he"})
    assert prompt == chat.prompt([{"role": "user", "content": "hi"}])
    assert tokens[:2] == ["\n", "</think>"] and tokens[-1] == "<|im_end|>"


def test_a_thought_that_merges_with_the_prompt(tokenizer: TextTokenizer) -> None:
    chat = ChatTokenizer.of(tokenizer)
    prompt, tokens = written(chat, {"content": "he", "reasoning_content": "a he"})
    assert prompt == chat.prompt([{"role": "user", "content": "hi"}])
    assert tokens[:2] == ["a", "▁"] or tokens[:3] == ["a", "▁h", "e"] or tokens[:2] == ["a", "▁he"]


def test_without_a_merge_at_the_border_nothing_is_cut(tokenizer: TextTokenizer) -> None:
    chat = ChatTokenizer.of(tokenizer)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "b", "reasoning_content": "he"}]
    plain = tokenizer.tokenizer.encode(chat.template.render(messages), add_special_tokens=False).ids
    assert chat.encode(messages).ids == plain
    assert BorderCutter(tokenizer.tokenizer).encode(chat.template.render(messages), [])[0] == plain


def test_borders_next_to_each_other(tokenizer: TextTokenizer) -> None:
    text, borders = "a\n\n\n\n\n\nhe<think>\n\n he", [2, 3, 5, 8, 17]
    ids, before = BorderCutter(tokenizer.tokenizer).encode(text, borders)
    assert before == sorted(before) and len({*before}) == len(borders)
    whole = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == tokenizer.decode(whole)
    first = tokenizer.tokenizer.encode(text[:2], add_special_tokens=False).ids
    assert ids[: before[0]] == first


def test_conversations_keep_their_text_and_their_prompt(tokenizer: TextTokenizer) -> None:
    chat = pickle.loads(pickle.dumps(ChatTokenizer.of(tokenizer)))
    rng = random.Random(0)
    pieces = ["\n", "\n\n", " ", "  ", "a", "he", "x", "é", "你好", "</think>", "\n\n\n\n", "<|im_end|>"]

    def text(allowed: list[str]) -> str:
        return "".join(rng.choices(allowed, k=rng.randrange(6)))

    for n in range(80):
        allowed = pieces if n % 4 == 0 else pieces[:-1]  # now and then a message spells a special token
        messages: list[Any] = []
        for _ in range(rng.randint(1, 3)):
            messages.append({"role": "user", "content": text(allowed)})
            answer = {"content": text(allowed), "reasoning_content": rng.choice(["", text(allowed[:9])])}
            messages.append({"role": "assistant", **answer})
        encoded = chat.encode(messages)
        first = encoded.turns[0].start
        assert encoded.ids[:first] == chat.prompt(messages[:1])
        rendered = chat.template.render(messages)
        if not any("<|im_end|>" in json.dumps(m) for m in messages):
            plain = tokenizer.tokenizer.encode(rendered, add_special_tokens=False).ids
            assert tokenizer.decode(encoded.ids) == tokenizer.decode(plain)
        assert tokenizer.decode(encoded.ids).replace(" ", "") == rendered.replace(" ", "")
        for turn in encoded.turns:
            prompt = tokenizer.decode(chat.prompt(messages[: turn.index]))
            assert tokenizer.decode(encoded.ids[: turn.start]) == prompt
