"""What is kept of the policy's completions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from callbacks.rollouts import RolloutSamples


def test_a_resumed_run_keeps_whole_lines_of_steps_that_it_does_not_repeat(tmp_path: Path) -> None:
    """Completions have any characters, also ends of lines of Unicode; a kill may tear the last line anywhere."""
    lines = [json.dumps({"clock": c, "completion": "{\x85}\u2028{}"}, ensure_ascii=False) + "\n" for c in (0, 9, 10)]
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes("".join(lines).encode() + '{"clock": 11, "completion": "{\u2028}'.encode()[:-2] + b"}")
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), is_global_zero=True)
    RolloutSamples().on_train_start(trainer, SimpleNamespace(tokens_seen=10))
    assert path.read_text(encoding="utf-8") == "".join(lines[:2])
