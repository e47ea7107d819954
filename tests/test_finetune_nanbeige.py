"""docs/finetune_nanbeige.md: its own commands, on tiny random weights in the shapes of the family."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from nb_lightning.checkpoints.pretrained import load_pretrained
from tests.harness import ROOT, environment, free_port
from tests.nanbeige_harness import END_OF_TEXT, IM_END, write_base
from tests.serve.harness import Running, stop

PAGE = (ROOT / "docs/finetune_nanbeige.md").read_text("utf-8")
TEMPLATE = (ROOT / "tests/text/templates/nanbeige42.jinja").read_text("utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.DOTALL)
SETTINGS = BLOCKS[0][1]

# What stands for the page's settings: a tiny model on the CPU, which learns the form of the twenty conversations.
TINY = {
    "HARDWARE": "trainer=cpu stage.adapter.name=qlora stage.optim.name=paged_adamw8bit trainer.progress_bar=false "
    "stage.adapter.also_train=[embedding,head]",
    "PLAN": "stage.phases.all.seq_len=1024 stage.global_batch_tokens=4096 stage.micro_batch_size=4 "
    "stage.phases.all.tokens=400_000 stage.phases.all.lr.start=3e-3 stage.phases.all.lr.end=3e-4",
    "ANSWER": "128",
}


def block(words: str) -> str:
    """Return the page's only block that has these words."""
    (found,) = [text for _, text in BLOCKS if words in text]
    return found


class Reader:
    """Someone who follows the page, in a folder that looks like the checkout.

    Args:
        settings: instead of the page's own, by name.
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        for name in ("train.py", "conf", "docs"):
            (folder / name).symlink_to(ROOT / name)
        names = re.findall(r"^(\w+)=", SETTINGS, re.MULTILINE)
        assert settings.keys() <= set(names)
        changed = "\n".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
        self.settings = f"{SETTINGS}\n{changed}\n"

    @property
    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return environment(PYTHONPATH=str(ROOT), PATH=path)

    def run(self, *blocks: str) -> str:
        """Run blocks of the page in one shell; return what they print."""
        script = "set -euo pipefail\n" + self.settings + "".join(blocks)
        done = subprocess.run(
            ["bash", "-c", script], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def serve(self, block: str, port: str) -> Running:
        """Start the page's server; return when it answers."""
        log = self.folder / "server.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                ["bash", "-c", f"{self.settings}\nexec {block.strip()}"], cwd=self.folder, env=self.environment,
                stdout=out, stderr=out, text=True, start_new_session=True,
            )  # fmt: skip
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
                    return Running(process, int(port), log)
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)

    def ask(self, port: str) -> list[str]:
        """Run the page's client; return the lines that it prints."""
        script = block("from openai import OpenAI").replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=self.folder, env=self.environment, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


def reader_of(kind: str, folder: Path, **settings: str) -> Reader:
    """Return a reader with the base of that kind; 4-3B's has no template, and gets one as the page says."""
    base = write_base(folder / "base", kind, None if kind == "4-3B" else TEMPLATE)
    reader = Reader(folder, MODEL=str(base), **TINY, **settings)
    if kind == "4-3B":
        (folder / "chat_model").mkdir()
        (folder / "chat_model/chat_template.jinja").write_text(TEMPLATE, "utf-8")
        reader.run(block("# Base only").replace("path/to/Nanbeige4-3B-Thinking-2511", f"{folder}/chat_model"))
    return reader


# What the page says --------------------------------------------------------------------------------------------------


def test_every_message_that_the_page_explains_is_one_of_ours() -> None:
    table = PAGE[PAGE.index("| message or sign") :]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    code = "\n".join(path.read_text() for place in ("nb_lightning", "data") for path in (ROOT / place).rglob("*.py"))
    assert len(messages) > 6 and [message for message in messages if message not in code] == []


@pytest.mark.runs
@pytest.mark.parametrize("kind", ["4-3B", "4.2"])
def test_the_brackets_of_the_preview_are_those_of_the_page(kind: str, tmp_path: Path) -> None:
    shown = reader_of(kind, tmp_path).run(block("data.preview"))
    assert re.search(r"dropped +0 records", shown)
    (example,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    city = re.search(r"weather of (\w+)", shown)
    assert city is not None
    call, _ = example.replace("Rome", city[1]).split("<tool_response>")  # its result is the first city's
    assert call in shown, shown
    for sample in shown.split("--- sample")[1:]:
        assert sample.count("[") - sample.count('["') == sample.count("<|im_end|>]"), sample


@pytest.mark.runs
def test_the_dry_run_names_what_is_missing(tmp_path: Path) -> None:
    line = next(line for line in block("dry_run=true").splitlines() if "dry_run" in line)
    shown = reader_of("4.2", tmp_path).run(line)
    assert re.search(r"not there yet:\n +data.sources.chats +outputs/data/chats\n", shown)


# The whole way --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind, stops", [("4-3B", [2, IM_END, END_OF_TEXT]), ("4.2", [IM_END, END_OF_TEXT])])
def test_the_journey(kind: str, stops: list[int], tmp_path: Path) -> None:
    port = free_port()
    reader = reader_of(kind, tmp_path, PORT=port)
    reader.run(block("data.preview"), block("run_name=weather"))
    evaluated = reader.run(block("nb_lightning.evaluate"))
    assert re.search(r"^chats +\d+ ", evaluated, re.MULTILINE)
    samples = [json.loads(line) for line in (tmp_path / "outputs/samples.jsonl").read_text().splitlines()]
    assert {sample["finish_reason"] for sample in samples} == {"stop"}
    reader.run(block("--adapter outputs/weather-adapter"))
    out = tmp_path / "outputs"
    assert json.loads((out / "weather/generation_config.json").read_text())["eos_token_id"] == stops
    assert (out / "weather-adapter/adapter_model.safetensors").is_file()
    if kind == "4-3B":
        logits_equal_transformers(out / "weather")
    same_in_gguf(out / "weather", out / "weather.gguf")
    server = reader.serve(block("nb_lightning.serve"), port)
    try:
        first, call, last = reader.ask(port)
    finally:
        stop(server, signal.SIGTERM)
    # Half a million random weights learn the form by heart, and not to copy the city.
    assert re.fullmatch(r"tool_calls I need the weather of \w+\. None", first)
    assert re.fullmatch(r'weather \{"city": "\w*"\}', call)
    assert re.fullmatch(r"stop The tool has answered\. It is \w+ in \w+, .* degrees\.", last)


def token_ids(vocab: int) -> torch.Tensor:
    return torch.randint(3, vocab, (2, 33), generator=torch.Generator().manual_seed(0))


def logits_equal_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = load_pretrained(str(folder), "cpu")
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = token_ids(ours.model.shape.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Weather in Rome?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat is not None and text == ours.chat.render(messages, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    written = theirs.generate(**prompt, max_new_tokens=128, do_sample=False)
    assert written[0, -1] == IM_END


def same_in_gguf(folder: Path, file: Path) -> None:
    """The two exports are one model: same logits, same ends."""
    merged, packed = load_pretrained(str(folder), "cpu"), load_pretrained(str(file), "cpu")
    ids = token_ids(merged.model.shape.vocab_size)
    with torch.no_grad():
        assert torch.equal(merged.model(ids), packed.model(ids))
    assert IM_END in packed.stop_ids and set(packed.stop_ids) <= set(merged.stop_ids)
