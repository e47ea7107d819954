"""SentencePiece's tokenizers beside SentencePiece itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
from transformers import LlamaTokenizer

from nb_lightning.checkpoints import sentencepiece as spm
from nb_lightning.checkpoints.gguf_tokenizer import tokenizer_from_gguf, tokenizer_to_gguf
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from tests.checkpoints.harness import texts, train

# As in Nanbeige4's tokenizer_config.json: more tokens where the pieces end, one of them the first of every text.
ADDED = {"<|im_start|>": True, "<|im_end|>": True, "<|endoftext|>": True, "<think>": False, "</think>": False}


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder as released, and SentencePiece on it."""
    folder = tmp_path_factory.mktemp("spm")
    model = train(folder, add_dummy_prefix=request.param)
    decoder = {str(1000 + i): {"content": t, "special": s} for i, (t, s) in enumerate(ADDED.items())}
    config = {"add_bos_token": True, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<unk>",
              "added_tokens_decoder": decoder, "chat_template": "{{ messages[0].content }}"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, model


def test_the_same_ids_as_sentencepiece(trained: tuple[Path, Any]) -> None:
    folder, model = trained
    tokenizer = load_tokenizer(str(folder))
    for text in texts():
        ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == model.encode(text)
        assert tokenizer.decode(ids) == model.decode(ids) == text


def test_added_tokens_and_the_first_one(trained: tuple[Path, Any]) -> None:
    """Each part between them is a text of its own, as for transformers' LlamaTokenizer (`legacy`)."""
    folder, model = trained
    tokenizer = load_tokenizer(str(folder))
    text = "<|im_start|>user\nSort: b a<|im_end|>\n<|im_start|>assistant\n<think>\nhm</think> a b<|im_end|>"
    expected = [1000]
    for part in re.split(f"({'|'.join(map(re.escape, ADDED))})", text):
        expected += [1000 + list(ADDED).index(part)] if part in ADDED else model.encode(part)
    assert tokenizer.tokenizer.encode(text).ids == expected
    assert tokenizer.tokenizer.encode(text, add_special_tokens=False).ids == expected[1:]
    assert tokenizer.vocab_size == 1005 and tokenizer.eos_id == 1002
    assert tokenizer.special["eos_token"] == "<|im_end|>" and tokenizer.chat_template


CHATS = [
    "<|im_start|>system\n你是一个助手。<|im_end|>\n<|im_start|>user\n写一个函数<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "<|im_start|>assistant\n<think>\n\n</think>\n\ndef f(x):\n    return  x<|im_end|>\n",
    "text before <|im_end|> and after<think>x</think><|im_end|><|im_end|>\n\n\n",
    "<think> a</think>  two<|im_end|> ",
    " one<|im_start|>",
    "\n<|im_start|>\n",
    *(f"<|im_start|>{part}<|im_end|>{part}<think>" for part in ("a", "é你", "😀\t", "\n\n", "▁", "x = [1,\n     2]")),
]


def write_config(folder: Path, **flags: Any) -> None:
    """A tokenizer_config.json as transformers writes it."""
    decoder = {
        str(1000 + i): {"content": token, "special": special, "normalized": False}
        for i, (token, special) in enumerate(ADDED.items())
    }
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
              "unk_token": "<unk>", "added_tokens_decoder": decoder, **flags}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("legacy", [{}, {"legacy": True}, {"legacy": False}], ids=["default", "legacy", "new"])
@pytest.mark.parametrize("prefix", [{}, {"add_prefix_space": True}, {"add_prefix_space": False}], ids=["", "yes", "no"])
@pytest.mark.parametrize("has_json", [False, True], ids=["model alone", "beside tokenizer.json"])
def test_the_same_ids_as_transformers(legacy: Any, prefix: Any, has_json: bool, tmp_path: Path) -> None:
    """With `legacy: true` except where a part begins with a space: there SentencePiece puts one more.

    A tokenizer.json holds the rule itself, whatever the config beside it says.
    """
    train(tmp_path)
    write_config(tmp_path, **legacy, **prefix)
    theirs = LlamaTokenizer.from_pretrained(tmp_path)
    if has_json:
        theirs.save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").is_file()
    ours = load_tokenizer(str(tmp_path))
    doubles_spaces = not has_json and legacy == {"legacy": True} and prefix != {"add_prefix_space": False}
    compared = 0
    for text in [*CHATS, *texts()]:
        if doubles_spaces and re.search(r"(^|>)[ ▁]", text):
            continue
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert ours.decode(ids) == theirs.decode(ids)
        compared += 1
    assert compared > len(CHATS) / 2


def test_legacy_false_is_sentencepiece_without_its_space(tmp_path: Path) -> None:
    """As transformers' slow tokenizer defined it: the library gets each part as it is, the first after a "▁"."""
    train(tmp_path)
    write_config(tmp_path, legacy=False)
    tokenizer = load_tokenizer(str(tmp_path)).tokenizer
    proto = ModelProto.FromString((tmp_path / "tokenizer.model").read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in [*CHATS, *texts()]:
        expected: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, ADDED))})", text):
            first = not expected and not part.startswith((" ", "▁"))
            expected += [1000 + list(ADDED).index(part)] if part in ADDED else model.encode(part and "▁" * first + part)
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected


def test_no_space_after_added_tokens_without_legacy(tmp_path: Path) -> None:
    """A chat has fewer tokens; the tokenizer that is saved with a run and its GGUF file agree on it."""
    train(tmp_path)
    chat = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    ids = {}
    for legacy in (True, False):
        write_config(tmp_path, legacy=legacy)
        ids[legacy] = load_tokenizer(str(tmp_path)).tokenizer.encode(chat, add_special_tokens=False).tokens
    spaces = [ids[legacy].count("▁") for legacy in (True, False)]
    assert spaces[1] == 0 < spaces[0]
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.save(tmp_path / "saved")
    metadata = tokenizer_to_gguf(tokenizer, 1005)
    assert metadata["tokenizer.ggml.add_space_prefix"] is False
    for other in (load_tokenizer(str(tmp_path / "saved")), tokenizer_from_gguf(metadata, Path("x.gguf"))):
        assert other.tokenizer.encode(chat).ids == tokenizer.tokenizer.encode(chat).ids


def test_legacy_true_is_sentencepiece_as_for_a_bare_model(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = trained
    bare = load_tokenizer(str(folder))
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    write_config(tmp_path, legacy=True)
    legacy = load_tokenizer(str(tmp_path))
    assert legacy.tokenizer.encode(" a b", add_special_tokens=False).ids == model.encode(" a b")
    assert legacy.digest == bare.digest


def test_saved_as_json_and_in_a_gguf_file(trained: tuple[Path, Any], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(trained[0]))
    tokenizer.save(tmp_path)
    metadata = tokenizer_to_gguf(tokenizer, 1010)
    types = metadata["tokenizer.ggml.token_type"]
    assert types[:4] == [spm.UNKNOWN, spm.CONTROL, spm.CONTROL, spm.BYTE]
    assert types[1000:] == [spm.CONTROL] * 3 + [spm.USER_DEFINED] * 2 + [spm.UNUSED] * 5
    for other in (load_tokenizer(str(tmp_path)), tokenizer_from_gguf(metadata, Path("x.gguf"))):
        for text in (*texts(), "<|im_start|>user\nHi<|im_end|>\n<think>"):
            assert other.tokenizer.encode(text).ids == tokenizer.tokenizer.encode(text).ids
        assert (other.eos_id, other.special) == (tokenizer.eos_id, tokenizer.special)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model_type": "unigram"}, "is not byte-fallback BPE, the one kind of SentencePiece model that is read"),
        ({"byte_fallback": False}, "is not byte-fallback BPE, the one kind of SentencePiece model that is read"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes the text before it is split"),
        ({"remove_extra_whitespaces": True}, "changes the text before it is split"),
    ],
)
def test_another_kind_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    train(tmp_path, **options)
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path}/tokenizer.model {words}")):
        load_tokenizer(str(tmp_path))


def test_damaged_files(tmp_path: Path) -> None:
    train(tmp_path)
    path = tmp_path / "tokenizer.model"
    data = path.read_bytes()
    for content in (data[:-100], data[:7], b"\xff" * 50, b"\x0a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer.model is not ") as caught:
            load_tokenizer(str(tmp_path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "added, words",
    [
        ({"1001": {"content": "<x>", "special": True}}, "the added token '<x>' has id 1001, but 1000 is the next free"),
        ({"1000": {"special": True}}, "added_tokens_decoder is damaged"),
        ({"one": {"content": "<x>", "special": True}}, "added_tokens_decoder is damaged"),
        ([1], "added_tokens_decoder is damaged"),
    ],
)
def test_added_tokens_that_cannot_be(tmp_path: Path, added: Any, words: str) -> None:
    train(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(ValueError, match=re.escape(words)):
        load_tokenizer(str(tmp_path))
