"""Text from tokens, stop strings, tags: against the whole text, however it is cut into tokens and pieces."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nb_lightning.generation.decoder import NewToken
from nb_lightning.rewards.tool_call import calls_of
from nb_lightning.serve.replies import Choice, Delta
from nb_lightning.serve.text_stream import REASONING, TOOL_CALL, TagSplitter, TextStream, TokenBytes, partial_match
from nb_lightning.text.tokenizer import byte_tokenizer
from nb_lightning.text.tool_calls import parse_call

SAMPLE = "Zürich, 東京 and 🏔🏔: <think>naïve</think> résumé -- ééé. " * 3


def byte_level_bpe() -> Tokenizer:
    """Tokens of several bytes that begin and end inside characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([SAMPLE], trainers.BpeTrainer(vocab_size=264, initial_alphabet=alphabet))
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As Llama 2's: "▁" for a space, bytes for what is not in the vocabulary."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "n", "d", "▁and", "é", "▁é"]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


TOKENIZERS = {"bytes": byte_tokenizer, "bpe": byte_level_bpe, "sentencepiece": sentencepiece_like}


def tokens(ids: list[int], end: str = "length") -> list[NewToken]:
    return [NewToken(0, id, 0.0, end if i == len(ids) - 1 else "", []) for i, id in enumerate(ids)]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_pieces_add_up_to_the_decoded_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    token_bytes = TokenBytes(tokenizer)
    sample = tokenizer.encode(SAMPLE).ids
    stream = TextStream(token_bytes)
    pieces = [stream.add(token)[0] for token in tokens(sample)]
    assert "".join(pieces) == tokenizer.decode(sample, skip_special_tokens=False) == SAMPLE
    assert "�" not in "".join(pieces) and any(not piece for piece in pieces[:-1])  # some were held back
    assert b"".join(map(token_bytes, sample)) == SAMPLE.encode()


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_invalid_bytes_become_what_the_tokenizer_makes_of_them(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randrange(1, 12))]
        stream = TextStream(TokenBytes(tokenizer))
        assert "".join(stream.add(token)[0] for token in tokens(ids)) == tokenizer.decode(
            ids, skip_special_tokens=False
        )


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_row_ends_at_the_token_that_completes_a_stop_string(name: str) -> None:
    """The row ends at the token that completes the first stop string; nothing of it is shown, all before it is."""
    tokenizer = TOKENIZERS[name]()
    token_bytes = TokenBytes(tokenizer)
    rng = random.Random(1)
    stopped = 0
    for _ in range(400):
        text = "".join(rng.choice("aaabé東") for _ in range(rng.randrange(1, 30)))
        stops = ["".join(rng.choice("aaabé東") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 5))]
        new = tokens(tokenizer.encode(text).ids)
        stream, shown, logprobs = TextStream(token_bytes, stops), "", []
        for token in new:
            piece, begun = stream.add(token)
            shown += piece
            logprobs += begun
            if stream.finish_reason:
                break
        count = stream.tokens
        read = b"".join(token_bytes(token.id) for token in new[:count]).decode(errors="ignore")
        found = [at for at in map(read.find, stops) if at >= 0]
        before = b"".join(token_bytes(token.id) for token in new[: count - 1]).decode(errors="ignore")
        assert not any(stop in before for stop in stops)
        assert (stream.finish_reason == "stop") == bool(found) and (found or count == len(new))
        assert shown == (read[: min(found)] if found else text)
        # The tokens whose text is shown, with where they begin.
        starts = [len(b"".join(token_bytes(t.id) for t in new[:i]).decode(errors="ignore")) for i in range(count)]
        assert [offset for offset, _ in logprobs] == [at for at in starts if at < len(shown)]
        stopped += bool(found)
    assert 100 < stopped < 400


def test_a_stop_token_has_no_text() -> None:
    stream = TextStream(TokenBytes(byte_tokenizer()))
    ids = byte_tokenizer().encode("ab<|im_end|>").ids
    assert [stream.add(token)[0] for token in tokens(ids, "stop")] == ["a", "b", ""]
    assert stream.finish_reason == "stop" and stream.tokens == 3


def test_the_longest_beginning_of_a_marker_counts() -> None:
    assert partial_match("abc<thi", ["<think>", "<tool_call>"]) == 4
    assert partial_match("abab", ["abac"]) == 2
    assert partial_match("aaa", ["aab"]) == 2
    assert partial_match("abc", ["x"]) == partial_match("", ["x"]) == partial_match("ab", ["ab"[:1]]) == 0


REPLIES = [
    ("no tags < here", [("content", "no tags < here")]),
    ("<think>\na <b\n</think>\n\nc", [("reasoning_content", "a <b"), ("content", "c")]),
    ("x <think>a</think>b<think>c", [("content", "x b"), ("reasoning_content", "ac")]),
    ('d\n<tool_call>\n{"name": "f"}\n</tool_call>\n<tool_call>{}</tool_call>', [
        ("content", "d\n"), ("tool_calls", '\n{"name": "f"}\n'), ("tool_calls", "{}"),
    ]),
    ("<tool_call>\n{", [("content", "<tool_call>\n{")]),
    ("a</think>b</tool_call><thin", [("content", "a</think>b</tool_call><thin")]),
]  # fmt: skip


@pytest.mark.parametrize("text, expected", REPLIES)
def test_a_reply_is_split_at_its_tags_however_it_is_cut(text: str, expected: list[tuple[str, str]]) -> None:
    rng = random.Random(0)
    for _ in range(100):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(8)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        parts = TagSplitter([REASONING, TOOL_CALL])
        found: list[tuple[str, str]] = []
        for i, piece in enumerate(pieces):
            found += parts.add(piece, final=i == len(pieces) - 1)
        merged: dict[str, str] = {}
        for name, value in found:
            if name != "tool_calls":
                merged[name] = merged.get(name, "") + value
        calls = [part for part in found if part[0] == "tool_calls"]
        assert sorted([*merged.items(), *calls]) == sorted(expected)
    assert "".join(value for _, value in TagSplitter().add(text, True)) == text  # nobody asked for parts


def test_a_reply_may_begin_inside_reasoning() -> None:
    assert TagSplitter([REASONING], REASONING).add("\na</think>\n\nb", True) == [
        ("reasoning_content", "a"),
        ("content", "b"),
    ]


@pytest.mark.parametrize(
    "call, name, arguments",
    [
        ('{"name": "add", "arguments": {"a": [1, "é"]}}', "add", '{"a": [1, "\\u00e9"]}'),
        ('{"name": "now"}', "now", "{}"),
        ('{"name": 1}', None, None),
        ("[1]", None, None),
        ("null", None, None),
        ("{", None, None),
        ("[" * 5_000, None, None),
        ("", None, None),
        ("\n", None, None),
        ("\n{}\n", None, None),
        (f'{{"name": "f", "arguments": {"[" * 900}1{"]" * 900}}}', "f", "[" * 900 + "1" + "]" * 900),
        ('{"name": "f", "arguments": {"html": "<b></tool_call>"}}', "f", '{"html": "<b></tool_call>"}'),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', "f", '{"a": 1}'),  # the JSON of an object, as a string
        ('{"id": "call_1", "type": "function", "name": "f", "arguments": {"a": 1}}', "f", '{"a": 1}'),
        ('{"name": "f", "arguments": [1]}', "f", "[1]"),  # wrong, but the client can tell the model why
        ('{"name": "f", "arguments": "Rome"}', "f", '"Rome"'),
        ("\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n", "f", '{"a": 1}'),
        ("<function=f><parameter=s>not \"closed </tool_call></parameter></function>", "f",
         '{"s": "not \\"closed </tool_call>"}'),
        ("<function=f", None, None),
    ],
)  # fmt: skip
def test_text_that_is_no_tool_call_stays_content(call: str, name: str | None, arguments: str | None) -> None:
    """A call becomes OpenAI's object; what is none stays text."""
    tokenizer = byte_tokenizer()
    choice, whole = Choice(0, TextStream(TokenBytes(tokenizer)), TagSplitter([TOOL_CALL])), Delta(0)
    text = f"<tool_call>{call}</tool_call>"
    for token in tokens(tokenizer.encode(text + "<|im_end|>").ids, "stop"):
        whole.extend(choice.add([token]))
    if name is None:
        assert whole.fields == [("content", text)] and whole.finish_reason == "stop"
    else:
        ((field, value),) = whole.fields
        assert field == "tool_calls" and whole.finish_reason == "tool_calls"
        assert value["function"] == {"name": name, "arguments": arguments} and value["id"].startswith("call_")


CALLS = [
    'a\n<tool_call>\n{"name": "f", "arguments": {"s": "</tool_call> \\"<tool_call>\\\\"}}\n</tool_call>\nb',
    '<think>x\n</think>\n<tool_call><function=f><parameter=s>\n</tool_call>"\n</parameter></function></tool_call>',
    '<tool_call>{"name": "f</tool_call>\n<tool_call>{"name": "g"}</tool_call> c',  # a string that never ends
    '<tool_call>{"name": "f", "arguments": {"s": "</tool_call>',
    "<tool_call> \n</tool_call><tool_call>{</tool_call>\\",
]


@pytest.mark.parametrize("text", CALLS)
def test_deltas_add_up_to_the_whole_reply_wherever_it_is_cut(text: str) -> None:
    """Cut at every two places, and into single characters."""
    whole = joined([text])
    assert joined(list(text)) == whole
    for a in range(len(text) + 1):
        for b in range(a, len(text) + 1):
            assert joined([text[:a], text[a:b], text[b:]]) == whole


@pytest.mark.parametrize("text", CALLS[:3])
def test_a_reply_has_the_calls_that_the_verifier_reads(text: str) -> None:
    calls = [parse_call(call, strict=False) for name, call in joined([text]) if name == "tool_calls"]
    assert calls == calls_of(text) and any(calls)


def joined(pieces: list[str]) -> list[tuple[str, str]]:
    """Split a reply that comes in pieces; join what follows one another in one field."""
    splitter = TagSplitter([REASONING, TOOL_CALL])
    fields: list[tuple[str, str]] = []
    for i, piece in enumerate(pieces):
        for name, value in splitter.add(piece, final=i == len(pieces) - 1):
            if fields and fields[-1][0] == name != "tool_calls":
                fields[-1] = (name, fields[-1][1] + value)
            else:
                fields.append((name, value))
    return fields
