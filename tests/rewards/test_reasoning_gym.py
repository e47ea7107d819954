"""Each task that is let in gives 1 to its own answer and 0 to anything else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nb_lightning.rewards import Guarded, get_verifier
from nb_lightning.rewards.reasoning_gym import EXACT, SCORED, tasks
from nb_lightning.rewards.tasks import read_tasks
from tests.harness import ROOT

pytest.importorskip("reasoning_gym")

GARBAGE = [
    "zzz", "0", "1", "2", "-1", "42", "None", "True", "False", "yes", "no", "[]", "{}", "()", "[[]]", "[[1]]",
    "1 2 3", "nan", "inf", "-inf", "1e999",
    "nan+nanj", "1/0", "\x00", "²", "١", "A", "B", "C", "x", "A" * 500, "9" * 500,
    "((" * 30, '{"a": 1}', "\\boxed{1}", " ".join(map(str, range(100))),
    "".join(map(chr, range(32, 127))), "heads", "[None]", "__import__('os').getpid()", "1" * 5000, "\n\n.",
]  # fmt: skip
# Slow to make (a second or more for a few entries).
SLOW = {"zebra_puzzles", "futoshiki", "sudoku", "tsumego", "arc_1d", "group_anagrams", "word_ladder", "gsm_symbolic"}


@pytest.fixture(scope="module")
def verifier() -> Guarded:
    return get_verifier("reasoning_gym")


def sound(verifier: Guarded, name: str, size: int) -> None:
    made = list(tasks(name, size, seed=7))
    for i, task in enumerate(made):
        reference = json.loads(json.dumps(task.reference))
        verifier.check(reference)
        own = reference["entry"]["answer"]
        other = made[(i + 1) % size].reference["entry"]["answer"]
        wrong = [answer for answer in (*GARBAGE, f"{own} or zzz", f"zzz, {own}", f"{own}\n{other}x", f"{other}?")
                 if answer.strip().casefold() != own.strip().casefold()]  # fmt: skip
        completions = [f"<think>hm</think>Answer: {answer}" for answer in (own, *wrong)]
        right, *rest = verifier.score("", completions, reference)
        assert right.reward == 1, (name, own, right)
        paid = [answer for answer, score in zip(wrong, rest) if score.reward]
        assert paid == [], (name, own)
        assert {score.info["status"] for score in rest} <= {"wrong", "no_answer"}, name


@pytest.mark.parametrize("name", sorted((EXACT | SCORED) - SLOW))
def test_a_task_is_sound(verifier: Guarded, name: str) -> None:
    sound(verifier, name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXACT | SCORED))
def test_a_task_is_sound_at_length(verifier: Guarded, name: str) -> None:
    sound(verifier, name, 25)


@pytest.mark.parametrize(
    "name", ["coin_flip", "complex_arithmetic", "countdown", "composite", "no_such_task", None, 3, []]
)
def test_unsound_and_unknown_tasks_are_refused(verifier: Guarded, name: Any) -> None:
    with pytest.raises(ValueError, match=r"no sound reasoning-gym task is called .*chain_sum"):
        verifier.check({"task": name, "entry": {"answer": "1"}})


@pytest.mark.parametrize(
    "reference, words",
    [("x", "must be an object"), ({"task": "chain_sum"}, "'entry'"),
    ({"task": "chain_sum", "entry": {"answer": 3}}, "'entry'"),
     ({"task": "chain_sum", "entry": {"answer": "3"}, "x": 1}, "must be an object")],
)  # fmt: skip
def test_a_bad_reference_is_refused(verifier: Guarded, reference: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        verifier.check(reference)


def test_a_scorer_that_raises_costs_nothing_but_the_reward(verifier: Guarded) -> None:
    [task] = tasks("prime_factorization", 1, seed=0)
    [score] = verifier.score("", ["Answer: zzz"], task.reference)  # this scorer cannot read it
    assert (score.reward, score.info["status"]) == (0, "wrong")


def test_settings_of_a_task_reach_it(verifier: Guarded) -> None:
    [task] = tasks("chain_sum", 1, seed=0, min_terms=7, max_terms=7)
    assert task.reference["entry"]["metadata"]["num_terms"] == 7
    assert task.reference["config"] == {"min_terms": 7, "max_terms": 7}
    with pytest.raises(ValueError, match=r"reasoning-gym's chain_sum does not take \{'terms': 7\}"):
        list(tasks("chain_sum", 1, seed=0, terms=7))


@pytest.mark.runs
def test_the_command_writes_tasks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nb_lightning.rewards.reasoning_gym"]
    options = ["--size", "2", "--seed", "5", "--set", "max_word_len=4"]
    with open(tmp_path / "tasks.jsonl", "w") as file:
        subprocess.run([*command, "spell_backward", *options], cwd=ROOT, check=True, stdout=file)
    first, second = read_tasks(tmp_path / "tasks.jsonl")
    assert first.id == "reasoning_gym/spell_backward/5/0" and first.verifier == "reasoning_gym"
    assert "Answer:" in first.messages[0]["content"] and first.messages != second.messages
    done = subprocess.run([*command, "coin_flip"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no sound reasoning-gym task is called 'coin_flip'")
