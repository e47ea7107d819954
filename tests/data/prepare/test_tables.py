"""Tables of conversations give the same samples as the same records in jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data.prepare.chats import Chats
from data.prepare.conversations import FIELDS
from data.prepare.parts import cut_inputs
from data.prepare.records import read_objects
from data.prepare.settings import ChatSettings, SourceSettings
from nb_lightning.text.messages import ChatError


def record(name: str, arguments: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    function = {"name": name, "parameters": {"type": "object", "properties": properties}}
    return {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "ok", "reasoning_content": "It worked."},
        ],
        "tools": [{"type": "function", "function": function}],
    }


RECORDS = [
    record("weather", {"city": "Oslo"}, {"city": {"type": "string", "enum": ["Oslo", "Rome"]}}),
    record("add", {"a": 1, "b": 2.5}, {"a": {"type": "number"}, "b": {"type": "number"}}),
    record("place", {"at": {"x": [1, None], "how": {"slow": True}}}, {"at": {"type": "object"}}),
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
]


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def from_list(folder: Path) -> Path:
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(folder / "ds"))
    return folder / "ds"


def from_json(folder: Path) -> datasets.Dataset:
    file = str(jsonl(folder / "in.jsonl", RECORDS))
    return datasets.Dataset.from_json(file, cache_dir=str(folder / "cache"))


def loaded_json(folder: Path) -> Path:
    from_json(folder).save_to_disk(str(folder / "ds"))
    return folder / "ds"


def parquet_of_datasets(folder: Path) -> Path:
    from_json(folder).to_parquet(str(folder / "a.parquet"))
    return folder / "a.parquet"


def parquet_of_structs(folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), folder / "a.parquet")
    return folder / "a.parquet"


def parquet_of_json_strings(folder: Path) -> Path:
    rows = [{key: [json.dumps(item) for item in value] for key, value in record.items()} for record in RECORDS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def parquet_of_json_tools(folder: Path) -> Path:
    rows = [{**r, "tools": json.dumps(r["tools"]) if "tools" in r else None} for r in RECORDS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def objects(path: Path) -> list[Any]:
    return [record.value for part in cut_inputs([str(path)])[0] for record in read_objects(part, FIELDS)]


TABLES = (
    from_list,
    loaded_json,
    parquet_of_datasets,
    parquet_of_structs,
    parquet_of_json_strings,
    parquet_of_json_tools,
)


@pytest.mark.parametrize("write", TABLES)
def test_a_table_gives_the_samples_of_its_records(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    chats = Chats(SourceSettings("bytes", chat=ChatSettings()))
    expected = chats.parse_many(objects(jsonl(tmp_path / "a.jsonl", RECORDS)))
    assert chats.parse_many(objects(write(tmp_path))) == expected
    assert not any(isinstance(parsed, ChatError) for parsed in expected) and len(expected) == len(RECORDS)


def test_nulls_of_other_rows_are_left_out_and_written_ones_stay(tmp_path: Path) -> None:
    first, second, third, fourth = objects(from_list(tmp_path))
    assert [r["messages"] for r in (first, second, third)] == [r["messages"] for r in RECORDS[:3]]
    assert [r["tools"] for r in (first, second, third)] == [r["tools"] for r in RECORDS[:3]]
    assert fourth["messages"] == RECORDS[3]["messages"] and not fourth["tools"]


def test_a_null_inside_json_was_written_by_someone(tmp_path: Path) -> None:
    rows = [record("f", {"x": None}, {"x": {"default": None}})]
    json_rows = [{key: [json.dumps(item) for item in value] for key, value in row.items()} for row in rows]
    features = datasets.Features({key: datasets.List(datasets.Json()) for key in ("messages", "tools")})
    datasets.Dataset.from_list(json_rows, features=features).save_to_disk(str(tmp_path / "ds"))
    assert objects(tmp_path / "ds") == rows


def test_an_empty_object_beside_others_stays_empty(tmp_path: Path) -> None:
    rows = [record("f", {}, {}), record("g", {"x": 1}, {"x": {"type": "number"}})]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "ds"))
    assert objects(tmp_path / "ds") == rows


def test_a_map_is_an_object(tmp_path: Path) -> None:
    kind = pyarrow.list_(
        pyarrow.struct({"role": pyarrow.string(), "extra": pyarrow.map_(pyarrow.string(), pyarrow.string())})
    )
    column = pyarrow.array([[{"role": "user", "extra": [("a", "1"), ("b", None)]}]], kind)
    pyarrow.parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "a.parquet")
    assert objects(tmp_path / "a.parquet") == [{"messages": [{"role": "user", "extra": {"a": "1", "b": None}}]}]


def test_a_string_that_is_no_object_is_refused_as_a_message(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"messages": [["{broken", "5"]]}), tmp_path / "a.parquet")
    assert objects(tmp_path / "a.parquet") == [{"messages": ["{broken", "5"]}]
    (error,) = Chats(SourceSettings("bytes", chat=ChatSettings())).parse_many(objects(tmp_path / "a.parquet"))
    assert str(error) == "message 0: not an object"
