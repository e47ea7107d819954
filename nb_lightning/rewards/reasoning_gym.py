"""The verifier "reasoning_gym", and the tasks of that package as a source of prompts.

    python -m nb_lightning.rewards.reasoning_gym chain_sum --size 1000 --seed 0 --set max_terms=3 > tasks.jsonl

Reference: {"task": "chain_sum", "entry": {...}, "config": {...}}: the entry that the package generated, and the
configuration that it was generated with. The reward is 1 or 0.

Not every task of the package has a scorer that can be trusted: some give 1 to any answer, some give 0 to the task's own
answer, some evaluate the answer as Python. Only tasks that passed tests/rewards/test_reasoning_gym.py are listed here.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from nb_lightning.errors import one_line_errors
from nb_lightning.rewards.exact import final_answer
from nb_lightning.rewards.extract import fold
from nb_lightning.rewards.sandbox.pool import Limits, Outcome, Sandbox, failure, shared, with_packages
from nb_lightning.rewards.tasks import Task, task_line
from nb_lightning.rewards.verifier import Score

# Tasks with one right answer in one form, which is compared here, letter for letter.
EXACT = frozenset(
    "acre aiw arc_1d base_conversion basic_arithmetic bf binary_alternation binary_matrix bitwise_arithmetic "
    "caesar_cipher calendar_arithmetic chain_sum count_bits count_primes course_schedule game_of_life_halting gcd "
    "gsm_symbolic isomorphic_strings largest_island lcm leg_counting letter_counting letter_jumble list_functions "
    "modulo_grid number_filtering number_sequence products ransom_note rectangle_count rotate_matrix rotten_oranges "
    "simple_equations simple_geometry spell_backward spiral_matrix string_insertion string_manipulation "
    "string_splitting string_synthesis syllogism word_sequence_reversal word_sorting".split()
)
# Tasks with several right answers or forms: the package's scorer judges in the sandbox, and must return 1.
SCORED = frozenset(
    "ab circuit_logic color_cube_rotation decimal_arithmetic decimal_chain_sum dice emoji_mystery family_relationships "
    "figlet_font futoshiki game_of_life group_anagrams jugs manipulate_matrix mini_sudoku needle_haystack "
    "number_format number_sorting palindrome_generation palindrome_partitioning path_star pool_matrix "
    "prime_factorization self_reference sentence_reordering shortest_path sudoku tower_of_hanoi word_ladder "
    "zebra_puzzles".split()
)
PACKAGES = ("reasoning_gym", "sympy", "mpmath", "numpy")
ASK = '\n\nEnd your response with a line that begins with "Answer:" and holds nothing but the answer.'
LIMITS = Limits(cpu_seconds=5.0, wall_seconds=21.0, memory_mb=1024)


class ReasoningGym:
    """Judges the text after the last "Answer:", or all of the response without one."""

    def check(self, reference: Any) -> None:
        if not isinstance(reference, dict) or not set(reference) <= {"task", "entry", "config"}:
            raise ValueError(
                "the reference of 'reasoning_gym' must be an object with 'task', 'entry' and maybe 'config'"
            )
        check_task(reference.get("task"))
        if reference["task"] in SCORED:
            self.sandbox  # noqa: B018  raise for a missing package or an unsafe machine here, not in each score
        entry = reference.get("entry")
        if not isinstance(entry, dict) or not isinstance(entry.get("answer"), str):
            raise ValueError("'entry' in a 'reasoning_gym' reference must be an object with an 'answer'")

    def score(self, prompt: str, completions: Sequence[str], reference: dict[str, Any]) -> list[Score]:
        answers = [final_answer(completion).strip() for completion in completions]
        wanted = reference["entry"]["answer"]
        right = {answer: fold(answer) == fold(wanted) for answer in answers}
        judged = {answer: _score(answer, float(same)) for answer, same in right.items()}
        others = [answer for answer, same in right.items() if answer and not same]
        if reference["task"] in SCORED and others:
            job = {"task": reference["task"], "config": reference.get("config", {}), "entry": reference["entry"]}
            judged |= dict(zip(others, map(_judge, others, self.sandbox.run_items(job, others, LIMITS))))
        return [judged[answer] for answer in answers]

    @functools.cached_property
    def sandbox(self) -> Sandbox:
        return shared(with_packages("run_reasoning_gym", PACKAGES, PACKAGES[:1]))


def check_task(name: Any) -> None:
    """Raise ValueError for a task that is not listed here."""
    if not isinstance(name, str) or name not in EXACT | SCORED:
        raise ValueError(
            f"no sound reasoning-gym task is called {name!r}; there are: {', '.join(sorted(EXACT | SCORED))}"
        )


def tasks(name: str, size: int, seed: int, **config: Any) -> Iterator[Task]:
    """Generate the first `size` tasks of the package for `seed` and the settings `config`.

    Raises:
        ValueError: a task that is not listed here, a setting that it does not have, or the package is missing.
    """
    check_task(name)
    with_packages("run_reasoning_gym", PACKAGES, ())
    from reasoning_gym import create_dataset

    try:
        data = create_dataset(name, size=size, seed=seed, **config)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym's {name} does not take {config}: {error}") from error
    for i in range(size):
        entry = json.loads(json.dumps(data[i]))
        yield Task(
            id=f"reasoning_gym/{name}/{seed}/{i}",
            source=f"reasoning_gym/{name}",
            messages=[{"role": "user", "content": entry["question"] + ASK}],
            verifier="reasoning_gym",
            reference={"task": name, "entry": entry} | ({"config": config} if config else {}),
        )


def _score(answer: str, score: float) -> Score:
    status = "correct" if score == 1 else "wrong" if answer else "no_answer"
    return Score(float(score == 1), {"status": status, "answer": answer[:200]})


def _judge(answer: str, result: Any) -> Score:
    if isinstance(result, Outcome):
        status, why = failure(result)
        return Score(0.0, {"status": status, "answer": answer[:200], "why": why})
    return _score(answer, result["score"] if isinstance(result.get("score"), float) else 0.0)


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise ValueError(f"--set {text}: give NAME=VALUE with a value in JSON, a text as '\"...\"'") from error


def main() -> None:
    parser = argparse.ArgumentParser(description="Write reasoning-gym tasks as JSON lines.")
    parser.add_argument("task")
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="a setting of the task")
    options = parser.parse_args()
    with one_line_errors():
        config = dict(map(_setting, options.set))
        for task in tasks(options.task, options.size, options.seed, **config):
            print(task_line(task))


if __name__ == "__main__":
    main()
