"""Run `train.py` in several processes and compare the runs."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from tests.harness import TRACE, command, environment


def torchrun(corpus: Path, root: Path, *overrides: str, ranks: int = 2) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    script = command(corpus, root, *TRACE, f"trainer.devices={ranks}", *overrides)[1:]
    done = subprocess.run(
        [*launcher, *script], cwd=root, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


def losses(trace: dict[int, dict]) -> list[float]:
    return [float.fromhex(trace[step]["loss"]) for step in range(20)]


def assert_same_training(one: list[float], other: list[float]) -> None:
    assert abs(one[0] - other[0]) < 1e-6  # the same weights, the same rows
    assert max(abs(a - b) / a for a, b in zip(one, other)) < 1e-4  # 20 steps on, rounding has had its say
