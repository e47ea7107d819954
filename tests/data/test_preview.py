"""The preview tells lengths and shows one row with its mask."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data.demo import chats as demo
from data.demo import tasks
from data.preview import main
from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.token_source import SourceManifest
from tests.sft_harness import make_sources


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_sources(tmp_path_factory.mktemp("chats")) / "demo_chats/maths_sort")


def test_lengths_and_a_row(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([source, "--seq-len", "100"])
    out = capsys.readouterr().out
    manifest = SourceManifest.read(f"{source}/train")
    assert f"{manifest.documents} samples, {manifest.tokens:,} tokens, {manifest.trained:,} of them trained on" in out
    dropped = int(re.search(r"longer than a row +(\d+)", out)[1])
    assert dropped > 0 and f"{dropped} over-long dropped" in out
    shown = re.findall(r"--- sample \d+: (\d+) tokens, (\d+) trained on ---\n(.*?)(?=\n---|\Z)", out, re.S)
    assert shown and sum(int(tokens) - 1 for tokens, _, _ in shown) <= 100
    for tokens, trained, text in shown:
        assert re.search(r"<\|im_start\|>assistant\n\[maths_sort .*<\|im_end\|>\]", text)
        inside = "".join(re.findall(r"\[(.*?)\]", text, re.S))
        plain = text.replace("[", "").replace("]", "").rstrip("\n")
        specials = re.compile(r"<\|\w+\|>")
        assert len(specials.sub("x", plain)) == int(tokens) and len(specials.sub("x", inside)) == int(trained)
    main([source, "--seq-len", "100", "--row", "1", "--split", "val", "--over-long", "split"])
    assert "over-long dropped" not in capsys.readouterr().out


def test_colour_on_a_terminal(source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    main([source, "--seq-len", "100"])
    out = capsys.readouterr().out
    assert "\x1b[1;32mmaths_sort" in out and "\x1b[2m<|im_start|>user" in out
    main([source, "--seq-len", "100", "--plain"])
    assert "\x1b" not in capsys.readouterr().out


def test_mistakes_are_one_line(source: str, corpus: Path) -> None:
    for words, error in (
        (["nowhere"], "error: no tokenized data at nowhere/train"),
        ([f"{corpus}/demo/docs"], "holds documents, not conversations"),
        ([source, "--tokenizer", "nowhere.json"], "error: no tokenizer at 'nowhere.json'"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert error in str(ended.value) and "\n" not in str(ended.value)


@pytest.mark.runs
def test_demo_sources_follow_their_tasks_and_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"chats/train": 30, "tasks/train": 2, "val": 5}
    monkeypatch.setattr(tasks.build_demo_tasks, "__defaults__", (("maths_sort", "tools_calls"), counts, 0))
    template = ChatTemplate.chatml().source
    where = {name: tmp_path / "chats" / name for name in ("maths_sort", "tools_calls")}

    def build(template: str = template, **sources: Path) -> list[str]:
        demo.build_demo_chats(tmp_path / "tasks", sources or where, "bytes", template)
        return [SourceManifest.read(f"{folder}/train").digest for folder in where.values()]

    first = build()
    manifests = [SourceManifest.read(f"{where['maths_sort']}/{split}") for split in ("train", "val")]
    assert [m.documents for m in manifests] == [30, 5] and manifests[0].dropped == {}
    stamp = (where["maths_sort"] / "train/source.json").stat().st_mtime_ns
    assert build() == first and (where["maths_sort"] / "train/source.json").stat().st_mtime_ns == stamp
    other = build(template.replace("<tools>", "<functions>"))
    assert (
        other[0] == first[0] and SourceManifest.read(f"{where['maths_sort']}/train").template != manifests[0].template
    )
    monkeypatch.setattr(tasks, "VERSION", 99)
    monkeypatch.setattr(tasks.build_demo_tasks, "__defaults__", (("maths_sort", "tools_calls"), counts, 1))
    assert build()[0] != first[0]
    with pytest.raises(ValueError, match=r"data.sources.poems: the demo tasks have maths_sort, tools_calls"):
        build(poems=tmp_path / "chats/poems")
    (where["maths_sort"] / demo.MADE_OF).unlink()
    with pytest.raises(ValueError, match="holds a source that is not the demo's"):
        build()
