"""A special token that a document spells is text; documents that spell none are as before."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from data.prepare.__main__ import main
from data.prepare.documents import Documents
from data.prepare.parts import cut_inputs
from data.prepare.settings import SourceSettings
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.text.tokenizer import TextTokenizer, text_tokenizer
from nb_lightning.token_source import Source
from tests.checkpoints.harness import train
from tests.data.prepare.harness import content, everything

END = "<|endoftext|>"
TEXTS = ["plain", f"GPT-2 ends a document with {END}.", f"{END}<|im_start|>user", "also plain ü"]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare(tmp_path: Path, texts: list[str], name: str, *more: str) -> Source:
    file = write(tmp_path / "in.jsonl", texts)
    main(["--input", str(file), "--output", str(tmp_path / name), "--workers", "1", "--val-fraction", "0", *more])
    return Source(str(tmp_path / name / "train"))


def documents(source: Source, end: int = 256) -> list[str]:
    ids = everything(source).tolist()
    cuts = [0, *(place + 1 for place, id in enumerate(ids) if id == end)]
    return [load_tokenizer("bytes").decode(ids[a : b - 1]) for a, b in pairwise(cuts)]


def test_each_document_has_one_end_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = prepare(tmp_path, TEXTS, "out")
    assert documents(source) == TEXTS
    assert source.manifest.spelled == 2 and source.manifest.documents == 4
    assert "2 documents spell special tokens, which are text in them" in capsys.readouterr().out


def test_control_keeps_them_as_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = prepare(tmp_path, TEXTS, "out", "--special-tokens", "control")
    assert len(documents(source)) == 6 and source.manifest.spelled == 0
    assert "spell" not in capsys.readouterr().out


def test_sources_without_such_documents_do_not_depend_on_the_knob(tmp_path: Path) -> None:
    plain = [text for text in TEXTS if END not in text] * 50
    sources = [prepare(tmp_path, plain, kind, "--special-tokens", kind) for kind in ("text", "control")]
    assert sources[0].manifest == sources[1].manifest
    assert content(tmp_path / "text").keys() == content(tmp_path / "control").keys()
    manifest = json.loads((tmp_path / "text/train/source.json").read_text())
    assert "spelled" not in manifest


def test_the_count_is_summed_over_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.prepare.parts.PART_BYTES", 100)
    source = prepare(tmp_path, TEXTS * 5, "out")
    assert source.manifest.spelled == 10 and documents(source) == TEXTS * 5


def test_sentencepiece_tokens_are_those_of_the_library(tmp_path: Path) -> None:
    model = train(tmp_path, add_dummy_prefix=True)
    decoder = {"1000": {"content": END, "special": True}, "1001": {"content": "<think>", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "legacy": True}))
    tokenizer = load_tokenizer(str(tmp_path))
    for text in (f"a b {END} c", f"{END}{END}", f"x{END}\n"):
        assert tokenizer.encode_literally(text) == [*model.encode(text), 1000]
    assert 1001 in tokenizer.encode_literally(f"a {END} <think> b")  # not special: text that may be written


def lowercase_words() -> TextTokenizer:
    """A word-level tokenizer that lowers its texts, and has no tokens but its words."""
    vocab = {word: id for id, word in enumerate(["[unk]", "a", "b", "<eos>", "<", ">", "eos"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[unk]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("[unk]", special=True)])
    return text_tokenizer(tokenizer, {"unk_token": "[unk]", "eos_token": "<eos>"}, None, "test")


def test_a_tokenizer_with_a_normalizer_and_unknown_words(tmp_path: Path) -> None:
    lowercase_words().save(tmp_path / "tok")
    part = cut_inputs([str(write(tmp_path / "in.jsonl", ["A <eos> b", "a c", "[unk] b"]))])[0][0]
    form = Documents(SourceSettings(str(tmp_path / "tok")))
    assert [record.value[1] for record in form.read(part)] == [[1, 4, 6, 5, 2, 3], [1, 0, 3], [0, 0, 0, 2, 3]]
    assert form.spelled == 2


def test_a_text_that_cannot_be_written_otherwise_is_a_bad_record(tmp_path: Path) -> None:
    vocab = [("<unk>", 0.0), ("<eos>", -0.1), *((character, -5.0) for character in "<>eosab ")]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    text_tokenizer(tokenizer, {}, None, "test").save(tmp_path / "tok")
    part = cut_inputs([str(write(tmp_path / "in.jsonl", ["ab", "a<eos>b"]))])[0][0]
    good, bad = Documents(SourceSettings(str(tmp_path / "tok"))).read(part)
    assert good.bad is None
    assert (bad.bad, bad.line) == ("a text spells a special token that this tokenizer cannot write as text", 2)
