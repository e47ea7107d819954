"""A teacher and a student, the pairs made of them, and an endpoint."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.pairs.__main__ import main
from nb_lightning.rewards.tasks import Task, write_tasks
from tests.data.pairs.harness import Endpoint, bigram, command
from tests.dpd_harness import save_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that answers 7, a student that answers 7 or 8; and tasks: of three sevenths is the answer 9."""
    folder = tmp_path_factory.mktemp("models")
    save_model(bigram({"\n": "7", "7": ""}), folder / "teacher")
    save_model(bigram({"\n": "78", "7": "", "8": ""}), folder / "student")
    tasks = [
        Task(f"t{n}", "sums", [{"role": "user", "content": f"{n} + ?"}], "exact", "9" if n % 7 < 3 else "7")
        for n in range(28)
    ]
    write_tasks(folder / "tasks.jsonl", tasks)
    return folder


@pytest.fixture(scope="module")
def made(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "pairs"
    main(command(models, output))
    return output


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
