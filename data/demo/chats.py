"""Build sources of conversations from the demo tasks' worked answers (data/demo/tasks.py), for SFT."""

from __future__ import annotations

from pathlib import Path

from data.demo.tasks import build_demo_tasks, read_if_json
from data.prepare.chats import Chats, template_digest
from data.prepare.make import prepare
from data.prepare.settings import ChatSettings, SourceSettings
from data.prepare.source_writer import is_source, locked
from nb_lightning.files import sha256_of, write_json

MADE_OF = "demo.json"  # beside the splits: digests of the tasks, tokenizer and template of the source


def build_demo_chats(tasks: Path, sources: dict[str, Path], tokenizer: str, template: str) -> None:
    """Build each source that is missing, or was made of other tasks, tokenizer or template.

    Only one process builds at a time.

    Args:
        tasks: folder of the demo tasks; built if missing.
        sources: name of a family of tasks -> the source's folder.
        template: Jinja source of the chat template.

    Raises:
        ValueError: the demo tasks do not have a family, or a folder holds something else.
    """
    build_demo_tasks(tasks)
    chats = tasks / "chats"
    settings = SourceSettings(tokenizer, chat=ChatSettings(template))
    form = Chats(settings)
    for name, folder in sources.items():
        files = {split: chats / split / f"{name}.jsonl" for split in ("train", "val")}
        if not files["train"].is_file():
            families = ", ".join(sorted(path.stem for path in (chats / "train").iterdir()))
            raise ValueError(f"data.sources.{name}: the demo tasks have {families} (data.demo_tasks=true)")
        made_of = {split: sha256_of(file) for split, file in files.items()}
        made_of |= {"tokenizer": form.tokenizer.digest, "template": template_digest(form.encoder.template)}
        with locked(folder.parent, wait=True):  # a second process waits here, and then has nothing to build
            if is_source(str(folder)) and read_if_json(folder / MADE_OF) == made_of:
                continue
            if is_source(str(folder)) and read_if_json(folder / MADE_OF) is None:
                raise ValueError(f"data.sources.{name}: {folder} holds a source that is not the demo's")
            held_out = [str(files["val"])]
            prepare(
                [str(files["train"])], str(folder), settings,
                val_inputs=held_out, on_bad="fail", overwrite=True, progress=False,
            )  # fmt: skip
            write_json(folder / MADE_OF, made_of)
