"""The worked answers are right, by other means than those that made them; no problem is in two splits."""

from __future__ import annotations

import hashlib
import json
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from data.demo import build_demo_tasks, problems, tasks
from data.demo.__main__ import main
from data.demo.problems import FAMILIES, Problem
from nb_lightning.rewards import get_verifier
from nb_lightning.rewards.tasks import read_tasks
from nb_lightning.text.chat_template import ChatTemplate

SMALL = {"chats/train": 40, "tasks/train": 12, "val": 8}


def some(family: str, n: int = 300) -> list[Problem]:
    return [tasks.generate_problem(family, 7, index) for index in range(n)]


def answer_of(problem: Problem) -> str:
    return problem.messages[-1]["content"].removeprefix("Answer: ")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_the_reference(family: str) -> None:
    for problem in some(family):
        assert [message["role"] for message in problem.messages][:2] == ["user", "assistant"]
        assert problem.messages[-1]["role"] == "assistant"
        assert len(json.dumps(problem.messages)) < 450 and problem.messages[0]["content"].isascii()
        if problem.verifier == "exact":
            assert answer_of(problem) == problem.reference
        elif problem.verifier == "tool_call":
            (call,) = problem.messages[1]["tool_calls"]
            assert call["function"] == problem.reference
        else:
            assert problem.verifier == "code"


def test_every_worked_answer_gets_the_whole_reward() -> None:
    """As our own template writes it, by the verifier itself; and the answer to another problem gets nothing."""
    template = ChatTemplate.chatml()
    for family in FAMILIES:
        verifier = get_verifier(some(family, 1)[0].verifier)
        texts = []
        for problem in some(family, 3):
            verifier.check(problem.reference)
            asked = next(i for i, message in enumerate(problem.messages) if message["role"] == "assistant")
            prompt = template.render(problem.messages[:asked], add_generation_prompt=True)
            text = template.render(problem.messages[: asked + 1])
            assert text.startswith(prompt)
            texts.append(text.removeprefix(prompt).removesuffix("<|im_end|>\n"))
        for problem in some(family, 3):
            rewards = [score.reward for score in verifier.score("", texts, problem.reference)]
            assert rewards == [float(p.reference == problem.reference) for p in some(family, 3)], (family, texts)


@pytest.mark.parametrize("family", ["maths_equations", "maths_sums", "science_laws"])
def test_every_line_of_reasoning_is_true(family: str) -> None:
    for problem in some(family):
        for equation in problem.messages[1]["reasoning_content"].splitlines():
            values = [part for part in equation.split(" = ") if re.fullmatch(r"[-+*/\d ]+", part)]
            assert len(values) >= 2 and len({float(eval(value)) for value in values}) == 1, equation


def test_sorted_letters() -> None:
    for problem in some("maths_sort"):
        letters = problem.messages[0]["content"].removeprefix("Sort ")
        assert 3 <= len(letters) <= 7 and answer_of(problem) == problem.key == "".join(sorted(letters))


def test_equations_are_solved() -> None:
    for problem in some("maths_equations"):
        a, b, c = map(int, problem.key.split())
        assert problem.messages[0]["content"].replace(" ", "") == f"Solve{a}x{b:+}={c}"
        assert a * int(problem.reference) + b == c


def test_sums_add_up() -> None:
    for problem in some("maths_sums"):
        assert int(problem.reference) == eval(problem.messages[0]["content"].removeprefix("What is ").rstrip("?"))


def test_binary_numbers() -> None:
    for problem in some("science_binary"):
        assert int(problem.reference, 2) == int(re.findall(r"\d+", problem.messages[0]["content"])[0])
        steps = [line.split() for line in problem.messages[1]["reasoning_content"].splitlines()]
        assert "".join(bit for _, bit in reversed(steps)) == problem.reference
        assert all(int(a) // 2 == int(b) for (a, _), (b, _) in pairwise(steps))


def test_functions_pass_their_tests_and_do_what_was_asked() -> None:
    kinds = set()
    for problem in some("code_functions"):
        asked = problem.messages[0]["content"]
        (code,) = re.fullmatch(r"```python\n(.*)\n```", answer_of(problem), re.S).groups()
        scope: dict = {}
        exec(code, scope)
        for test in problem.reference["tests"] + problem.reference["private"]:
            value = scope["f"](*test["args"])
            assert value == test["expect"] and type(value) is type(test["expect"])
        for x, y in re.findall(r"f\((\d)\) = (-?\d+)", asked):
            assert scope["f"](int(x)) == int(y)
        steps = [step.strip() for step in asked.partition(":")[2].split(",")]
        if asked.startswith("Write f(s)"):
            kinds.add("strings")
            assert scope["f"]("abC") == by_steps("abC", steps)
        elif "=" not in asked:
            kinds.add("numbers")
            assert scope["f"](10) == by_steps(10, steps)
    assert kinds == {"strings", "numbers"}


def by_steps(value: Any, steps: list[str]) -> Any:
    for step in steps:
        name, *words = step.split()
        if name == "backwards":
            value = "".join(reversed(value))
        elif name == "capitals":
            value = value.upper()
        elif name == "twice":
            value = value + value
        elif name == "put":
            value = words[0] + value
        elif isinstance(value, str):
            value = value + words[0]
        else:
            n = int(words[-1])
            value = {"add": value + n, "subtract": value - n, "multiply": value * n}[name]
    return value


def test_words_and_spelling() -> None:
    assert len(set(problems.WORDS)) == len(problems.WORDS)
    kinds = set()
    for problem in some("general_words"):
        first, *rest = problem.messages[0]["content"].split()
        kinds.add(first)
        if first == "Say":
            assert problem.reference.split() == [rest[0]] * int(rest[1])
        elif first == "Write":
            assert problem.reference.lower() == rest[0] and problem.reference.isupper()
        elif first == "What":
            assert problem.reference == rest[-1].rstrip("?")[{"first": 0, "last": -1}[rest[2]]]
        elif first == "Swap":
            assert problem.reference.split() == rest[::-1]
        else:
            assert problem.reference.split(", ") == [rest[-1], rest[0]]
    assert kinds == {"Say", "Write", "What", "Swap", "Add"}
    for problem in some("general_spelling"):
        assert problem.messages[0]["content"] == f"Spell {''.join(reversed(problem.reference))} backwards"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_problem_is_in_two_splits(family: str) -> None:
    found = tasks.generate_problems(family, {"chats/train": 400, "tasks/train": 100, "val": 50})
    keys = [p.key for split in found.values() for p in split]
    asked = {split: {p.messages[0]["content"] for p in found[split]} for split in found}
    assert len(set(keys)) == len(keys) == 550
    assert not (asked["chats/train"] & asked["val"] or asked["tasks/train"] & asked["val"])
    assert not asked["chats/train"] & asked["tasks/train"]
    other = tasks.generate_problems(family, {"chats/train": 400, "tasks/train": 100, "val": 50}, seed=1)
    for one, two in (("chats/train", "val"), ("val", "chats/train"), ("tasks/train", "val")):  # nor over seeds
        assert {p.key for p in found[one]}.isdisjoint(p.key for p in other[two])


def test_a_problem_depends_on_its_place_alone() -> None:
    random.seed(1)
    one = tasks.generate_problem("maths_sort", 0, 5)
    tasks.generate_problem("maths_sums", 0, 5)
    random.seed(2)
    assert tasks.generate_problem("maths_sort", 0, 5) == one != tasks.generate_problem("maths_sort", 0, 6)
    assert tasks.generate_problem("maths_sort", 1, 5) != one


def test_a_small_family_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "three", lambda rng: Problem(str(rng.randrange(3)), [], "exact", None))
    found = tasks.generate_problems("three")
    assert sorted(p.key for split in found.values() for p in split) == ["0", "1", "2"]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_files(tmp_path: Path) -> None:
    build_demo_tasks(tmp_path / "tasks", counts=SMALL)
    for family in FAMILIES:
        for split, name in (("train", "tasks/train"), ("val", "val")):
            found = read_tasks(tmp_path / f"tasks/tasks/{split}/{family}.jsonl")
            assert len(found) == SMALL[name] and {task.source for task in found} == {family}
        val = [json.loads(line)["messages"] for line in (tmp_path / f"tasks/chats/val/{family}.jsonl").open()]
        assert [chat[: len(task.messages)] for chat, task in zip(val, found)] == [task.messages for task in found]
    judged = [path.stem for path in (tmp_path / "tasks/tasks").rglob("*_preference.jsonl")]
    assert sorted(judged) == [f"{family}_preference" for family in tasks.PREFERENCE]
    for name in judged:  # the same prompts, and nothing of the answers
        found = read_tasks(tmp_path / f"tasks/tasks/train/{name}.jsonl")
        same = read_tasks(tmp_path / f"tasks/tasks/train/{name.removesuffix('_preference')}.jsonl")
        assert [task.messages for task in found] == [task.messages for task in same]
        assert {(task.source, task.verifier, task.reference) for task in found} == {(name, "preference", None)}
    before = digests(tmp_path)
    (tmp_path / "tasks/chats/val/maths_sort.jsonl").touch()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    build_demo_tasks(tmp_path / "tasks", counts=SMALL)  # there already
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")} == stamps
    (tmp_path / ".unfinished-tasks").mkdir()
    (tmp_path / "tasks/tasks.json").write_text('{"version": 0}')  # an older one is made anew
    build_demo_tasks(tmp_path / "tasks", counts=SMALL)
    assert digests(tmp_path) == before


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        build_demo_tasks(tmp_path / "tasks", counts=SMALL)
    assert [path.name for path in tmp_path.rglob("*")] == ["tasks", "thesis.txt"]
    with pytest.raises(ValueError, match="no family 'maths'; they have maths_sort"):
        build_demo_tasks(tmp_path / "other", ("maths",))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(build_demo_tasks, "__defaults__", (("maths_sort",), SMALL, 0))
    main(["--output", str(tmp_path / "tasks"), "--seed", "3"])
    assert f"{tmp_path}/tasks/tasks/val: maths_sort 8\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "tasks/tasks.json").read_text())["seed"] == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="error: the demo tasks are to be built in"):
        main(["--output", str(tmp_path / "other")])
