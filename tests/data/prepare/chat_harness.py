"""Conversations, and what of them is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare.chats import Chats
from data.prepare.settings import ChatSettings, SourceSettings
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.text.messages import ChatError
from nb_lightning.token_source import TRAINED, Source
from tests.harness import ROOT

ASK, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2", "reasoning_content": "Add."}
PAIR = [ASK, ANSWER]
TWO = [*PAIR, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "reasoning_content": "Sum."}]
BYTES = SourceSettings("bytes", val_fraction=0.2, chat=ChatSettings())


def qwen3() -> str:
    return (ROOT / "tests/templates/qwen3_style.jinja").read_text()


def trained(marked: list[int] | np.ndarray) -> str:
    """What is trained on, with each stretch in brackets."""
    tokenizer, text, inside = load_tokenizer("bytes"), "", False
    for token in [*map(int, marked), 0]:
        if inside != bool(token & TRAINED):
            text, inside = text + ("]" if inside else "["), not inside
        text += tokenizer.decode([token & (TRAINED - 1)]) if inside else ""
    return text


def everything(marked: list[int]) -> str:
    return load_tokenizer("bytes").decode([token & (TRAINED - 1) for token in marked])


def samples_of(record: dict[str, Any], **chat: Any) -> list[list[int]]:
    (found,) = Chats(SourceSettings("bytes", chat=ChatSettings(**chat))).parse_many([record])
    if isinstance(found, ChatError):
        raise found
    return found[1]


def samples(record: dict[str, Any], **chat: Any) -> list[str]:
    return [trained(marked) for marked in samples_of(record, **chat)]


def stored(folder: Path, split: str = "train") -> list[np.ndarray]:
    source = Source(f"{folder}/{split}")
    ends = np.cumsum(source.samples()[:, 0])
    return [source.read_on(int(end - n), int(n)) for end, n in zip(ends, source.samples()[:, 0])]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


DROPS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].strip() if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONLY_CONTENT = DROPS_THOUGHTS.replace(".split('</think>')[-1].strip()", "")
INLINE = "<think>\nAdd.\n</think>\n\n2"
USER2 = {"role": "user", "content": "2+2?"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def dialogue(i: int) -> dict[str, Any]:
    answer = {"role": "assistant", "content": f"{2 * i} " * (i % 9 + 1)}
    return {"messages": [{"role": "user", "content": f"{i}+{i}?"}, answer]}


EXPECTED = ["[" + f"{2 * i} " * (i % 9 + 1) + "<|im_end|>]" for i in range(60)]
