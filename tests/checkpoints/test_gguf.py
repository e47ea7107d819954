"""GGUF files: tokenizers there and back, and what is refused. For weights see test_export.py and test_smollm2.py."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from nb_lightning.checkpoints.gguf import GGUFWeights, is_ours, read_metadata, save_gguf
from nb_lightning.checkpoints.gguf_tokenizer import SPLITS, tokenizer_from_gguf, tokenizer_to_gguf
from nb_lightning.checkpoints.pretrained import find_origin
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.text.tokenizer import TextTokenizer, text_tokenizer
from tests.checkpoints.harness import Random
from tests.model.harness import TINY

TEXTS = [
    "The year 2024 wasn't 12,345 days long; it's 3.14159 or so.",
    "def f(x):\n    return x+1\n\n\n\t# naïve  comment \r\n",
    "<|im_start|>user\n你好，世界！ ¿Qué?<|im_end|>\n<|tool|>x",
]


def trained(split: str) -> TextTokenizer:
    """A tokenizer of 400 tokens that splits text as llama.cpp's `split` does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = SPLITS[split], decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(["<|tool|>"])
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|im_end|>"}
    return text_tokenizer(tokenizer, config, "{{ messages[0].content }}", "trained")


@pytest.mark.parametrize("split", SPLITS)
def test_a_tokenizer_there_and_back(split: str) -> None:
    before = trained(split)
    metadata = tokenizer_to_gguf(before, vocab_size=before.vocab_size + 5)
    assert metadata["tokenizer.ggml.pre"] == split
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[UNUSED{before.vocab_size + 4}]"
    after = tokenizer_from_gguf(metadata, Path("x.gguf"))
    for text in TEXTS:
        encoded = after.tokenizer.encode(text)
        assert encoded.ids == before.tokenizer.encode(text).ids
        assert after.decode(encoded.ids) == text
    assert (after.eos_id, after.special, after.chat_template) == (before.eos_id, before.special, before.chat_template)
    assert after.tokenizer.decode(after.tokenizer.encode(TEXTS[2]).ids, skip_special_tokens=True).endswith(
        "\n<|tool|>x"
    )


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_gives_other_tokens_than_the_others(split: str) -> None:
    """So the test above sees when one is taken for another."""
    text = "  12345 isn't\n\n\n x"
    pieces = {name: str(split.pre_tokenize_str(text)) for name, split in SPLITS.items()}
    assert [name for name in SPLITS if pieces[name] == pieces[split]] == [split]


def test_a_beginning_token_is_added_as_before() -> None:
    tokenizer = trained("gpt-2")
    tokenizer.tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    metadata = tokenizer_to_gguf(tokenizer, 500)
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert tokenizer_from_gguf(metadata, Path("x")).tokenizer.encode("abc").ids[0] == 1
    tokenizer.tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
    )
    with pytest.raises(ValueError, match="adds other special tokens than a bos_token in front; GGUF cannot say so"):
        tokenizer_to_gguf(tokenizer, 500)


def _unigram(t: Tokenizer) -> None:
    t.model = models.Unigram([("<|endoftext|>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=False)


def _words(t: Tokenizer) -> None:
    t.pre_tokenizer = pre_tokenizers.Whitespace()


def _lower(t: Tokenizer) -> None:
    t.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize(
    "change, words",
    [
        (_unigram, "the tokenizer is neither byte-level BPE nor SentencePiece's: GGUF has no place for it"),
        (_words, "llama.cpp has no name that we know for this tokenizer's pre_tokenizer: "),
        (_lower, "llama.cpp has no name for this tokenizer's normalizer: "),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have(change: Callable[[Tokenizer], None], words: str) -> None:
    tokenizer = trained("gpt-2")
    change(tokenizer.tokenizer)
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        tokenizer_to_gguf(tokenizer, 500)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model": "bert"}, "its tokenizer is 'bert' with tokenizer.ggml.pre 'gpt-2'; only SentencePiece ('llama')"),
        ({"model": "llama"}, "what its metadata says under tokenizer.ggml. is no tokenizer"),  # no scores
        ({"pre": "tekken"}, "its tokenizer is 'gpt2' with tokenizer.ggml.pre 'tekken'; only SentencePiece ('llama')"),
        ({"pre": None}, "its tokenizer is 'gpt2' with tokenizer.ggml.pre None; only SentencePiece ('llama')"),
        ({"merges": None}, "what its metadata says under tokenizer.ggml. is no tokenizer"),
        ({"merges": ["a"]}, "what its metadata says under tokenizer.ggml. is no tokenizer"),
        ({"tokens": ["a", "a"]}, "what its metadata says under tokenizer.ggml. is no tokenizer"),
        ({"token_type": [1]}, "what its metadata says under tokenizer.ggml. is no tokenizer"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_we_do_not_have(change: dict[str, Any], words: str) -> None:
    metadata = tokenizer_to_gguf(trained("gpt-2"), 500)
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(ValueError, match="^" + re.escape(f"x.gguf: {words}")) as caught:
        tokenizer_from_gguf(metadata, Path("x.gguf"))
    assert "\n" not in str(caught.value)


def saved(path: Path, **change: Any) -> Path:
    metadata = {**tokenizer_to_gguf(load_tokenizer("bytes"), 260), **change}
    save_gguf(Random(), TINY, path, "float32", 512, metadata, "0")
    return path


def edited(path: Path, key: str, value: int | float) -> Path:
    """The file with another value of one number in its metadata."""
    reader = gguf.GGUFReader(path, "r+")
    reader.fields[key].parts[reader.fields[key].data[0]][0] = value
    reader.data.flush()
    return path


def test_a_file_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "tiny.gguf")
    assert is_ours(path) and not is_ours(Path(__file__))
    origin = find_origin(str(path))
    assert origin.shape == TINY and origin.context == 512
    assert load_tokenizer(str(path)).tokenizer.encode("abc").ids == load_tokenizer("bytes").tokenizer.encode("abc").ids


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("llama.attention.head_count", 0, "llama.attention.head_count is 0; it must be a whole number from 1 to"),
        ("llama.attention.head_count_kv", 4, "6 heads of 8 components share 4 key-value heads"),
        ("llama.rope.dimension_count", 4, "llama.rope.dimension_count is 4, but a head has 8 components"),
        ("llama.rope.freq_base", float("inf"), "llama.rope.freq_base is inf; it must be a positive number"),
        ("llama.block_count", 2, "tensor blk.2.attn_norm.weight is not part of the model"),
        ("llama.block_count", 4, "tensor blk.3.attn_norm.weight is missing"),
        ("llama.feed_forward_length", 48, "tensor blk.0.ffn_gate.weight is [40, 24], the model's is [48, 24]"),
    ],
)
def test_a_file_that_does_not_fit_itself(tmp_path: Path, key: str, value: float, words: str) -> None:
    path = edited(saved(tmp_path / "tiny.gguf"), key, value)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: {words}")):
        weights = GGUFWeights(path)
        weights.require(weights.shape)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("llama.rope.scaling.type", "yarn", "llama.rope.scaling.type is 'yarn'; only plain rotary positions"),
        ("llama.expert_count", 8, "llama.expert_count is 8; the backbone has no experts"),
    ],
)
def test_a_model_that_the_backbone_cannot_be(tmp_path: Path, key: str, value: Any, words: str) -> None:
    path = saved(tmp_path / "tiny.gguf", **{key: value})
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: {words}")):
        GGUFWeights(path)


@pytest.mark.parametrize(
    "architecture, tensor, words",
    [
        ("qwen2", "token_embd.weight", "general.architecture is 'qwen2'; only 'llama' and 'nanbeige' are supported"),
        ("llama", "rope_freqs.weight", "rope_freqs.weight scales the positions; only plain rotary positions"),
        ("llama", "blk.0.attn_q.bias", "tensor blk.0.attn_q.bias is not part of a Llama model"),
        ("llama", "output_norm.weight", "tensor token_embd.weight is missing"),
    ],
)
def test_another_architecture(tmp_path: Path, architecture: str, tensor: str, words: str) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor(tensor, np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: {words}")):
        GGUFWeights(path)


def test_damaged_files(tmp_path: Path) -> None:
    data = saved(tmp_path / "tiny.gguf").read_bytes()
    for i, content in enumerate((b"", b"GGUF", b"PK" + data[2:], data[:1000], data[: len(data) // 2], b"\xff" * 5000)):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{i}.gguf is not a readable GGUF file: ") as caught:
            find_origin(str(path))
        assert "\n" not in str(caught.value)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"^GGUF files need the package gguf: pip install 'nb_lightning\[gguf\]'$"):
        read_metadata(path)
