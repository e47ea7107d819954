"""Every kind of input, every kind of bad record, any number of workers, any interruption: the same source."""

from __future__ import annotations

import gzip
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data.records
from data.prepare import Settings, main, prepare
from data.records import cut, lines_before, read
from data.source import Source, SourceManifest
from data.tokenizer import byte_tokenizer, load_tokenizer
from tests.data.test_source import everything
from tests.harness import ROOT

BYTES = Settings("bytes", val_fraction=0.1)


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [f"document {i} ü 漢 " + "word " * rng.randint(0, 60) for i in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def decoded(folder: Path, split: str) -> list[str]:
    source, tokenizer = Source(f"{folder}/{split}"), load_tokenizer("bytes")
    return tokenizer.decode(everything(source).tolist()).split("<|endoftext|>")[:-1]


def test_every_kind_of_input(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet
    import zstandard

    documents = texts(0, 70)
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", documents[:10])
    lines = "\n".join(json.dumps({"text": text}) for text in documents[10:30]).encode()  # no newline at the end
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress(lines[: len(lines) // 2]) + gzip.compress(lines[len(lines) // 2 :])
    )
    lines = "\n".join(json.dumps({"text": text}) for text in documents[30:40]).encode()
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines[:100]) + zstandard.compress(lines[100:]))
    table = pyarrow.table({"id": list(range(20)), "text": documents[40:60]})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=7)
    (folder / "e.txt").write_text(documents[60])
    (folder / "f.rst").write_text(documents[61])
    datasets.Dataset.from_dict({"text": documents[62:]}).save_to_disk(str(tmp_path / "hf"))
    out = tmp_path / "out"
    inputs = [str(folder), str(tmp_path / "hf")]
    manifests = prepare(inputs, str(out), BYTES, text_suffixes=("rst",), progress=False)
    assert sorted(decoded(out, "train") + decoded(out, "val")) == sorted(documents)
    assert sum(m.documents for m in manifests.values()) == 70 and not manifests["train"].dropped
    assert not (tmp_path / "out.parts").exists()


BAD = [
    (b'{"text": "broken"', "invalid JSON"),
    (b'["a list"]', "not a JSON object"),
    (b'{"txt": "other"}', "no field 'text'"),
    (b'{"text": 5}', "field 'text' is not a string"),
    (b'{"text": null}', "field 'text' is not a string"),
    (b'{"text": "  \\n"}', "empty text"),
    (b"", "empty line"),
    (b'{"text": "\xff\xfe"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "not UTF-8"),
    (b"[" * 100_000, "invalid JSON"),
]


@pytest.fixture
def with_bad_records(tmp_path: Path) -> Path:
    """A good record before each bad one: the bad ones are on lines 2, 4, 6 ..."""
    good = [json.dumps({"text": text}).encode() for text in texts(1, len(BAD))]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"".join(g + b"\n" + bad + b"\n" for g, (bad, _) in zip(good, BAD)))
    return path


@pytest.mark.parametrize("part_bytes", [2**26, 100])  # in one part, and cut after almost every line
def test_bad_records_are_counted_with_file_and_line(
    tmp_path: Path, with_bad_records: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    monkeypatch.setattr(data.records, "PART_BYTES", part_bytes)
    manifests = prepare([str(with_bad_records)], str(tmp_path / "out"), BYTES, progress=False)
    logged = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    expected = [
        {"reason": reason, "file": str(with_bad_records), "line": 2 * (i + 1)} for i, (_, reason) in enumerate(BAD)
    ]
    assert logged == expected
    assert sum(manifests["train"].dropped.values()) == len(BAD)
    assert sum(m.documents for m in manifests.values()) == len(BAD)


def test_a_bad_record_is_fatal_by_knob(with_bad_records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.records, "PART_BYTES", 10)
    arguments = ["--input", str(with_bad_records), "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]
    with pytest.raises(SystemExit, match=r"error: .*mixed.jsonl, line 2: invalid JSON"):
        main([*arguments, "--on-bad", "fail", "--workers", "1"])


def test_line_numbers_of_cut_files_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.records, "PART_BYTES", 500)
    path = write_jsonl(tmp_path / "a.jsonl", texts(2, 200))
    line = 0
    parts = cut([str(path)])
    assert len(parts) > 10
    for part in parts:
        assert lines_before(part) == line
        line += len(list(read(part, "text")))
    assert line == 200


def test_the_number_of_workers_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(write_jsonl(tmp_path / f"{i}.jsonl", texts(i, 60))) for i in range(4)]
    made = [prepare(files, str(tmp_path / f"out{workers}"), BYTES, workers, progress=False) for workers in (1, 2)]
    for split in ("train", "val"):
        assert made[0][split] == made[1][split]
    assert set(decoded(tmp_path / "out1", "train")).isdisjoint(decoded(tmp_path / "out1", "val"))


def test_killed_and_run_again_gives_the_same_source(tmp_path: Path) -> None:
    files = [str(write_jsonl(tmp_path / f"{i:02}.jsonl", texts(i, 1500))) for i in range(12)]
    unbroken = prepare(files, str(tmp_path / "unbroken"), BYTES, progress=False)
    command = [sys.executable, "-m", "data.prepare", "--input", *files, "--output", str(tmp_path / "out")]
    command += ["--tokenizer", "bytes", "--val-fraction", "0.1", "--workers", "1"]
    parts = tmp_path / "out.parts/parts"
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(list(parts.glob("*/done.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*/done.json")}
    assert 3 <= len(kept) < 12
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    for split in ("train", "val"):
        assert SourceManifest.read(f"{tmp_path}/out/{split}") == unbroken[split]


def test_unfinished_work_of_other_settings_is_not_mixed_in(tmp_path: Path, with_bad_records: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="line 2"):
        prepare([str(with_bad_records)], out, Settings("bytes", on_bad="fail"), progress=False)
    with pytest.raises(ValueError, match="holds an unfinished preparation of other input or settings"):
        prepare([str(with_bad_records)], out, BYTES, progress=False)
    prepare([str(with_bad_records)], out, BYTES, overwrite=True, progress=False)
    with pytest.raises(ValueError, match="holds a finished source; replace it with --overwrite"):
        prepare([str(with_bad_records)], out, BYTES, progress=False)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_archive_is_named(tmp_path: Path, name: str) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    lines = "\n".join(json.dumps({"text": text}) for text in texts(0, 200)).encode()
    path = tmp_path / name
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(lines)[:-500])
    elif name.endswith("zst"):
        path.write_bytes(b"not zstd" + zstandard.compress(lines))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts(0, 200)}), path)
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{name} (cannot be read to its end|is not a readable)"):
        prepare([str(path)], str(tmp_path / "out"), BYTES, progress=False)


def test_mistakes_in_the_arguments(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts(0, 3))
    for inputs, settings, words in (
        ([str(tmp_path / "b.jsonl")], BYTES, "no such file"),
        ([str(tmp_path / "empty")], BYTES, "nothing to read; known are .jsonl, .jsonl.gz"),
        ([str(path)], Settings("nowhere.json"), "data.tokenizer is 'nowhere.json', but there is no"),
        ([str(path)], Settings("bytes", eos="<none>"), "has none of the end tokens <none>"),
        ([str(path)], Settings("bytes", val_fraction=1.5), "--val-fraction is 1.5"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=words):
            prepare(inputs, str(tmp_path / "out"), settings, progress=False)


def test_a_missing_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"a.jsonl.zst needs zstandard: pip install 'nb_lightning\[data\]'"):
        prepare([str(path)], str(tmp_path / "out"), BYTES, progress=False)


def test_any_hugging_face_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts(0, 50), trainer)
    (tmp_path / "tok").mkdir()
    tokenizer.save(str(tmp_path / "tok/tokenizer.json"))
    path = write_jsonl(tmp_path / "a.jsonl", texts(0, 20))
    prepare([str(path)], str(tmp_path / "out"), Settings(str(tmp_path / "tok"), val_fraction=0.1), progress=False)
    manifest = SourceManifest.read(f"{tmp_path}/out/train")
    expected = {text: len(tokenizer.encode(text).ids) + 1 for text in texts(0, 20)}
    both = manifest.tokens + SourceManifest.read(f"{tmp_path}/out/val").tokens
    assert both == sum(expected.values()) and manifest.eos_id == tokenizer.token_to_id("</s>")


def test_the_byte_tokenizer_gives_every_text_back() -> None:
    tokenizer = load_tokenizer("bytes")
    text = "tabs\t newline\n ü 漢字 \x00\x7f emoji 🙂 <|im_start|>"
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids[:-1]) == text and ids[-1] == tokenizer.eos_id
    plain = text.removesuffix("<|im_start|>")
    assert len(tokenizer.encode([plain])[0]) == len(plain.encode()) + 1
    assert tokenizer.vocab_size == 260 == byte_tokenizer().get_vocab_size()


def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a real S3 server on this machine: prepared there, and read from there."""
    boto3 = pytest.importorskip("boto3")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host if host != '0.0.0.0' else '127.0.0.1'}:{port}"
    try:
        for key, value in (
            ("AWS_ENDPOINT_URL", endpoint),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("NO_PROXY", "127.0.0.1,localhost"),
        ):
            monkeypatch.setenv(key, value)
        # litdata's faster client speaks https only; where that is not installed, litdata reads through boto3.
        monkeypatch.setattr("litdata.streaming.downloader._OBSTORE_AVAILABLE", False)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="corpus")
        path = write_jsonl(tmp_path / "a.jsonl", texts(0, 40))
        local = prepare([str(path)], str(tmp_path / "out"), BYTES, progress=False)
        remote = prepare([str(path)], "s3://corpus/web", BYTES, staging=tmp_path / "staging", progress=False)
        assert remote == local
        source = Source("s3://corpus/web/train")
        assert source.manifest == local["train"]
        assert (everything(source) == everything(Source(str(tmp_path / "out/train")))).all()
    finally:
        server.stop()
