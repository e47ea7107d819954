"""Any number of workers, any interruption, any place to write to: the same source."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import data.prepare.parts
from data.prepare.__main__ import main
from data.prepare.make import prepare
from data.prepare.settings import SourceSettings
from data.prepare.source_writer import locked
from data.prepare.workers import BadRecord
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.text.tokenizer import byte_tokenizer
from nb_lightning.token_source import Source, SourceManifest
from tests.data.prepare.harness import content, everything, s3_server
from tests.harness import ROOT, environment

BYTES = SourceSettings("bytes", val_fraction=0.1)


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [f"document {seed}.{i} ü 漢 " + "word " * rng.randint(0, 60) for i in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def decoded(folder: Path, split: str) -> list[str]:
    source, tokenizer = Source(f"{folder}/{split}"), load_tokenizer("bytes")
    return tokenizer.decode(everything(source).tolist()).split("<|endoftext|>")[:-1]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """30 documents, and a bad record on each of the lines 10, 20 and 30 (a reason of its own on the last)."""
    lines = write_jsonl(tmp_path / "mixed.jsonl", texts(1, 30)).read_bytes().splitlines(keepends=True)
    for place, bad in ((9, b"broken\n"), (19, b"broken\n"), (29, b"[]\n")):
        lines.insert(place, bad)
    (tmp_path / "mixed.jsonl").write_bytes(b"".join(lines))
    return tmp_path / "mixed.jsonl"


def test_documents_come_back_and_are_held_out_by_their_text(tmp_path: Path) -> None:
    documents = texts(0, 200)
    made = prepare([write_jsonl(tmp_path / "a.jsonl", documents)], f"{tmp_path}/out/", BYTES, progress=False)
    train, val = (decoded(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(documents) and 5 < len(val) < 50
    assert [m.documents for m in made.manifests.values()] == [len(train), len(val)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]  # no staging is left
    random.Random(0).shuffle(documents)
    twice = [write_jsonl(tmp_path / name, documents) for name in ("b.jsonl", "c.jsonl")]
    prepare(twice, str(tmp_path / "other"), BYTES, progress=False)
    assert set(decoded(tmp_path / "other", "val")) == set(val)  # whatever the order and the number of times
    reseeded = SourceSettings("bytes", val_fraction=0.1, seed=1)
    prepare(twice, str(tmp_path / "reseeded"), reseeded, progress=False)
    assert set(decoded(tmp_path / "reseeded", "val")) != set(val)


@pytest.mark.parametrize("part_bytes", [2**26, 300])  # in one part, and in many
def test_the_report(tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int) -> None:
    monkeypatch.setattr(data.prepare.parts, "PART_BYTES", part_bytes)
    (tmp_path / "in").mkdir()
    mixed = mixed.rename(tmp_path / "in" / "mixed.jsonl")
    (tmp_path / "in" / "notes.docx").touch()
    made = prepare([mixed.parent], str(tmp_path / "out"), BYTES, progress=False)
    assert made.manifests["train"].dropped == {"invalid JSON": 2, "not a JSON object": 1}
    logged = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    reasons = ["invalid JSON", "invalid JSON", "not a JSON object"]
    assert logged == [{"reason": r, "file": str(mixed), "line": n} for r, n in zip(reasons, (10, 20, 30))]
    report = str(made)
    assert f"2 invalid JSON: {mixed}:10, {mixed}:20\n" in report and f"1 not a JSON object: {mixed}:30\n" in report
    assert "1 files of other kinds: .docx 1" in report and "documents" in report.splitlines()[1]


def test_a_bad_record_is_fatal_by_knob(tmp_path: Path, mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", str(mixed), "--output", str(tmp_path / "out"), "--workers", "1", "--val-fraction", "0.1"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--on-bad", "fail"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {mixed}:10: invalid JSON"
    main(arguments)  # going on without the knob is no other preparation
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1
    assert "holds a finished source; replace it with --overwrite" in capsys.readouterr().err


def test_parts_that_were_finished_with_bad_records_are_fatal_too(
    tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.prepare.parts, "PART_BYTES", 1000)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data.prepare.source_writer.merge_parts", stopped)
        prepare([mixed], str(tmp_path / "out"), BYTES, progress=False)
    with pytest.raises(BadRecord, match=r"mixed.jsonl:10: invalid JSON"):
        prepare([mixed], str(tmp_path / "out"), BYTES, on_bad="fail", progress=False)


@pytest.mark.runs
def test_the_number_of_workers_does_not_matter(tmp_path: Path, mixed: Path) -> None:
    files = [*(write_jsonl(tmp_path / f"{i}.jsonl", texts(i, 60)) for i in range(3)), mixed]
    made = [prepare(files, str(tmp_path / f"out{n}"), BYTES, workers=n, progress=False) for n in (1, 2)]
    assert made[0].manifests == made[1].manifests and made[0].origins == made[1].origins
    assert content(tmp_path / "out1") == content(tmp_path / "out2")


@pytest.mark.slow
def test_the_first_bad_record_is_the_same_with_any_number_of_workers(tmp_path: Path, mixed: Path) -> None:
    files = [write_jsonl(tmp_path / f"{i}.jsonl", texts(i, 30_000 * (i == 0))) for i in range(4)]
    with open(files[0], "a") as file:
        file.write("broken\n")  # found long after the one in `mixed`, but it comes first
    with pytest.raises(BadRecord, match=r"0.jsonl:30001: invalid JSON"):
        prepare([*files, mixed], str(tmp_path / "out"), BYTES, workers=2, on_bad="fail", progress=False)


def crash(calls: Iterator[int], real: Callable[..., object]) -> Callable[..., object]:
    """`real`, that raises instead when `calls` has run out, as if the process ended there; but only once."""
    return lambda *a, **k: real(*a, **k) if next(calls) else (_ for _ in ()).throw(KeyboardInterrupt)


@pytest.mark.parametrize(
    "again, stride",
    [(True, 9), pytest.param(False, 1, marks=pytest.mark.slow), pytest.param(True, 1, marks=pytest.mark.slow)],
)
def test_interrupted_anywhere_and_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool, stride: int
) -> None:
    """Stopped at every change of the file system in turn; with `again`, while it replaces another source."""
    monkeypatch.setattr(data.prepare.parts, "PART_BYTES", 6000)
    files = [write_jsonl(tmp_path / "a.jsonl", [*texts(0, 60), " "])]
    prepare(files, str(tmp_path / "unbroken"), BYTES, progress=False)
    unbroken = content(tmp_path / "unbroken")
    write_jsonl(tmp_path / "other.jsonl", texts(9, 90))
    prepare([tmp_path / "other.jsonl"], str(tmp_path / "other"), BYTES, progress=False)
    for stop in range(0, 1000, stride):
        out = tmp_path / "out"
        if again:
            shutil.copytree(tmp_path / "other", out)
        calls = iter([*range(1, stop + 1), 0, *range(1, 10_000)])
        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "unlink"):
                patch.setattr(os, name, crash(calls, getattr(os, name)))
            try:
                prepare(files, str(out), BYTES, overwrite=again, progress=False)
                crashed = next(calls) > stop + 1
            except KeyboardInterrupt:
                crashed = True
        if not crashed:
            break
        try:
            prepare(files, str(out), BYTES, overwrite=again, progress=False)
        except ValueError as error:  # stopped while it was cleaning up: nothing was left to do
            assert "holds a finished source" in str(error)
        assert content(out) == unbroken, stop
        assert not (tmp_path / "out.parts").exists()
        shutil.rmtree(out)
    assert stop > 20


def command(files: list[Path], output: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "data.prepare", "--input", *map(str, files), "--output", str(output), *more]
    return subprocess.Popen(words, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_killed_and_run_again(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{i:02}.jsonl", texts(i, 1500)) for i in range(16)]
    unbroken = prepare(files, str(tmp_path / "unbroken"), BYTES, progress=False)
    process = command(files, tmp_path / "out", "--val-fraction", "0.1", "--workers", "2")
    parts = tmp_path / "out.parts/parts"
    while len(list(parts.glob("*/done.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    workers = workers_of(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("000*/done.json") if "." not in path.parent.name}
    assert 3 <= len(kept) < 16
    assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=30)[1]  # they end with their parent
    again = command(files, tmp_path / "out", "--val-fraction", "0.1", "--workers", "2")
    assert again.communicate()[0] is None and again.returncode == 0
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")
    assert SourceManifest.read(f"{tmp_path}/out/train") == unbroken.manifests["train"]


@pytest.mark.slow
def test_a_worker_that_dies_is_one_clear_error(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{i}.jsonl", texts(i, 20_000)) for i in range(4)]
    process = command(files, tmp_path / "out", "--workers", "2")
    while not list((tmp_path / "out.parts/parts").glob("*.*")):
        assert process.poll() is None
        time.sleep(0.001)
    workers_of(process)[0].kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: a worker died (killed, or out of memory: --workers); run the same command again to go on" in errors
    assert "Traceback" not in errors


@pytest.mark.runs
def test_unfinished_work_of_other_settings_is_not_mixed_in(tmp_path: Path, mixed: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(BadRecord):
        prepare([mixed], out, BYTES, on_bad="fail", progress=False)
    for settings in (
        SourceSettings(val_fraction=0.1, field="t"),
        SourceSettings(val_fraction=0.2),
        SourceSettings(seed=1),
    ):
        with pytest.raises(ValueError, match="holds unfinished work with other settings; finish that, or start over"):
            prepare([mixed], out, settings, progress=False)
    os.utime(mixed, (0, 0))
    with pytest.raises(ValueError, match="holds unfinished work with other files; finish that, or start over"):
        prepare([mixed], out, BYTES, progress=False)
    made = prepare([mixed], out, BYTES, overwrite=True, progress=False)
    with pytest.raises(ValueError, match="holds a finished source; replace it with --overwrite"):
        prepare([mixed], out, BYTES, progress=False)
    assert prepare([mixed], out, BYTES, overwrite=True, progress=False).manifests == made.manifests


def test_two_preparations_do_not_work_in_one_place(tmp_path: Path, mixed: Path) -> None:
    with locked(tmp_path / "out.parts", wait=False), pytest.raises(ValueError, match="another process is at work in"):
        prepare([mixed], str(tmp_path / "out"), BYTES, progress=False)


def test_overwrite_deletes_sources_only(tmp_path: Path, mixed: Path) -> None:
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/thesis.pdf").touch()
    (tmp_path / "staging/parts").mkdir(parents=True)
    (tmp_path / "staging/parts/engine.step").touch()
    with pytest.raises(ValueError, match=r"train holds thesis.pdf, which is no part of a source"):
        prepare([mixed], str(tmp_path / "out"), BYTES, overwrite=True, progress=False)
    with pytest.raises(ValueError, match=r"staging/parts is in the way, and not from a preparation"):
        prepare([mixed], f"{tmp_path}/b", BYTES, overwrite=True, staging=tmp_path / "staging", progress=False)
    assert (tmp_path / "out/train/thesis.pdf").exists() and (tmp_path / "staging/parts/engine.step").exists()


def test_mistakes_in_the_arguments(tmp_path: Path, mixed: Path) -> None:
    for settings, knobs, words in (
        (SourceSettings("nowhere.json"), {}, "no tokenizer at 'nowhere.json': there is no"),
        (SourceSettings(eos="<none>"), {}, "has none of the end tokens <none>"),
        (SourceSettings(val_fraction=1.5), {}, "--val-fraction is 1.5; it must lie between 0 and 1"),
        (SourceSettings(chunk_tokens=10), {}, "--chunk-tokens is 10; it must be at least 1024"),
        (
            SourceSettings(field="body"),
            {},
            "none of the 33 records of the input can be used: invalid JSON, no field 'body'",
        ),
        (BYTES, {"workers": 0}, "--workers is 0; it must be at least 1"),
        (BYTES, {"staging": mixed.parent / "in" / "staging"}, "in contains .*staging, where output goes"),
    ):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(mixed, tmp_path / "in")
        with pytest.raises(ValueError, match=words):
            prepare([tmp_path / "in"], str(tmp_path / "out"), settings, **knobs, progress=False)
        assert not list(tmp_path.glob("out*"))


def test_a_disk_that_is_too_small_is_named(tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(ValueError, match=r"out.parts has 0.0 GB free, but about 0.0 GB are needed; name another"):
        prepare([mixed], str(tmp_path / "out"), BYTES, progress=False)


def test_any_hugging_face_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts(0, 50), trainer)
    (tmp_path / "tok").mkdir()
    tokenizer.save(str(tmp_path / "tok/tokenizer.json"))
    path = write_jsonl(tmp_path / "a.jsonl", texts(0, 20))
    settings = SourceSettings(str(tmp_path / "tok"), val_fraction=0.1)
    made = prepare([path], str(tmp_path / "out"), settings, progress=False).manifests
    expected = sum(len(tokenizer.encode(text).ids) + 1 for text in texts(0, 20))
    assert made["train"].tokens + made["val"].tokens == expected
    assert made["train"].eos_id == tokenizer.token_to_id("</s>")


def test_the_byte_tokenizer_gives_every_text_back() -> None:
    tokenizer = load_tokenizer("bytes")
    text = "tabs\t newline\n ü 漢字 \x00\x7f emoji 🙂 <|im_start|>"
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids[:-1]) == text and ids[-1] == tokenizer.eos_id
    plain = text.removesuffix("<|im_start|>")
    assert len(tokenizer.encode([plain])[0]) == len(plain.encode()) + 1
    assert tokenizer.vocab_size == 260 == byte_tokenizer().get_vocab_size()


@pytest.mark.runs
def test_s3(tmp_path: Path, mixed: Path) -> None:
    """Prepared there, and read from there; an upload that failed is gone on with."""
    local = prepare([mixed], str(tmp_path / "out"), BYTES, progress=False)
    with s3_server(tmp_path / "cache") as client:
        web, staging = "s3://corpus/web", tmp_path / "staging"
        with pytest.raises(ValueError, match=f"{web}: .*NoSuchBucket"):
            prepare([mixed], web, BYTES, staging=staging, progress=False)
        assert (staging / "parts/000000/done.json").exists()
        client.create_bucket(Bucket="corpus")
        made = prepare([mixed], f"{web}/", BYTES, staging=staging, progress=False)
        assert not staging.exists()
        assert made.manifests == local.manifests and made.origins == local.origins
        assert (everything(Source(f"{web}/train")) == everything(Source(f"{tmp_path}/out/train"))).all()
        keys = {entry["Key"] for entry in client.list_objects_v2(Bucket="corpus")["Contents"]}
        assert keys == {f"web/{name}" for name in content(tmp_path / "out")}
        with pytest.raises(ValueError, match=f"{web} holds a finished source; replace it with --overwrite"):
            prepare([mixed], web, BYTES, progress=False)
