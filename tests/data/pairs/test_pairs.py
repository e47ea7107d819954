"""`python -m data.pairs`: from models to a source, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.pairs.__main__ import main
from data.pairs.rule import NEVER_RIGHT, NEVER_WRONG
from data.prepare.__main__ import main as prepare
from data.prepare.pairs import Pairs
from data.prepare.settings import ChatSettings, SourceSettings
from nb_lightning.token_source import Source
from tests.data.pairs.harness import command, lines

pytestmark = pytest.mark.runs


def test_the_teacher_right_and_the_student_wrong(models: Path, made: Path, tmp_path: Path) -> None:
    pairs = lines(made / "pairs.jsonl")
    assert 8 < len(pairs) < 16  # of the 16 it can be right in; a quarter of the students are right twice
    for pair in pairs:
        assert (pair["chosen"], pair["rejected"]) == ("7", "8") and int(pair["id"][1:]) % 7 >= 3
        assert pair["messages"] == [{"role": "user", "content": f"{pair['id'][1:]} + ?"}]
        assert pair["scores"]["chosen"] == {"reward": 1.0, "status": "correct"}
        assert pair["scores"]["rejected"] == {"reward": 0.0, "status": "wrong"}
        assert pair["scores"]["teacher"] == [1.0, 1.0] and 0.0 in pair["scores"]["student"]
        provenance = pair["provenance"]
        assert (provenance["teacher"]["name"], provenance["student"]["name"]) == ("teacher", "student")
        assert len(provenance["teacher"]["digest"]) == 64 != provenance["student"]["digest"]
        assert provenance["seed"] == 3 and provenance["sampling"]["temperature"] == 1.0
    report = json.loads((made / "report.json").read_text())
    assert report["prompts"] == 28 and report["with_pairs"] == report["pairs"] == len(pairs)
    none = {reason: len(ids) for reason, ids in report["none"].items()}
    assert none == {NEVER_RIGHT: 12, NEVER_WRONG: 16 - len(pairs)}
    assert report["sources"]["sums"]["teacher"] == pytest.approx(16 / 28)
    prepare(["--pairs", "--input", str(made / "pairs.jsonl"), "--output", str(tmp_path / "source"), "--workers", "1",
             "--tokenizer", str(models / "student"), "--val-fraction", "0.2", "--on-bad", "fail"])  # fmt: skip
    assert sum(len(Source(str(tmp_path / f"source/{split}")).samples()) for split in ("train", "val")) == 2 * len(pairs)


def test_stopped_anywhere_it_goes_on_to_the_same_pairs(models: Path, made: Path, tmp_path: Path) -> None:
    again = tmp_path / "pairs"
    again.mkdir()
    (again / "claim.json").write_bytes((made / "claim.json").read_bytes())
    whole = (made / "calls.jsonl").read_bytes()
    (again / "calls.jsonl").write_bytes(whole[: len(whole) // 2])  # in the middle of a line
    kept = whole[: len(whole) // 2].rpartition(b"\n")[0]
    main(command(models, again))
    assert (again / "pairs.jsonl").read_bytes() == (made / "pairs.jsonl").read_bytes()
    assert (again / "calls.jsonl").read_bytes().startswith(kept)
    assert sorted(lines(again / "calls.jsonl"), key=str) == sorted(lines(made / "calls.jsonl"), key=str)


def test_the_journals_of_an_earlier_version_are_refused(models: Path, made: Path, tmp_path: Path) -> None:
    again = tmp_path / "pairs"
    again.mkdir()
    claim = json.loads((made / "claim.json").read_text())
    del claim["version"]
    (again / "claim.json").write_text(json.dumps(claim))
    (again / "teacher.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as stopped:
        main(command(models, again))
    assert str(stopped.value) == (
        f"error: --output {again} holds responses in the journals of an earlier version, which are no longer read; "
        "name another folder, or replace them with --overwrite"
    )
    main(command(models, again, "--overwrite"))
    assert (again / "pairs.jsonl").read_bytes() == (made / "pairs.jsonl").read_bytes()
    assert not (again / "teacher.jsonl").exists()


def test_killed_before_the_claim_was_whole_it_begins_again(models: Path, made: Path, tmp_path: Path) -> None:
    again = tmp_path / "pairs"
    again.mkdir()
    (again / ".claim.json.tmp").write_text('{"tas')
    main(command(models, again))
    assert (again / "pairs.jsonl").read_bytes() == (made / "pairs.jsonl").read_bytes()


def test_overwriting_keeps_the_claim_until_the_new_one_is_there(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "pairs"
    again.mkdir()
    (again / "claim.json").write_text('{"seed": 1}')

    def killed(folder: Path, claim: object) -> None:
        assert (folder / "claim.json").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("data.prepare.claim.write_claim", killed)
    with pytest.raises(SystemExit):
        main(command(models, again, "--overwrite"))


def test_what_is_there_is_not_sampled_again(models: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.calls.local.load_pretrained", None)
    before = (made / "pairs.jsonl").read_bytes()
    main(command(models, made, "--margin", "0.5"))  # another rule needs no other responses
    assert (made / "pairs.jsonl").read_bytes() == before


def test_mistakes_are_one_line(models: Path, made: Path, tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    (tmp_path / "else/notes.txt").touch()
    (tmp_path / "other.jinja").write_text("{{ messages }}")
    no_reason = f"not one pair of 28 prompts: 16 {NEVER_WRONG}, 12 {NEVER_RIGHT}; the responses are in"
    for words, error in (
        (
            command(models, made, "--seed", "4"),
            "holds responses of other seed; name another folder, or",
        ),
        (command(models, tmp_path / "else"), "holds something else (notes.txt); name another folder"),
        (command(models, tmp_path / "x", "--student", str(models / "teacher")), no_reason),
        (
            command(models, tmp_path / "y", "--by", "both"),
            "--by both needs --judge: a run of stage=reward_model, or an endpoint",
        ),
        (command(models, tmp_path / "y", "--teacher", "http://x/v1"), "name its model with --teacher-model"),
        (command(models, tmp_path / "y", "--student", "http://x/v1"), "--student is an endpoint; it must be a local"),
        (command(models, tmp_path / "y", "--teacher", "nowhere"), "no checkpoint at 'nowhere'"),
        (command(models, tmp_path / "y", "--k", "0"), "--k is 0; it must be at least 1"),
        (command(models, tmp_path / "y", "--margin", "2"), "--margin is 2.0; it must be above 0 and at most 1"),
        (command(models, tmp_path / "y", "--chat-template", "nowhere"), "--chat-template nowhere cannot be read"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert error in str(stopped.value) and "\n" not in str(stopped.value)
    assert not (tmp_path / "y").exists()


def test_pairs_are_prepared_with_the_variables_they_were_sampled_with(models: Path, tmp_path: Path) -> None:
    (tmp_path / "noted.jinja").write_text(
        "{{ note | default('') }}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    words = [
        "--chat-template",
        str(tmp_path / "noted.jinja"),
        "--template-kwargs",
        '{"note": "Hush."}',
        "--limit",
        "14",
    ]
    main(command(models, tmp_path / "pairs", *words))
    pairs = lines(tmp_path / "pairs/pairs.jsonl")
    assert all(pair["chat_template_kwargs"] == {"note": "Hush."} for pair in pairs)
    form = Pairs(SourceSettings("bytes", chat=ChatSettings((tmp_path / "noted.jinja").read_text()), pairs=True))
    _, (chosen, _) = form.parse(pairs[0])
    noted = form.encoder.with_variables({"note": "Hush."})
    prompt = noted.prompt(pairs[0]["messages"])
    assert chosen[: len(prompt)] == prompt and form.tokenizer.decode(prompt).startswith("Hush.<|im_start|>")
