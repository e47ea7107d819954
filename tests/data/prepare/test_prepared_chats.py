"""`data.prepare --chat` as a whole: inputs, parts, bad records, held-out records, the command."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import data.prepare.parts
from data.prepare.__main__ import main
from data.prepare.make import prepare
from data.prepare.settings import ChatSettings, SourceSettings
from data.prepare.workers import BadRecord
from nb_lightning.token_source import TRAINED, Source, SourceManifest
from tests.data.prepare.chat_harness import (
    BYTES,
    EXPECTED,
    TWO,
    dialogue,
    qwen3,
    stored,
    trained,
    write,
)
from tests.data.prepare.harness import content, s3_server
from tests.harness import ROOT


@pytest.mark.runs
def test_prepared_samples_come_back_whatever_holds_them(tmp_path: Path) -> None:
    records = [dialogue(i) for i in range(60)]
    write(tmp_path / "a.jsonl", records)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet", row_group_size=17)
    datasets.Dataset.from_list([{**r, "n": 1} for r in records]).save_to_disk(tmp_path / "d")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d"):
        made = prepare([tmp_path / name], str(tmp_path / "out"), BYTES, overwrite=True, progress=False)
        found = [[trained(marked) for marked in stored(tmp_path / "out", split)] for split in ("train", "val")]
        assert sorted(found[0] + found[1]) == sorted(EXPECTED) and 3 < len(found[1]) < 25, name
        assert [m.documents for m in made.manifests.values()] == [len(found[0]), len(found[1])]
        train = made.manifests["train"]
        written = stored(tmp_path / "out")
        assert train.is_chat and train.trained == sum((marked & TRAINED > 0).sum() for marked in written)
        assert "samples" in str(made) and "trained of" in str(made)


@pytest.mark.runs
@pytest.mark.parametrize("workers", [1, 2])
def test_parts_and_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    write(tmp_path / "a.jsonl", [dialogue(i) for i in range(60)])
    prepare([tmp_path / "a.jsonl"], str(tmp_path / "one"), BYTES, progress=False)
    monkeypatch.setattr(data.prepare.parts, "PART_BYTES", 1500)
    settings = SourceSettings("bytes", val_fraction=0.2, chunk_tokens=1024, chat=ChatSettings())
    prepare([tmp_path / "a.jsonl"], str(tmp_path / "many"), settings, workers=workers, progress=False)
    assert len(SourceManifest.read(f"{tmp_path}/many/train").chunks) > 3
    for split in ("train", "val"):
        one, many = stored(tmp_path / "one", split), stored(tmp_path / "many", split)
        assert all(map(np.array_equal, one, many)) and len(one) == len(many)


BAD = {
    3: ("broken", "invalid JSON"),
    7: ('{"messages": [{"role": "bot", "content": "x"}]}', "unknown role"),
    8: ("[]", "not a JSON object"),
    15: ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
    16: ("", "empty line"),
    30: ('{"prompt": "boom", "completion": "x"}', "the template raised"),
    44: ('{"messages": 5}', "messages are not a list"),
    45: ('{"prompt": "\\ud800", "completion": "x"}', "not UTF-8"),
}  # fmt: skip


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, SourceSettings]:
    """52 good records, and a bad one on each line that `BAD` names."""
    good = iter(dialogue(i) for i in range(60))
    write(tmp_path / "mixed.jsonl", [BAD[n][0] if n in BAD else next(good) for n in range(1, 61)])
    raising = "{% if messages[0].content == 'boom' %}{{ raise_exception('bang') }}{% endif %}"
    template = raising + (ROOT / "nb_lightning/text/chatml.jinja").read_text()
    return tmp_path / "mixed.jsonl", SourceSettings("bytes", val_fraction=0.2, chat=ChatSettings(template))


@pytest.mark.runs
@pytest.mark.parametrize("part_bytes", [2**26, 900])
def test_every_bad_record_is_named(
    tmp_path: Path, mixed: tuple[Path, SourceSettings], monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    path, settings = mixed
    monkeypatch.setattr(data.prepare.parts, "PART_BYTES", part_bytes)
    made = prepare([path], str(tmp_path / "out"), settings, progress=False)
    log = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"], entry["reason"]) for entry in log] == [
        (str(path), line, reason) for line, (_, reason) in BAD.items()
    ]
    details = {entry["line"]: entry.get("detail", "") for entry in log}
    assert "unknown role 'bot'; allowed: system, user" in details[7] and "the template raised: bang" in details[30]
    assert made.manifests["train"].dropped == {reason: 1 for _, reason in BAD.values()}
    assert f"1 the template raised: {path}:30" in str(made)
    assert sum(m.documents for m in made.manifests.values()) == 52
    found = [trained(marked) for split in ("train", "val") for marked in stored(tmp_path / "out", split)]
    assert sorted(found) == sorted(EXPECTED[:52])


def test_the_first_bad_record_can_end_it(tmp_path: Path, mixed: tuple[Path, SourceSettings]) -> None:
    path, settings = mixed
    with pytest.raises(BadRecord, match=r"mixed.jsonl:3: invalid JSON"):
        prepare([path], str(tmp_path / "out"), settings, on_bad="fail", progress=False)
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(dialogue(99))
    path.write_text("\n".join(lines))
    with pytest.raises(BadRecord, match=r"mixed.jsonl:7: message 0: unknown role 'bot'; allowed"):
        prepare([path], str(tmp_path / "out"), settings, on_bad="fail", overwrite=True, progress=False)


def test_rows_that_are_not_utf8(tmp_path: Path) -> None:
    raw = [b'"Hi"', b'"\xff"', b'"Ho"']
    cells = pyarrow.array(raw, pyarrow.binary()).cast(pyarrow.large_binary())
    text = pyarrow.LargeStringArray.from_buffers(3, cells.buffers()[1], cells.buffers()[2])
    table = pyarrow.table({"prompt": text, "completion": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    prepare([tmp_path / "a.parquet"], str(tmp_path / "out"), BYTES, progress=False)
    (entry,) = map(json.loads, (tmp_path / "out/dropped.jsonl").read_text().splitlines())
    assert (entry["line"], entry["reason"]) == (2, "not UTF-8")


def test_nothing_usable_says_why(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [dialogue(1)] * 3)
    broken = SourceSettings("bytes", chat=ChatSettings("{% for %}"))
    with pytest.raises(ValueError, match=r"none of the 3 .*: the template raised; the first: .*a.jsonl:1: the temp"):
        prepare([tmp_path / "a.jsonl"], str(tmp_path / "out"), broken, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_all_answers_to_a_question_are_held_out_together(tmp_path: Path) -> None:
    def record(question: int, answer: int) -> dict[str, Any]:
        return {"prompt": f"question {question}", "completion": f"{question}:{answer}"}

    write(tmp_path / "a.jsonl", [record(q, a) for a in range(4) for q in range(40)])
    prepare([tmp_path / "a.jsonl"], str(tmp_path / "out"), BYTES, progress=False)
    sides = [{trained(w).split(":")[0] for w in stored(tmp_path / "out", split)} for split in ("train", "val")]
    assert sides[0].isdisjoint(sides[1]) and len(sides[0] | sides[1]) == 40 and len(sides[1]) > 2


def test_held_out_input(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [dialogue(i) for i in range(30)])
    val = write(tmp_path / "b.jsonl", [dialogue(i) for i in range(30, 40)])
    prepare([train], str(tmp_path / "out"), BYTES, val_inputs=[val], progress=False)
    assert [trained(marked) for marked in stored(tmp_path / "out", "train")] == EXPECTED[:30]
    assert [trained(marked) for marked in stored(tmp_path / "out", "val")] == EXPECTED[30:40]
    with pytest.raises(ValueError, match=r"b.jsonl is in both --input and --val-input"):
        prepare([train, val], str(tmp_path / "two"), BYTES, val_inputs=[val], progress=False)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", [{"messages": TWO, "n": i} for i in range(3)])
    (tmp_path / "qwen3.jinja").write_text(qwen3())
    (tmp_path / "README.md").write_text("not a conversation")
    base = ["--chat", "--input", str(tmp_path), "--output", str(tmp_path.with_name("out")), "--workers", "1"]
    main([*base, "--overwrite"])
    out = capsys.readouterr().out
    assert "files of other kinds: .jinja 1, .md 1" in out and "nothing was held out" in out
    first = content(tmp_path.with_name("out"))
    main([*base, "--overwrite", "--template", str(tmp_path / "qwen3.jinja"), "--history", "mask", "--no-think"])
    expected = "[2<|im_end|>][<think>\n\n</think>\n\n4<|im_end|>]"
    assert [trained(marked) for marked in stored(tmp_path.with_name("out"))] == [expected] * 3
    assert content(tmp_path.with_name("out")) != first
    for words, error in (
        (["--template", "nowhere.jinja"], "--template nowhere.jinja cannot be read"),
        (["--date", "today"], "--date is 'today'; give it as 2025-01-31"),
    ):
        with pytest.raises(SystemExit):
            main([*base, "--overwrite", *words])
        assert f"error: {error}" in capsys.readouterr().err


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [dialogue(i) for i in range(30)])
    prepare([tmp_path / "a.jsonl"], str(tmp_path / "out"), BYTES, progress=False)
    path = tmp_path / "out/train/samples.npy"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"train/samples.npy is missing or damaged .*SHA-256 differs"):
        Source(f"{tmp_path}/out/train").samples()
    path.unlink()
    with pytest.raises(ValueError, match=r"train/samples.npy is missing or damaged"):
        Source(f"{tmp_path}/out/train").samples()


@pytest.mark.slow
def test_streamed_from_s3(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [dialogue(i) for i in range(60)])
    prepare([tmp_path / "a.jsonl"], str(tmp_path / "here"), BYTES, progress=False)
    with s3_server(tmp_path / "cache") as client:
        client.create_bucket(Bucket="chats")
        prepare([tmp_path / "a.jsonl"], "s3://chats/maths", BYTES, staging=tmp_path / "staging", progress=False)
        there = Source("s3://chats/maths/train")
        assert there.manifest == SourceManifest.read(f"{tmp_path}/here/train")
        assert np.array_equal(there.samples(), Source(f"{tmp_path}/here/train").samples())
        assert np.array_equal(there.read_on(0, there.tokens), np.concatenate(stored(tmp_path / "here")))
