"""Perplexity against one forward a document, and for a model whose every probability is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.prepare.source_writer import SampleWriter, SourceWriter
from nb_lightning.checkpoints.pretrained import Pretrained
from nb_lightning.evaluate import perplexity as module
from nb_lightning.evaluate.perplexity import Document, perplexity, source_documents, text_documents
from nb_lightning.model.transformer import ModelShape
from nb_lightning.token_source import TRAINED, SourceManifest
from tests.evaluate.harness import TOKENIZER, chain, pretrained_of
from tests.model.harness import random_model

EOS = TOKENIZER.eos_id
TEXTS = ["one two", "", "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 4, "中文\n", "x" * 100]


@pytest.fixture(scope="module")
def model() -> Pretrained:
    return pretrained_of(random_model(ModelShape(TOKENIZER.vocab_size, 24, 2, 2, 1, 12, 40)).eval())


def documents(texts: list[str] = TEXTS) -> list[Document]:
    return [Document(TOKENIZER.encode([text])[0], len(text.encode())) for text in texts]


def naive(model: Pretrained, ids: list[int], seq_len: int) -> float:
    """Nats of a document, each window by a forward of its own."""
    whole, total = [EOS, *ids], 0.0
    with torch.no_grad():
        for start in range(0, len(ids), seq_len):
            window = torch.tensor(whole[start : start + seq_len + 1])
            logits = model.model(window[None, :-1])[0].double()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return total


@pytest.mark.parametrize("seq_len", [1024, 32, 7])
@pytest.mark.parametrize("packed", [8192, 40, 1])
def test_every_token_is_predicted_once(
    model: Pretrained, monkeypatch: pytest.MonkeyPatch, seq_len: int, packed: int
) -> None:
    monkeypatch.setattr(module, "PACKED_TOKENS", packed)
    seen: list[int] = []
    found = perplexity(model, documents(), seq_len, on_tokens=seen.append)
    total = sum(naive(model, document.ids, seq_len) for document in documents())
    tokens = sum(len(text.encode()) + 1 for text in TEXTS)  # a token a byte, and the end
    assert (found["documents"], found["tokens"], found["bytes"]) == (5, tokens, tokens - 5)
    assert sum(seen) == tokens
    assert found["nats_per_token"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / (tokens - 5), rel=1e-5)
    low, high = found["interval"]
    assert low < found["nats_per_token"] < high


def test_known_probabilities_give_known_numbers() -> None:
    """ "abab": after the end token a (1), b follows a (0.5), a follows b (0.25), the end follows b (0.75)."""
    end = "<|endoftext|>"
    known = pretrained_of(chain({end: {"a": 1.0}, "a": {"b": 0.5, "a": 0.5}, "b": {"a": 0.25, end: 0.75}}))
    found = perplexity(known, documents(["abab"]), 99)
    nats = -math.log(0.5 * 0.25 * 0.5 * 0.75)
    assert found["nats_per_token"] == pytest.approx(nats / 5, rel=2e-3)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 4, rel=2e-3)
    assert found["interval"] is None


def test_no_document_is_begun_after_max_tokens(model: Pretrained) -> None:
    found = perplexity(model, iter(documents()), 99, max_tokens=10)
    assert found["documents"] == 3  # of 8 and 1 tokens, and the one with the tenth
    assert perplexity(model, documents(), 99, max_tokens=9)["documents"] == 2
    assert perplexity(model, documents(), 99, max_tokens=8)["documents"] == 1
    assert perplexity(model, documents([""]), 99)["bits_per_byte"] is None
    with pytest.raises(ValueError, match="no document"):
        perplexity(model, [], 99)


def test_the_documents_of_a_source_are_its_texts(
    model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across chunks and reads, with the bytes of the text."""
    rng = np.random.RandomState(0)
    texts = ["".join(chr(c) for c in rng.randint(65, 400, size=n)) for n in rng.randint(0, 900, size=40)]
    for split, some in (("train", texts[:1]), ("val", texts)):
        manifest = SourceManifest(TOKENIZER.digest, TOKENIZER.vocab_size, EOS)
        writer = SourceWriter(tmp_path / split, manifest, chunk_tokens=2048)
        for ids in TOKENIZER.encode(some):
            writer.add(ids)
        assert len(writer.close().chunks) > 3 or split == "train"
    monkeypatch.setattr(module, "READ_TOKENS", 700)
    assert list(source_documents(str(tmp_path), model)) == documents(texts)


def chats(folder: Path, **kind: Any) -> list[list[tuple[str, bool]]]:
    """A source of two conversations in spans of (text, is trained)."""
    spans = [[("ask", False), ("answer", True), ("again", False), ("yes", True)], [("Q", False), ("é", True)]]
    manifest = SourceManifest(TOKENIZER.digest, TOKENIZER.vocab_size, EOS, template="", **kind)
    writer = SampleWriter(folder / "val", manifest)
    for sample in spans:
        marked = [id + TRAINED * trained for text, trained in sample for id in TOKENIZER.encode([text])[0][:-1]]
        writer.add(marked)
    writer.close()
    return spans


def test_of_a_conversation_what_is_trained_is_predicted_after_all_before_it(model: Pretrained, tmp_path: Path) -> None:
    total = 0.0
    for sample in chats(tmp_path):
        ids = torch.tensor([id for text, _ in sample for id in TOKENIZER.encode([text])[0][:-1]])
        trained = torch.tensor([trained for text, trained in sample for _ in text.encode()])
        with torch.no_grad():
            logprobs = model.model(ids[None])[0].double().log_softmax(-1)
        nll = -logprobs[:-1].gather(1, ids[1:, None])[:, 0]
        total += float(nll[trained[1:]].sum())
    found = perplexity(model, source_documents(str(tmp_path), model), 99)
    assert (found["documents"], found["tokens"], found["bits_per_byte"]) == (2, len("answer" + "yes") + 2, None)
    assert found["nats_per_token"] == pytest.approx(total / found["tokens"], rel=1e-5)


def test_a_source_of_pairs_is_refused(model: Pretrained, tmp_path: Path) -> None:
    chats(tmp_path, pairs=True)
    with pytest.raises(ValueError, match="holds pairs; --source takes documents or conversations"):
        list(source_documents(str(tmp_path), model))


def test_a_source_of_another_tokenizer_is_refused(model: Pretrained, tmp_path: Path) -> None:
    writer = SourceWriter(tmp_path / "val", SourceManifest("another", 300, 0))
    writer.add([1, 0])
    writer.close()
    with pytest.raises(ValueError, match="tokenized with another tokenizer than test's"):
        list(source_documents(str(tmp_path), model))
    with pytest.raises(ValueError, match="no tokenized data at"):
        list(source_documents(str(tmp_path / "none"), model))


def test_texts_are_lines_or_a_whole_file(model: Pretrained, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"text": text, "n": 1}) for text in TEXTS))
    assert list(text_documents(str(tmp_path / "a.jsonl"), model)) == documents()
    (tmp_path / "a.md").write_text(TEXTS[2])
    assert list(text_documents(str(tmp_path / "a.md"), model)) == documents(TEXTS[2:3])


@pytest.mark.parametrize("line", ["{", "3", '{"txt": ""}', '{"text": 3}', '{"text": "\\ud800"}'])
def test_a_bad_line_is_named(model: Pretrained, tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line)
    with pytest.raises(ValueError, match=r'a.jsonl:2: not an object with a string "text"'):
        list(text_documents(str(tmp_path / "a.jsonl"), model))


def test_a_file_that_is_no_text_is_refused(model: Pretrained, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    for name in ("a.txt", "none.txt"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as UTF-8 text"):
            list(text_documents(str(tmp_path / name), model))
