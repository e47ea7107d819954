"""Which prompts a step has: a function of seed, plan, step and what the filter kept."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from data.prompts import PromptData
from nb_lightning.files import sha256_of
from nb_lightning.rewards.tasks import read_tasks
from nb_lightning.text.chat_tokens import ChatTokenizer, thought_opened_by
from tests.harness import ROOT
from tests.rl_harness import make, opened

pytestmark = pytest.mark.runs

KEPT = {"stem": {"words": ["words/1", "words/4", "words/5"], "digits": [f"digits/{i}" for i in range(0, 12, 2)]}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def data(made: Path, tmp_path: Path) -> PromptData:
    found = opened(made, tmp_path, "stage.phases.stem.steps=9")
    found.selected_tasks = KEPT
    return found


def ids(data: PromptData, step: int, rank: int = 0, ranks: int = 1) -> list[str]:
    return [prompt.task.id for prompt in data.draw(step, rank, ranks)]


def test_the_mixture_holds_in_every_step_and_prompts_are_used_evenly(data: PromptData) -> None:
    drawn = [ids(data, step) for step in range(9)]
    assert all(Counter(id.split("/")[0] for id in step) == {"words": 2, "digits": 2} for step in drawn)
    words = [id for step in drawn for id in step if id.startswith("words")]
    digits = [id for step in drawn for id in step if id.startswith("digits")]
    assert Counter(words) == dict.fromkeys(KEPT["stem"]["words"], 6)  # 18 of 3
    assert Counter(digits) == dict.fromkeys(KEPT["stem"]["digits"], 3)  # 18 of 6
    # Each once before one is drawn again, in another order every time.
    passes = [words[i : i + 3] for i in range(0, 18, 3)], [digits[i : i + 6] for i in range(0, 18, 6)]
    assert all(len(set(one)) == len(one) for of_source in passes for one in of_source)
    assert all(len(set(map(tuple, of_source))) > 1 for of_source in passes)


def test_the_second_phase_draws_from_all_where_nothing_was_filtered(data: PromptData) -> None:
    drawn = [id for step in range(9, 12) for id in ids(data, step)]
    assert len(drawn) == 18 and set(drawn) <= {f"digits/{i}" for i in range(12)} and len(set(drawn)) == 12


def test_ranks_share_a_step(data: PromptData) -> None:
    for step in (0, 3, 9, 11):
        assert ids(data, step, 0, 2) + ids(data, step, 1, 2) == ids(data, step)


def test_a_pure_function_of_the_step(data: PromptData, made: Path, tmp_path: Path) -> None:
    again = opened(made, tmp_path, "stage.phases.stem.steps=9")
    again.selected_tasks = KEPT
    for step in (11, 2, 7):
        assert again.draw(step) == data.draw(step)
    other = opened(made, tmp_path, "stage.phases.stem.steps=9", "seed=1")
    other.selected_tasks = KEPT
    assert [ids(other, step) for step in range(9)] != [ids(data, step) for step in range(9)]


def test_every_group_has_a_seed_of_its_own(data: PromptData) -> None:
    prompts = [prompt for step in range(12) for prompt in data.draw(step)]
    others = [data.draw_replacement(step, round, place) for step in range(9) for round in (1, 2) for place in range(4)]
    seeds = [prompt.seed for prompt in prompts + others]
    assert len(set(seeds)) == len(seeds)


def test_another_prompt_is_of_the_same_source_and_no_other_place_has_it(data: PromptData) -> None:
    for step in range(9):
        drawn = data.draw(step)
        for place, prompt in enumerate(drawn):
            found = [data.draw_replacement(step, round, place) for round in (1, 2, 3)]
            assert {other.task.source for other in found} == {prompt.task.source}
        others = [data.draw_replacement(step, 1, place) for place in range(4)]
        digits = [other.task.id for other in others if other.task.source == "digits"]
        assert len(set(digits)) == 2
        assert [data.draw_replacement(step, 1, i, 1, 2) for i in range(2)] == others[2:]  # rank 1 of 2 has the last two


def test_prompts_without_room_are_left_out_and_counted(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        data = opened(made, tmp_path)
        lengths = sorted({len(ids) for ids in data._prompt_ids["words"].values()})
        room = next(a for a, b in pairwise(lengths) if a < b)
        data = opened(made, tmp_path, f"stage.phases.stem.seq_len={room + 24}")
    fitting = data.fitting_tasks["stem"]["words"]
    assert 0 < len(fitting) < 12 and all(len(data._prompt_ids["words"][id]) <= room for id in fitting)
    assert f"stem: words: {len(fitting)} prompts; {12 - len(fitting)} too long, left out" in caplog.text


def test_the_digest_is_the_files(made: Path, tmp_path: Path) -> None:
    data = opened(made, tmp_path)
    other = tmp_path / "other.jsonl"
    other.write_text((made / "words.jsonl").read_text().replace("6}", "7}"))
    changed = opened(made, tmp_path, f"data.sources.words={other}")
    assert len(read_tasks(other)) == 12
    assert changed.digests["words"] != data.digests["words"] and changed.digests["digits"] == data.digests["digits"]


def test_variables_of_the_template_change_the_digest_and_none_do_not(made: Path, tmp_path: Path) -> None:
    digests = [
        opened(made, tmp_path, *(f"+data.template_kwargs.enable_thinking={thinks}" for thinks in given)).digests
        for given in ((), ("true",), ("false",))
    ]
    assert digests[0]["words"] == sha256_of(made / "words.jsonl")  # as before there were variables
    assert len({digest["words"] for digest in digests}) == 3


def test_a_task_that_the_template_refuses_is_named(made: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text((made / "words.jsonl").read_text().replace('"role": "user"', '"role": "nobody"', 1))
    with pytest.raises(ValueError, match=r"data.sources.words: task 'words/0': "):
        opened(made, tmp_path, f"data.sources.words={bad}")


@pytest.mark.parametrize("thinks, end", [("true", "<think>\n"), ("false", "<think>\n\n</think>\n\n")])
def test_variables_of_the_template_are_in_the_prompts(made: Path, tmp_path: Path, thinks: str, end: str) -> None:
    """Where the prompt closes the thought, an answer is no unfinished thought."""
    family = ROOT / "tests/text/templates/nanbeige42.jinja"
    variables = f"+data.template_kwargs.enable_thinking={thinks}"
    data = opened(made, tmp_path, f"data.template={family}", variables, "stage.max_new_tokens=4")
    for prompt in data.draw(0):
        chat = ChatTokenizer(data.tokenizer, data.chat)
        assert prompt.ids == chat.prompt(prompt.task.messages)
        assert data.tokenizer.decode(prompt.ids).endswith(f"<|im_end|>\n<|im_start|>assistant\n{end}")
        assert thought_opened_by(data.tokenizer, prompt.ids) == ("<think>\n" if thinks == "true" else "")


def test_reserved_variables_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.template_kwargs sets tools; reserved are messages, tools"):
        opened(made, tmp_path, "+data.template_kwargs.tools=3")
