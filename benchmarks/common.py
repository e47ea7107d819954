"""Shared by the benchmarks: processes that take turns, CPU-seconds, peak memory, tables. Standard library only."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = "@bench "  # begins the lines that a child reports; all other lines are output of libraries


@dataclass(frozen=True)
class Shape:
    """The model of all benchmarks: a small Llama, 6.3 M parameters at the default vocabulary."""

    vocab: int = 4096
    layers: int = 6
    dim: int = 256
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 704
    eps: float = 1e-5
    theta: float = 7e7


LR, BETAS, ADAM_EPS, CLIP = 3e-4, (0.9, 0.95), 1e-8, 1.0


def memory_mb(key: str) -> float:
    """`VmRSS` (resident now) or `VmHWM` (its peak since the last `reset_peak`) of this process in MiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{key}:")) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Turns:
    """The child's side of taking turns: report each optimizer step, then wait for permission for the next.

    Processes that train in turns see the same machine, busy or idle, within seconds: their ratios hold where their
    absolute numbers do not. Waiting costs no CPU time.
    """

    def begin(self) -> None:
        """Start the clock: call when everything is built, just before the first step."""
        gc.collect()
        reset_peak()
        self._base = memory_mb("VmRSS")
        self._tell()

    def end_of_step(self, loss: float, **more: float) -> None:
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        self._tell(cpu=cpu, wall=wall, loss=loss, peak_mb=memory_mb("VmHWM") - self._base, **more)

    def _tell(self, **report: Any) -> None:
        print(f"\n{MARK}{json.dumps(report)}", flush=True)
        if not sys.stdin.readline():  # the parent needs no more steps
            os._exit(0)
        self._cpu, self._wall = time.process_time(), time.perf_counter()


class Child:
    """The parent's side: a process that runs until its next report.

    Raises:
        RuntimeError: the process ended; shows the end of what it wrote.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, **env: str) -> None:
        self.name, self._log = name, folder / f"{name}.log"
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, env=environment(**env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True,
            )  # fmt: skip

    @classmethod
    def run(cls, name: str, command: Sequence[str], folder: Path) -> None:
        """Run a command that reports nothing to its end."""
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")

    def report(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        output = []
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            output.append(line)
        raise RuntimeError(f"{self.name} ended:\n{''.join(output[-20:])}{self._log.read_text()[-4000:]}")

    def turn(self) -> dict[str, Any]:
        """Let the process do one step, and return its report."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.report()

    def stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(60)


def take_turns(commands: Mapping[str, Sequence[str]], folder: Path, steps: int, **about: Any) -> list[dict[str, Any]]:
    """Start each command in a separate folder, then let each do one step per turn; return a record per step."""
    children = []
    for kind, command in commands.items():
        (folder / kind).mkdir(exist_ok=True)
        children.append(Child(kind, command, folder / kind))
    for child in children:
        child.report()
    records = [{"kind": c.name, **about, "step": step, **c.turn()} for step in range(steps) for c in children]
    for child in children:
        child.stop()
    return records


def environment(**extra: str) -> dict[str, str]:
    """Return an environment with one thread, no network, and this checkout first on the path."""
    fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, **extra}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table: floats below 100 with two decimals, None as a dash."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def append_jsonl(path: str | None, records: Sequence[dict[str, Any]]) -> None:
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
