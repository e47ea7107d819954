"""The job of reasoning_gym.py: score answers by the scorer of their task.

In: {"task", "config", "entry", "items", "cpu", "wall"}. Out: {"item": i, "score"} for each answer.
"""

from __future__ import annotations

import runner


def main() -> int:
    from reasoning_gym import create_dataset

    job = runner.task()
    data = create_dataset(job["task"], size=1, seed=0, **job["config"])
    for i, answer in enumerate(job["items"]):
        runner.arm(job)
        try:
            runner.report({"item": i, "score": float(data.score_answer(answer, job["entry"]))})
        except MemoryError:
            return runner.out_of_memory()
        except Exception as error:  # some scorers raise for an answer that they cannot read
            runner.report({"item": i, "score": 0.0, "error": f"{type(error).__name__}: {error}"[:300]})
    return 0
