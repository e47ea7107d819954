"""The demo tasks' worked answers (data/demo/tasks.py) as sources of conversations."""

from __future__ import annotations

from pathlib import Path

from data.demo.tasks import build_demo_tasks
from data.documents import ChatSettings, Settings
from data.prepare import prepare
from data.source import is_source, locked


def build_demo_chats(tasks: Path, sources: dict[str, Path], tokenizer: str, template: str) -> None:
    """Build each source that is missing, one process at a time.

    Args:
        tasks: where the demo tasks lie, or are to be built.
        sources: name of a family of tasks -> the source's folder.
        template: Jinja source of the chat template.

    Raises:
        ValueError: a family that the demo tasks do not have, or a folder that holds something else.
    """
    build_demo_tasks(tasks)
    chats = tasks / "chats"
    settings = Settings(tokenizer, chat=ChatSettings(template))
    for name, folder in sources.items():
        if not (chats / "train" / f"{name}.jsonl").is_file():
            known = ", ".join(sorted(path.stem for path in (chats / "train").iterdir()))
            raise ValueError(f"data.sources.{name}: the demo tasks have {known} (data.demo_tasks=true)")
        if is_source(str(folder)):
            continue
        with locked(folder.parent, wait=True):  # a second process waits here and then finds it built
            if not is_source(str(folder)):
                train, val = (str(chats / split / f"{name}.jsonl") for split in ("train", "val"))
                prepare([train], str(folder), settings, val_inputs=[val], on_bad="fail", progress=False)
