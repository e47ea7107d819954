"""How a command ended, in a line: against commands that really ended so."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nb_lightning.recipe.outcome import HINT, describe_exit, last_line


@pytest.mark.parametrize(
    "script, expected",
    [
        ("exit 3", "exit status 3"),
        ("exit 200", "exit status 200"),
        ("kill -TERM $$", "killed by SIGTERM (exit status 143)"),
        ("kill -KILL $$", "killed by SIGKILL, perhaps for want of memory (exit status 137)"),
        ("sh -c 'kill -SEGV $$'; exit $?", "killed by SIGSEGV (exit status 139)"),  # told by a shell
    ],
)
def test_an_exit_status_is_told_in_words(script: str, expected: str) -> None:
    assert describe_exit(subprocess.run(["sh", "-c", script]).returncode) == expected


def test_the_last_line_is_the_last_one_that_informs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f"Could not override 'a.b'.\nKey 'b' is not in struct\n    full_key: a.b\n\n{HINT}=1 for ...\n")
    assert last_line(log) == "Key 'b' is not in struct"
    start = log.stat().st_size
    assert last_line(log, start) == ""
    with open(log, "ab") as file:
        file.write(b"phase x\n\xff error: no room\n  3%|     |\n\n")
    assert last_line(log, start) == "\ufffd error: no room"
