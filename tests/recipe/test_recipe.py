"""The runner, over steps that take no time: what runs again, what goes on, and that kills change nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nb_lightning.config.checks import check
from nb_lightning.config.compose import run_dir
from nb_lightning.recipe.child import Screen
from nb_lightning.recipe.steps import read_recipe
from tests.config.harness import composed
from tests.harness import ROOT

pytestmark = pytest.mark.runs

STARTS = ("--model", "--from", "--teacher", "--student")  # flags that name what a step begins from

# A step in small: one line a unit, each made of the one before and of what the step before ended with. Begun in a
# folder that is there it refuses, as train.py does; with resume=true it goes on after the last whole line.
WORK = """
import hashlib, os, signal, sys, time
from pathlib import Path
name, units, before, *words = sys.argv[1:]
if "deaf" in words:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
out = Path("out") / name
if "resume=true" not in words:
    out.mkdir(parents=True)
out.mkdir(parents=True, exist_ok=True)
file = out / "lines"
text = file.read_text() if file.exists() else ""
lines = text.splitlines()[: text.count(chr(10))]
file.write_text("".join(line + chr(10) for line in lines))
start = Path("out", before, "lines").read_text() if before != "-" else ""
print("begins at", len(lines), flush=True)
with open(file, "a") as log:
    for unit in range(len(lines), int(units)):
        time.sleep(0.01)
        lines.append(hashlib.sha256(repr((name, words[-1:] == ["other"], start, lines[-1:])).encode()).hexdigest())
        print(lines[-1], file=log, flush=True)
        print(f"unit {unit}", end=chr(13), flush=True)
if "fail" in words:
    sys.exit("error: as it was told")
if "killed" in words:
    os.kill(os.getpid(), 9)
print("done")
"""
YAML = """
out: out
steps:
  first: {run: [python, work.py, first, 20, "-"], makes: ["${out}/first"], resume: [resume=true]}
  second: {run: [python, work.py, second, 15, first], makes: ["${out}/second"], resume: [resume=true]}
  third: {run: [python, work.py, third, 15, second], makes: ["${out}/third"], resume: [resume=true]}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "conf/recipe").mkdir(parents=True)
    (tmp_path / "conf/recipe/fake.yaml").write_text(YAML)
    (tmp_path / "work.py").write_text(WORK)
    return tmp_path


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "nb_lightning.recipe", "model=fake", *words]


def environment(place: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "NB_ROOT": str(place)}


def recipe(place: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run(command(*words), cwd=place, env=environment(place), capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def started(place: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(*words), cwd=place, env=environment(place), stdout=subprocess.DEVNULL)


def results(place: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in sorted((place / "out").glob("*/lines"))}


def log(place: Path, step: str) -> list[str]:
    return (place / f"recipe/{step}.log").read_text().splitlines()


def begun(place: Path, step: str) -> list[int]:
    """Where each start of a step began."""
    return [int(line.split()[-1]) for line in log(place, step) if line.startswith("begins at")]


def wait_for(place: Path, step: str, lines: int, process: subprocess.Popen[bytes]) -> None:
    file = place / "out" / step / "lines"
    while not file.exists() or file.read_text().count("\n") < lines:
        assert process.poll() is None
        time.sleep(0.002)


def test_each_step_runs_once(place: Path) -> None:
    output = recipe(place)
    assert list(results(place)) == ["first", "second", "third"]
    assert "[2/3] second: python work.py second 15 first" in output
    assert log(place, "first")[0].startswith("$ python work.py first 20 -")
    assert log(place, "first")[1:] == ["begins at 0", "done"]  # the bar is written over
    before = results(place)
    output = recipe(place)
    assert output.count("finished before") == 3 and results(place) == before
    assert begun(place, "first") == begun(place, "third") == [0]


def test_a_step_with_another_command_runs_again_and_so_do_all_after_it(place: Path) -> None:
    recipe(place)
    before = results(place)
    output = recipe(place, "second:other")
    after = results(place)
    assert after["first"] == before["first"] and begun(place, "first") == [0]
    assert after["second"] != before["second"] and after["third"] != before["third"]
    assert begun(place, "second") == begun(place, "third") == [0, 0]
    assert (place / "recipe/replaced/second.1/lines").read_text() == before["second"]  # nothing is lost
    assert "moved to" in output


def test_results_made_from_a_changed_step_are_moved_away(place: Path) -> None:
    recipe(place)
    before = results(place)
    recipe(place, "second:other", "--only", "second")
    assert sorted(results(place)) == ["first", "second"]  # or a report would show the old one beside the new
    assert (place / "recipe/replaced/third.1/lines").read_text() == before["third"]


def test_a_missing_result_is_made_again(place: Path) -> None:
    recipe(place)
    before = results(place)
    shutil.rmtree(place / "out/third")
    recipe(place)
    assert results(place) == before and begun(place, "third") == [0, 0] and begun(place, "second") == [0]


def test_a_missing_launcher_is_one_line(place: Path) -> None:
    (place / "conf/recipe/fake.yaml").write_text("steps: {first: {run: [no-such-program]}}")
    output = recipe(place, code=1)
    assert "error: " in output and "no-such-program" in output and "Traceback" not in output


def test_after_a_kill_no_step_below_a_changed_one_counts_as_finished(place: Path) -> None:
    """Killed right after the changed step: the later ones had been finished with the same commands."""
    recipe(place)
    recipe(place, "--only", "second", "second:other")
    recipe(place, "second:other")
    assert begun(place, "first") == [0] and begun(place, "third") == [0, 0]
    unbroken = results(place)
    recipe(place, "--again", "first", "second:other")
    assert results(place) == unbroken and begun(place, "first") == [0, 0]


def test_a_failing_step_is_one_line_and_resumes(place: Path) -> None:
    output = recipe(place, "second:fail", code=1)
    assert output.splitlines()[-1] == (
        f"error: step second failed: exit status 1; the end of {place}/recipe/second.log: error: as it was told"
    )
    assert begun(place, "second") == [0] and not (place / "out/third").exists()
    recipe(place, "second:fail", code=1)
    assert begun(place, "second") == [0, 15]


def test_a_killed_step_is_reported_with_the_last_line_of_this_start(place: Path) -> None:
    recipe(place, "second:fail", code=1)
    output = recipe(place, "second:killed", code=1).splitlines()[-1]
    assert "step second failed: killed by SIGKILL, perhaps for want of memory (exit status 137); the end of" in output
    assert output.endswith("second.log: unit 14")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_same_command_resumes(place: Path, number: signal.Signals) -> None:
    process = started(place)
    wait_for(place, "second", 3, process)
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number
    recipe(place)
    broken = results(place)
    assert begun(place, "first") == [0] and begun(place, "second")[1] >= 3
    recipe(place, "--again", "first")
    assert results(place) == broken


def test_after_a_signal_no_other_step_starts(place: Path) -> None:
    """The signal may come when the step has nothing left to stop."""
    process = started(place, "second:deaf")
    wait_for(place, "second", 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert [text.count("\n") for text in results(place).values()] == [20, 15]
    recipe(place, "second:deaf")
    assert begun(place, "second") == begun(place, "third") == [0]


@pytest.mark.parametrize("seed", range(3))
def test_killed_twice_at_random_the_results_are_the_same(place: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(2):
        process = started(place)
        step = rng.choice(["first", "second"])
        while process.poll() is None and not (place / "out" / step).exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.wait()
    recipe(place)
    assert all(entry["state"] == "finished" for entry in json.loads((place / "recipe/state.json").read_text()).values())
    broken = results(place)
    assert [text.count("\n") for text in broken.values()] == [20, 15, 15]
    recipe(place, "--again", "first")
    assert results(place) == broken


@pytest.mark.parametrize("launcher", [[], ["sh", "-c", '"$@"; true', "sh"]], ids=["direct", "below a shell"])
def test_a_killed_recipe_leaves_no_command_behind(place: Path, launcher: list[str]) -> None:
    """Else two processes would write into one run. What a launcher started is not the recipe's child."""
    command = [*launcher, sys.executable, "work.py", "first", "20", "-"]
    (place / "conf/recipe/fake.yaml").write_text(json.dumps({"steps": {"first": {"run": command}}}))
    process = started(place)
    wait_for(place, "first", 2, process)
    process.kill()
    process.wait()
    time.sleep(0.2)
    lines = (place / "out/first/lines").read_text()
    time.sleep(0.2)
    assert (place / "out/first/lines").read_text() == lines and lines.count("\n") < 20


def test_only_runs_one_step_and_from_leaves_out_the_earlier_ones(place: Path) -> None:
    recipe(place, "--only", "first")
    assert list(results(place)) == ["first"]
    recipe(place, "--from", "second")
    assert list(results(place)) == ["first", "second", "third"]
    assert "there is no step 'fourth'; the steps are first, second, third" in recipe(place, "--only", "fourth", code=1)


def test_dry_run_runs_nothing(place: Path) -> None:
    output = recipe(place, "--dry-run", "third:other")
    assert "# 3/3 third\npython work.py third 15 second other" in output
    assert not (place / "out").exists() and not (place / "recipe").exists()


def test_arguments_reach_their_steps_and_the_launcher_starts_train(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "conf/recipe/two.yaml").write_text(
        "steps: {a: {run: [python, train.py, stage=sft]}, b: {run: [python, -m, x, [1, [2]]]}}"
    )
    monkeypatch.chdir(place)
    a, b = read_recipe("two", ["seed=1", "a:stage.total_tokens=5", "b:--k"], ["torchrun", "--nproc-per-node=8"])
    assert a.command == "torchrun --nproc-per-node=8 train.py stage=sft seed=1 stage.total_tokens=5".split()
    assert b.command == ["python", "-m", "x", "1", "2", "--k"]
    (moved,) = read_recipe("two", ["seed=1", "a:stage.total_tokens=5", "trainer=fsdp", "trainer.devices=8"])[:1]
    assert moved.identity == a.identity  # where it runs does not make it another run
    for yaml, message in (
        ("steps: {a: {command: [x]}}", "steps.a has command; it takes run, makes, resume, and needs run"),
        ("steps: {a: {run: ['${nothing}']}}", "nothing"),
    ):
        (place / "conf/recipe/bad.yaml").write_text(yaml)
        with pytest.raises(ValueError, match=message):
            read_recipe("bad")
    with pytest.raises(ValueError, match="there is no recipe model=none; conf/recipe has: bad, fake, two"):
        read_recipe("none")


def test_the_log_has_the_last_state_of_a_bar() -> None:
    written: list[str] = []
    screen = Screen(written.append)
    for piece in ("\x1b[1mstart\x1b[0m\r", "\n 10%|", "█".encode()[:1], "█".encode()[1:] + b" |\r 20%|", " x |\r"):
        screen.feed(piece if isinstance(piece, bytes) else piece.encode())
    assert written == ["start\n"] and screen.current_line == " 20%| x |"
    screen.feed(b" 30%| x |\r\nend")
    screen.close()
    assert written == ["start\n", " 30%| x |\n", "end\n"]


@pytest.mark.parametrize("model", sorted(path.stem for path in (ROOT / "conf/recipe").glob("*.yaml")))
def test_a_shipped_recipe_composes_and_reads_only_what_an_earlier_step_made(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage composes and passes its checks; what a step reads, one before it made."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("NB_ROOT", raising=False)
    made = {"outputs/data/teacher"}  # of the 3B: somebody else's
    for step in read_recipe(model):
        if step.trains:
            cfg = composed(*step.command[step.command.index("train.py") + 1 :])
            check(cfg)
            assert step.makes == [run_dir(cfg)] and step.resume == ["resume=true"]
            starts = [cfg.init_from, getattr(cfg.stage, "teacher", None), getattr(cfg.stage, "reward_model", None)]
        else:
            starts = [step.command[i + 1] for i, word in enumerate(step.command) if word in STARTS]
        for start in filter(None, starts):
            assert start in made, f"{step.name} begins from {start}, which is not there yet"
        made |= {str(place) for place in step.makes}
        made |= {step.command[i + 1] for i, word in enumerate(step.command) if word == "--output"}
