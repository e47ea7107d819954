"""Verifiers of other packages: found, run in a process of their own, and survived."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nb_lightning.rewards import Guarded, get_verifier, statuses
from nb_lightning.rewards.sandbox import pool
from tests.harness import ROOT

pytestmark = pytest.mark.runs

HOSTILE = '''
"""Does what the completion says."""
import os, time
from nb_lightning.rewards import Score
from nb_lightning.rewards.sandbox import Limits

class Hostile:
    limits = Limits(cpu_seconds=0.3, wall_seconds=5.0, memory_mb=256)

    def __init__(self):
        self.calls = 0

    def check(self, reference):
        if reference == "bad":
            raise ValueError("this reference is bad")
        if reference == "hang":
            while True: pass

    def score(self, prompt, completions, reference):
        scores = []
        for completion in completions:
            self.calls += 1
            if completion == "hang":
                while True: pass
            if completion == "sleep": time.sleep(100)
            if completion == "exit": os._exit(3)
            if completion == "leave": raise SystemExit(0)
            if completion == "kill": os.kill(os.getpid(), 9)
            if completion == "raise": 1 / 0
            if completion == "flood":
                while True: os.write(1, b"x" * 10000)
            if completion == "memory": x = "x" * (1 << 33)
            if completion == "child" and os.fork() == 0: time.sleep(1000)
            if completion == "nan": scores.append(Score(float("nan"), {})); continue
            if completion == "object": scores.append(Score(1.0, {"status": "correct", "x": object()})); continue
            if completion == "none": continue
            scores.append(Score(1.0, {"status": "correct", "pid": os.getpid(), "calls": self.calls, "prompt": prompt}))
        return scores

class Inside(Hostile):
    in_process = True
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the hostile package as it would be installed."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "nb_hostile.py").write_text(HOSTILE)
    info = folder / "nb_hostile-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nb_hostile\nVersion: 1.0\n")
    entries = ("hostile = nb_hostile:Hostile", "inside = nb_hostile:Inside", "gone = nb_hostile:Gone")
    (info / "entry_points.txt").write_text("[nb_lightning.rewards]\n" + "\n".join(entries) + "\n")
    return folder


@pytest.fixture(scope="module")
def hostile(site: Path) -> Iterator[Guarded]:
    sys.path.insert(0, str(site))
    try:
        yield get_verifier("hostile")
    finally:
        sys.path.remove(str(site))


def test_the_verifier_is_made_once_in_another_process(hostile: Guarded) -> None:
    first = hostile.score("the prompt", ["a", "b"], None)
    again = hostile.score("the prompt", ["a"], None)
    assert [score.info["prompt"] for score in first] == ["the prompt"] * 2
    assert first[0].info["pid"] == first[1].info["pid"] != os.getpid()
    assert [score.info["calls"] for score in (*first, *again)] == [1, 2, 1]  # each call finds it as it was made


@pytest.mark.parametrize(
    "completion, status",
    [("hang", "timeout"), ("sleep", "timeout"), ("exit", "crash"), ("leave", "crash"), ("kill", "crash"),
    ("flood", "flood"),
     ("raise", "verifier_error"), ("memory", "verifier_error"), ("nan", "verifier_error"), ("object", "verifier_error"),
     ("none", "verifier_error")],
)  # fmt: skip
def test_a_failure_costs_one_reward(hostile: Guarded, completion: str, status: str) -> None:
    scores = hostile.score("", ["a", completion, "b"], None)
    assert [score.reward for score in scores] == [1, 0, 1]
    assert statuses(scores) == {"correct": 2, status: 1}


def test_the_verifiers_children_end_with_the_call(hostile: Guarded) -> None:
    assert hostile.score("", ["child"], None)[0].reward == 1
    assert all(not psutil.Process(worker.pid).children() for worker in hostile.verifier.sandbox._running)


def test_the_verifiers_check_is_called(hostile: Guarded) -> None:
    hostile.check("good")
    with pytest.raises(ValueError, match="this reference is bad"):
        hostile.check("bad")
    with pytest.raises(ValueError, match=r"its check of a reference failed: (cpu|wall)"):
        hostile.check("hang")
    hostile.check("good")


def test_a_verifier_may_ask_for_this_process(hostile: Guarded) -> None:
    inside = get_verifier("inside")
    assert inside.score("", ["a"], None)[0].info["pid"] == os.getpid()
    assert statuses(inside.score("", ["a", "raise"], None)) == {"verifier_error": 2}
    assert statuses(inside.score("", ["a", "leave"], None)) == {"verifier_error": 2}
    assert [score.reward for score in inside.score("", ["a", "nan"], None)] == [1, 0]


def test_an_unknown_name_lists_installed_verifiers_too(hostile: Guarded) -> None:
    with pytest.raises(ValueError, match="there are: code, exact, gone, hostile, ifeval, inside, math, preference, "):
        get_verifier("no_such_verifier")
    with pytest.raises(ValueError, match=r"verifier 'gone' \(nb_hostile:Gone\) cannot be loaded: .*Gone"):
        get_verifier("gone")


def test_a_verifier_that_cannot_be_made_is_an_error(
    hostile: Guarded, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class loads, but making one fails: said when the verifier is asked for, not in the middle of a run."""
    monkeypatch.setattr(pool, "_shared", {})
    (site / "nb_hostile.py").write_text(HOSTILE.replace("self.calls = 0", "raise OSError('no model here')"))
    try:
        with pytest.raises(ValueError, match=r"'hostile' .* cannot be loaded: OSError: no model here"):
            get_verifier("hostile")
    finally:
        (site / "nb_hostile.py").write_text(HOSTILE)


def test_the_example_package_works_as_pip_installs_it(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, f"--target={tmp_path}", str(ROOT / "docs/examples/nb_palindrome")], check=True)
    program = """
from nb_lightning.rewards import get_verifier
verifier = get_verifier("palindrome")
print([score.reward for score in verifier.score("", ["A level, Eva? ave level a", "level", "xlevel"],
{"word": "level"})])
try:
    verifier.check({})
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "[1.0, 1.0, 0.0]\nthe reference of 'palindrome' needs a text 'word'\n"
