"""The demo tasks' worked answers (data/demo/tasks.py) as sources of conversations."""

from __future__ import annotations

from pathlib import Path

from data.chats import Chats, template_digest
from data.demo.tasks import build_demo_tasks
from data.documents import ChatSettings, Settings
from data.prepare import prepare
from data.source import is_source, locked
from nb_lightning.source import SourceManifest


def build_demo_chats(tasks: Path, sources: dict[str, Path], tokenizer: str, template: str) -> None:
    """Build each source that is missing or was made with another tokenizer or template, one process at a time.

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
        with locked(folder.parent, wait=True):  # a second process waits here and then finds it built
            if not _is_made(folder, settings):
                train, val = (str(chats / split / f"{name}.jsonl") for split in ("train", "val"))
                held_out = {"val_inputs": [val], "on_bad": "fail"}
                prepare([train], str(folder), settings, overwrite=True, progress=False, **held_out)


def _is_made(folder: Path, settings: Settings) -> bool:
    """Whether it is there, and by these settings."""
    if not is_source(str(folder)):
        return False
    made = SourceManifest.read(f"{folder}/train")
    form = Chats(settings)
    return (made.tokenizer, made.template) == (form.tokenizer.digest, template_digest(form.encoder.template))
