"""What is put into a conversation is in the tokens, trained or not as its marks say, or named in dropped.jsonl."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.prepare.dropped import DROPPED
from data.prepare.make import prepare
from data.prepare.settings import ChatSettings, SourceSettings
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.token_source import TRAINED, Source
from tests.data.prepare.odd_conversations import REASONING, WORD, Author, Conversation, count_words
from tests.harness import ROOT

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NO_BOS = "{%- set bos_token = '' -%}"  # the byte tokenizer has no such token, and one end of turn
END = re.compile(r"<\|eot_id\|>|<\|eom_id\|>|<SPECIAL_12>")
FOLDER = ROOT / "tests/text/templates"
STYLES = ("qwen3", "nanbeige42", "llama31", "deepseek_v3", "r1_distill", "nemotron")
TEMPLATES = {
    "ours": (ROOT / "nb_lightning/text/chatml.jinja").read_text(),
    **{name: NO_BOS + END.sub("<|im_end|>", (FOLDER / f"{name}.jinja").read_text()) for name in STYLES},
    "cuts what stands before a </think>": (  # as R1-Distill and Qwen 3 do, wherever it stands
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}" + PROMPT
    ),
    "knows users and assistants only": (
        "{% for m in messages if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
    ),
    "writes the names of calls": (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content or '' }}{{ m.content }}"
        "{% for c in m.tool_calls or [] %} {{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
    ),
}  # fmt: skip


def prepared(conversations: list[Conversation], chat: ChatSettings, folder: Path) -> tuple[dict, dict]:
    """Prepare conversations; return record -> its samples as pairs (text, trained text), and record -> reason."""
    lines = [json.dumps(conversation.record) for conversation in conversations]
    (folder / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = SourceSettings("bytes", val_fraction=0, chat=chat)
    prepare([folder / "chats.jsonl"], str(folder / "out"), settings, overwrite=True, progress=False)
    tokenizer, source = load_tokenizer("bytes"), Source(f"{folder}/out/train")
    samples: dict[int, list[tuple[str, str]]] = {}
    numbers = {piece.word: n for n, c in enumerate(conversations) for piece in c.pieces}
    ends = np.cumsum(source.samples()[:, 0])
    for end, size in zip(ends, source.samples()[:, 0]):
        marked = source.read_on(int(end - size), int(size))
        text = tokenizer.decode((marked & (TRAINED - 1)).tolist())
        trained = tokenizer.decode((marked[marked & TRAINED > 0] & (TRAINED - 1)).tolist())
        (number,) = {numbers[word] for word in WORD.findall(text)}
        samples.setdefault(number, []).append((text, trained))
    dropped = {}
    if (folder / "out" / DROPPED).is_file():
        entries = map(json.loads, (folder / "out" / DROPPED).read_text().splitlines())
        dropped = {entry["line"] - 1: entry.get("detail") or entry["reason"] for entry in entries}
    return samples, dropped


def losses(conversation: Conversation, samples: list[tuple[str, str]], think: bool) -> list[str]:
    """Say which words of a record are missing in its samples, or trained on against its marks.

    The thought of a turn that is not trained on is context, which a template may leave out. Nothing learns from what
    follows the last trained turn.
    """
    needed: Counter[str] = Counter()
    for piece in conversation.pieces:
        is_needed = piece.kind != REASONING or (think and piece.message in conversation.trained)
        needed[piece.word] += piece.count if is_needed else 0
    texts, trained = ([count_words(sample[side]) for sample in samples] for side in (0, 1))
    found = []
    for piece in conversation.pieces:
        if piece.message is not None and piece.message > max(conversation.trained):
            continue
        is_trained = piece.message in conversation.trained
        in_text, in_trained = (max(counts[piece.word] for counts in side) for side in (texts, trained))
        if in_text < needed[piece.word] or (is_trained and in_trained < needed[piece.word]):
            found.append(f"{piece}: {in_text} times in a text, {in_trained} times trained on")
        if in_trained and not is_trained:
            found.append(f"{piece}: trained on")
        if not think and in_text > needed[piece.word]:
            found.append(f"{piece}: {in_text} times in a text, in spite of --no-think")
    return found


def check(template: str, seeds: range, think: bool, folder: Path) -> None:
    conversations = [Author(seed).conversation() for seed in seeds]
    samples, dropped = prepared(conversations, ChatSettings(TEMPLATES[template], think), folder)
    assert samples.keys() | dropped.keys() == set(range(len(seeds))) and samples.keys().isdisjoint(dropped)
    for number, conversation in enumerate(conversations):
        if conversation.fault is not None:
            assert number in dropped, (conversation.fault, conversation.record)
        elif number in samples:
            assert losses(conversation, samples[number], think) == [], (conversation.record, samples[number])
        else:
            assert template != "ours" and "the template " in dropped[number], (dropped[number], conversation.record)
    assert len(samples) > len(seeds) / 20  # what is left proves something


@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_no_word_of_a_conversation_is_lost_unseen(template: str, think: bool, tmp_path: Path) -> None:
    check(template, range(40), think, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_no_word_of_thousands_of_conversations_is_lost_unseen(template: str, think: bool, tmp_path: Path) -> None:
    check(template, range(40, 540), think, tmp_path)
