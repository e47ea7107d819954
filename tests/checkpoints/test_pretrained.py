"""`load_pretrained` of everything that it takes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nb_lightning.checkpoints.gguf_tokenizer import tokenizer_to_gguf
from nb_lightning.checkpoints.pretrained import find_origin, load_pretrained
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.generation.decoder import Sampling, generate
from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.text.tokenizer import byte_tokenizer
from tests.checkpoints.harness import NANBEIGE, write
from tests.harness import Train


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    write(folder, {**NANBEIGE, "vocab_size": 260})
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    return folder


def test_a_hugging_face_folder(hf: Path) -> None:
    pretrained = load_pretrained(str(hf), device="cpu")
    assert pretrained.name == "small" and not pretrained.model.training
    assert pretrained.model.shape.rope_theta == 70e6 and pretrained.model.rope.theta == 70e6
    assert pretrained.tokenizer.tokenizer.id_to_token(pretrained.tokenizer.eos_id) == "<|endoftext|>"
    assert pretrained.stop_ids == (2, 256, 258)  # config.json's, the end of a document, the end of a turn
    assert find_origin(str(hf)).context == 65536


@pytest.mark.runs
def test_a_run_and_its_checkpoints(train: Train, tmp_path: Path) -> None:
    train()
    run = tmp_path / "runs/pretrain"
    last = sorted((run / "checkpoints").iterdir())[-1]
    state = torch.load(last / "state", weights_only=True)["state_dict"]
    for path in (run, last):
        pretrained = load_pretrained(str(path), device="cpu")
        for name, value in pretrained.model.state_dict().items():
            assert torch.equal(value, state[f"model.{name}"]), name
        assert pretrained.model.rope.theta == 100_000.0  # of the last phase
        assert pretrained.stop_ids == (256, 258) and pretrained.chat is None
    assert find_origin(str(run)).context == 128
    prompt = pretrained.tokenizer.tokenizer.encode("def ").ids
    (completion,) = generate(pretrained.model, [prompt], Sampling(4, temperature=0, stop_ids=pretrained.stop_ids))
    assert completion.ids
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(ValueError, match=r"^no tokenizer at .*runs/pretrain"):
        load_pretrained(str(run))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype(hf: Path, dtype: str) -> None:
    assert load_pretrained(str(hf), "cpu", dtype).model.head.weight.dtype == getattr(torch, dtype)


def test_what_is_not_a_model(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is neither a run .* nor a Hugging Face folder"):
        load_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="no checkpoint at 'nowhere'"):
        load_pretrained("nowhere")
    with pytest.raises(ValueError, match="dtype is 'int8'; allowed: auto, float32, bfloat16, float16"):
        load_pretrained(str(hf), dtype="int8")


END_OF_DOCUMENT, OTHER_END = 256, 257
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_start|>{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def test_the_end_of_a_turn_in_the_template_is_a_stop_of_every_origin(tmp_path: Path) -> None:
    """A base model's files name the end of a document; the chats it is trained on end with another token."""
    write(tmp_path, {**NANBEIGE, "vocab_size": 260, "eos_token_id": END_OF_DOCUMENT})
    load_tokenizer("bytes").save(tmp_path, TEMPLATE)
    origin = find_origin(str(tmp_path))
    assert OTHER_END in origin.stop_ids(origin.tokenizer())
    assert OTHER_END in load_pretrained(str(tmp_path)).stop_ids
    bare = replace(origin.tokenizer(), chat_template=None)
    assert OTHER_END not in origin.stop_ids(bare) and OTHER_END in origin.stop_ids(bare, ChatTemplate(TEMPLATE))
    assert tokenizer_to_gguf(origin.tokenizer(), 260)["tokenizer.ggml.eot_token_id"] == OTHER_END
