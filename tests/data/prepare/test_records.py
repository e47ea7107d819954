"""Every kind of input gives its texts, and every bad record its reason, file and line."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import string
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import data.prepare.parts
from data.prepare.dropped import log_dropped, merge_dropped
from data.prepare.parts import Part, count_lines_before, cut_inputs
from data.prepare.records import Record, read_objects, read_texts

TEXTS = [f"document {i} ü 漢 " + "word " * (7 * i % 40) for i in range(60)]


def as_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def as_array(texts: list[str]) -> bytes:
    return json.dumps([{"n": i, "text": text} for i, text in enumerate(texts)], indent=1).encode()


def records(path: Path, **options: Any) -> list[Record]:
    return [record for part in cut_inputs([str(path)], **options)[0] for record in read_texts(part, "text")]


def texts(path: Path, **options: Any) -> list[str | None]:
    return [record.value for record in records(path, **options)]


def test_plain_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines(TEXTS)[:-1])  # no newline at the end
    assert texts(path) == TEXTS
    path.write_bytes(b"\xef\xbb\xbf" + as_lines(TEXTS).replace(b"\n", b"\r\n"))  # as some editors save it
    assert texts(path) == TEXTS


def test_archives_of_several_members(tmp_path: Path) -> None:
    lines = as_lines(TEXTS)
    half = len(lines) // 2
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
    assert texts(tmp_path / "a.jsonl.gz") == TEXTS
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00note"  # zstd allows frames of user data in between
    (tmp_path / "b.jsonl.zst").write_bytes(
        zstandard.compress(lines[:half]) + skippable + zstandard.compress(lines[half:])
    )
    assert texts(tmp_path / "b.jsonl.zst") == TEXTS
    long_window = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    compressed = zstandard.ZstdCompressor(compression_params=long_window).compress(lines)
    (tmp_path / "c.jsonl.zst").write_bytes(compressed)
    assert texts(tmp_path / "c.jsonl.zst") == TEXTS


def test_xz_and_ndjson(tmp_path: Path) -> None:
    lines = as_lines(TEXTS)
    half = len(lines) // 2
    (tmp_path / "a.jsonl.xz").write_bytes(
        lzma.compress(lines[:half]) + bytes(8) + lzma.compress(lines[half:]) + bytes(4)
    )
    (tmp_path / "b.ndjson").write_bytes(lines)
    assert texts(tmp_path / "a.jsonl.xz") == texts(tmp_path / "b.ndjson") == TEXTS


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, lzma.compress])
def test_every_kind_of_json_may_be_compressed(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    ending = {gzip.compress: "gz", zstandard.compress: "zst", lzma.compress: "xz"}[pack]
    long = ["x" * 300_000, *TEXTS, "y" * 300_000]  # longer than a block
    for name, content in (
        ("a.jsonl", as_lines(long)),
        ("b.ndjson", as_lines(long).rstrip()),
        ("c.json", as_array(long)),
        ("d.json", as_lines(long)),
        ("e.json", b"\xef\xbb\xbf\n " + as_array(long)),
    ):
        (tmp_path / f"{name}.{ending}").write_bytes(pack(content))
        assert texts(tmp_path / f"{name}.{ending}") == long
    parts, ignored = cut_inputs([str(tmp_path)])  # in a folder, only arrays among the .json
    assert sorted(Path(part.files[0]).name[0] for part in parts) == list("abce") and ignored == {f".{ending}": 1}


def test_an_array_is_one_behind_an_empty_member_and_in_blocks_that_unpack_late(tmp_path: Path) -> None:
    noise = ["".join(random.Random(0).choices(string.ascii_letters + string.digits, k=300_000))]  # hardly compresses
    for name, content in (
        ("a.json.gz", gzip.compress(b"") + gzip.compress(as_array(TEXTS))),
        ("b.json.xz", lzma.compress(b"") + lzma.compress(as_array(TEXTS))),
        # what pzstd writes before each frame
        ("c.json.zst", b"\x50\x2a\x4d\x18\x02\0\0\0ab" + zstandard.compress(as_array(TEXTS))),
        ("d.json.zst", zstandard.compress(as_array(noise))),
    ):
        (tmp_path / name).write_bytes(content)
        assert texts(tmp_path / name) == (noise if name[0] == "d" else TEXTS)


def test_bad_records_of_an_archive_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson.gz").write_bytes(gzip.compress(b'{"text": "x"}\n\n{"text": 1}\n[\n{"text": "y"}'))
    assert [(r.line, r.bad) for r in records(tmp_path / "a.ndjson.gz")] == [
        (1, None), (2, "empty line"), (3, "field 'text' is not a string"), (4, "invalid JSON"), (5, None),
    ]  # fmt: skip
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'[{"text": "x"}, 3, {"body": 1}]'))
    assert [(r.line, r.bad) for r in records(tmp_path / "a.json.gz")] == [
        (1, None), (2, "not a JSON object"), (3, "no field 'text'"),
    ]  # fmt: skip


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\n  "])
def test_a_json_file_is_an_array_of_records_or_lines(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "a.json").write_bytes(mark + as_array(TEXTS) + b"\n")
    (tmp_path / "b.json").write_bytes(mark.rstrip() + as_lines(TEXTS))
    assert texts(tmp_path / "a.json") == texts(tmp_path / "b.json") == TEXTS


def test_bad_items_of_an_array_are_numbered(tmp_path: Path) -> None:
    items = [{"text": "a"}, 5, {"txt": "b"}, {"text": "c"}, {"text": ""}]
    (tmp_path / "a.json").write_text(json.dumps(items))
    assert [(r.line, r.bad) for r in records(tmp_path / "a.json")] == [
        (1, None),
        (2, "not a JSON object"),
        (3, "no field 'text'"),
        (4, None),
        (5, "empty text"),
    ]
    (part,) = cut_inputs([str(tmp_path / "a.json")])[0]
    assert count_lines_before(part) == 0
    assert [record.value for record in read_objects(part, ("text",))][:2] == [{"text": "a"}, None]


def test_in_a_folder_only_arrays_are_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(as_array(TEXTS))
    (tmp_path / "dataset_infos.json").write_text('{"text": "no record"}')
    parts, ignored = cut_inputs([str(tmp_path)])
    assert [Path(part.files[0]).name for part in parts] == ["a.json"] and ignored == {".json": 1}


def test_tables(tmp_path: Path) -> None:
    for name, column in (("a", pyarrow.array(TEXTS)), ("b", pyarrow.array(TEXTS).dictionary_encode())):
        table = pyarrow.table({"n": range(60), "text": column})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
        assert len(cut_inputs([str(tmp_path / f"{name}.parquet")])[0]) == 9  # a part each row group
        assert texts(tmp_path / f"{name}.parquet") == TEXTS


def test_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.prepare.parts, "PART_ROWS", 25)
    plain = datasets.Dataset.from_dict({"n": range(60), "text": TEXTS})
    plain.save_to_disk(str(tmp_path / "plain"))
    assert len(cut_inputs([str(tmp_path / "plain")])[0]) == 3
    assert texts(tmp_path / "plain") == TEXTS
    both = datasets.DatasetDict({"train": plain, "test": plain.select(range(5))})
    both.save_to_disk(str(tmp_path / "both"))
    assert texts(tmp_path / "both", split="test") == TEXTS[:5]
    with pytest.raises(ValueError, match="both has the splits train, test; choose one with --hf-split"):
        cut_inputs([str(tmp_path / "both")])


def test_folders_of_text_and_what_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    for number, name in enumerate(("a.txt", "b.md", "below/c.rst", "d.csv", "e.csv", "f")):
        (tmp_path / name).write_text(TEXTS[number])
    parts, ignored = cut_inputs([str(tmp_path)], text_suffixes=["rst"])
    assert [Path(file).name for part in parts for file in part.files] == ["a.txt", "b.md", "c.rst"]
    assert ignored == {".csv": 2, "no suffix": 1}
    monkeypatch.setattr(data.prepare.parts, "PART_BYTES", 10)
    assert len(cut_inputs([str(tmp_path)], text_suffixes=["rst"])[0]) == 3
    assert texts(tmp_path) == TEXTS[:2]


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
    (b'{"text": ' + b"1" * 10_000 + b"}", "field 'text' is not a string"),  # more digits than Python's int takes
]


@pytest.mark.parametrize("part_bytes", [2**26, 100])  # in one part, and cut after almost every line
def test_bad_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int) -> None:
    """A good line before each bad one: the bad ones are on lines 2, 4, 6 ..."""
    monkeypatch.setattr(data.prepare.parts, "PART_BYTES", part_bytes)
    path = tmp_path / "mixed.jsonl"
    good = as_lines(TEXTS).splitlines(keepends=True)
    path.write_bytes(b"".join(line + bad + b"\n" for line, (bad, _) in zip(good, BAD)))
    parts, _ = cut_inputs([str(path)])
    assert (len(parts) > 5) == (part_bytes == 100)
    found = []
    for part in parts:
        before = count_lines_before(part)
        found += [(r.bad, r.file, before + r.line) for r in read_texts(part, "text") if r.bad]
    assert found == [(reason, str(path), 2 * (i + 1)) for i, (_, reason) in enumerate(BAD)]


def test_bad_cells_and_files(tmp_path: Path) -> None:
    bytes_of = pyarrow.py_buffer(b"\xff\xfegood  ")  # three cells: not UTF-8, good, blank; and a null
    ends = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2, 6, 8)))
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, ends, bytes_of])
    table = pyarrow.table({"text": pyarrow.concat_arrays([column, pyarrow.nulls(1, pyarrow.string())])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    bad = [(r.line, r.bad) for r in records(tmp_path / "a.parquet")]
    assert bad == [(1, "not UTF-8"), (2, None), (3, "empty text"), (4, "field 'text' is not a string")]
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_bytes(b" \n")
    found = [(Path(r.file).name, r.bad) for name in ("a", "b") for r in records(tmp_path / f"{name}.txt")]
    assert found == [("a.txt", "not UTF-8"), ("b.txt", "empty text")]


def test_line_numbers_of_cut_files_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.prepare.parts, "PART_BYTES", 500)
    monkeypatch.setattr(data.prepare.parts, "PART_ROWS", 13)
    (tmp_path / "a.jsonl").write_bytes(as_lines(TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "b.parquet", row_group_size=11)
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "c"))
    for name in ("a.jsonl", "b.parquet", "c"):
        parts, _ = cut_inputs([str(tmp_path / name)])
        line = 0
        for part in parts:
            assert count_lines_before(part) == line
            line += len(list(read_texts(part, "text")))
        assert line == 60 and len(parts) > 4


def test_a_log_of_any_file_names(tmp_path: Path) -> None:
    """Names with line separators, and names that are no UTF-8, are written and read back."""
    names = ["plain.jsonl", "two\u2028lines.jsonl", "raw\udcff.jsonl"]
    logs = []
    for number, name in enumerate(names):
        with open(tmp_path / f"{number}", "w", encoding="utf-8", errors="backslashreplace") as log:
            for line in range(1, 6):
                log_dropped(log, Record(name, line, None, "invalid JSON"))
        logs.append((tmp_path / f"{number}", Part("jsonl", (name,)), 5))
    origins = merge_dropped(logs, tmp_path / "all")
    assert origins == {"invalid JSON": [f"{names[0]}:{line}" for line in (1, 2, 3)]}
    with open(tmp_path / "all", encoding="utf-8", newline="\n") as log:
        assert Counter(json.loads(line)["file"] for line in log) == dict.fromkeys(names, 5)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    lines = as_lines(TEXTS)
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "x.parquet")
    table = (tmp_path / "x.parquet").read_bytes()
    for name, content in (
        ("a.jsonl.gz", gzip.compress(lines)[:-100]),
        ("b.jsonl.gz", flipped(gzip.compress(lines), 200)),
        ("c.jsonl.gz", b""),
        ("a.jsonl.zst", zstandard.compress(lines)[:-100]),
        ("b.jsonl.zst", zstandard.compress(lines) + b"garbage"),
        ("c.jsonl.zst", b""),
        ("a.jsonl.xz", lzma.compress(lines)[:-100]),
        ("b.jsonl.xz", lzma.compress(lines) + b"garbage"),
        ("c.jsonl.xz", b""),
        ("d.ndjson.gz", gzip.compress(lines) + b"garbage"),
        ("d.json.gz", gzip.compress(as_array(TEXTS))[:-4]),
        ("e.json.gz", gzip.compress(as_array(TEXTS)[:-9])),
        ("a.json", as_array(TEXTS)[:-9]),
        ("b.json", as_array(TEXTS).replace(b"document 7", b"\xff")),
        ("a.parquet", table[:-9]),
        ("b.parquet", flipped(table, 60)),
    ):
        with pytest.raises(ValueError, match=rf"{name} cannot be read to its end: \S"):
            texts(write(tmp_path / name, content))
    path = write(tmp_path / "shrinks.jsonl", lines)
    parts, _ = cut_inputs([str(path)])
    write(path, lines[:1000])
    with pytest.raises(ValueError, match=r"shrinks.jsonl cannot be read to its end: it became \d+ bytes shorter"):
        list(read_texts(parts[0], "text"))


def test_mistakes_in_the_input(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", as_lines(TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "text": range(60)}), tmp_path / "b.parquet")
    pyarrow.parquet.ParquetWriter(tmp_path / "c.parquet", pyarrow.schema([("text", pyarrow.string())])).close()
    (tmp_path / "empty").mkdir()
    for inputs, words in (
        ([tmp_path / "c.parquet"], r"c.parquet: the tables have no rows"),
        (["nowhere.jsonl"], "--input nowhere.jsonl: no such file or folder"),
        (
            [tmp_path / "empty"],
            r"nothing to read; known are .jsonl, .ndjson or .json, also with .gz, .zst, .xz; .parquet, .txt, .md",
        ),
        ([path, tmp_path / "empty" / ".." / "a.jsonl"], "a.jsonl is given twice"),
        ([tmp_path, path], "a.jsonl is given twice"),
    ):
        with pytest.raises(ValueError, match=words):
            cut_inputs([str(name) for name in inputs])
    (part,) = cut_inputs([str(tmp_path / "b.parquet")])[0]
    with pytest.raises(ValueError, match=r"b.parquet has no column 'txt'; it has: body, text"):
        list(read_texts(part, "txt"))
    with pytest.raises(ValueError, match=r"b.parquet: column 'text' is of type int64, not string"):
        list(read_texts(part, "text"))


@pytest.mark.parametrize("module, name", [("zstandard", "a.jsonl.zst"), ("pyarrow.parquet", "a.parquet")])
def test_a_missing_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    words = rf"{name} needs {module.partition('.')[0]}: pip install 'nb_lightning\[data\]'"
    with pytest.raises(ValueError, match=words):
        texts(write(tmp_path / name, b"x"))
