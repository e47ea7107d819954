"""What `python -m nb_lightning.export` writes, opened by plain transformers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from nb_lightning import export
from nb_lightning.checkpoints.gguf import GGUFWeights
from nb_lightning.checkpoints.gguf_tokenizer import tokenizer_from_gguf
from nb_lightning.checkpoints.hf_weights import HFWeights
from nb_lightning.checkpoints.pretrained import find_origin, load_pretrained
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.text.chat_template import ChatTemplate
from tests.checkpoints.harness import NANBEIGE, write
from tests.harness import run_train
from tests.model.harness import ids

pytestmark = pytest.mark.runs

TEXT = "def f(x):\n    return x + 1  # naïve 你好\n\n\t<|im_start|>user\nWhat is 12,345?<|im_end|>"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
    {"role": "user", "content": "And 3 + 3?"},
]


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    run_train(corpus, root)
    return root / "runs/pretrain"


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the run, with our chat template."""
    folder = tmp_path_factory.mktemp("exports") / "tiny"
    export.main(["--from", str(run), "--to", str(folder), "--chat-template", "chatml"])
    return folder


def test_a_run_is_what_transformers_loads(run: Path, exported: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours, theirs = load_pretrained(str(run), "cpu").model, AutoModelForCausalLM.from_pretrained(exported)
    assert theirs.dtype == torch.float32 and theirs.config.rope_parameters["rope_theta"] == 100_000.0
    assert theirs.config.max_position_embeddings == 128  # the longest rows it was trained on
    tokens = ids(2, 100, 260)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    again = load_pretrained(str(exported), "cpu")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    assert again.stop_ids == (256, 258) and again.model.rope.theta == 100_000.0


def test_its_tokenizer_and_chat_template(exported: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_pretrained(str(exported), "cpu"), AutoTokenizer.from_pretrained(exported)
    assert theirs(TEXT).input_ids == ours.tokenizer.tokenizer.encode(TEXT).ids
    assert theirs.decode(theirs(TEXT).input_ids) == TEXT
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (256, 259, None)
    rendered = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered == ChatTemplate.chatml().render(CHAT, add_generation_prompt=True)
    assert rendered == ours.chat.render(CHAT, add_generation_prompt=True) and "<think>\nTwo and two." in rendered


def test_transformers_generates_until_an_end_of_the_model(exported: Path) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(exported)
    assert config.eos_token_id == [256, 258] and config.pad_token_id == 259
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.6, 0.95)  # the paper's decoding


def test_the_model_card_tells_the_run(run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| diversity_enriched_stable | 3,072 | 0.002 | docs 0.4, code 0.6 | 32 | 10000 |" in card
    assert json.loads((run / "manifest.json").read_text())["data"]["docs"]["sha256"] in card
    assert "10,240 tokens, checkpoint `step-00000020-end-of-decay`" in card and "torch 2." in card
    assert str(run.parent) not in "".join(path.read_text("utf-8", "replace") for path in exported.iterdir())


def test_the_model_card_of_rl_counts_tasks(run: Path, tmp_path: Path) -> None:
    """Its manifest describes prompts (data/prompts.py), not tokens."""
    copy = shutil.copytree(run, tmp_path / "rl")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["data"] = {"maths_sort": {"tasks": 1000, "sha256": "ab12"}}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    export.main(["--from", str(copy), "--to", str(tmp_path / "exported")])
    card = (tmp_path / "exported/README.md").read_text()
    assert "| data | tasks | SHA-256 |\n| --- | --- | --- |\n| maths_sort | 1000 | ab12 |" in card


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_the_same_to_the_last_bit(tmp_path: Path, tied: bool, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    there, back = tmp_path / "there", tmp_path / "back"
    config = {**NANBEIGE, "vocab_size": 260, "tie_word_embeddings": tied, "torch_dtype": dtype}
    write(there, config, dtype=dtype)
    load_tokenizer("bytes").save(there)
    export.main(["--from", str(there), "--to", str(back), "--shard-size", "20KB"])
    assert len(list(back.glob("*.safetensors"))) > 1
    one, other = HFWeights(there), HFWeights(back)
    assert one.stored == other.stored and one.dtype == other.dtype
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.stored)
    before, after = AutoModelForCausalLM.from_pretrained(there), AutoModelForCausalLM.from_pretrained(back)
    assert before.dtype == after.dtype == getattr(torch, dtype)
    with torch.no_grad():
        assert torch.equal(before(ids(2, 50, 96)).logits, after(ids(2, 50, 96)).logits)
    config = json.loads((back / "config.json").read_text())
    assert config["max_position_embeddings"] == 65536 and config["rope_theta"] == 70e6


@pytest.mark.parametrize("kind, exact", [("float32", True), ("bfloat16", False), ("float16", False), ("q8_0", False)])
def test_a_gguf_file_and_back(run: Path, tmp_path: Path, kind: str, exact: bool) -> None:
    file = tmp_path / "tiny.gguf"
    export.main(["--from", str(run), "--gguf", str(file), "--gguf-type", kind, "--chat-template", "chatml"])
    one, other = find_origin(str(run)), find_origin(str(file))
    assert one.shape == other.shape and one.context == other.context == 128
    for name in one.open().stored:
        a, b = one.open().read(name), other.open().read(name)
        assert torch.equal(a, b) if exact or a.dim() == 1 else (a - b).abs().max() <= 0.01 * a.abs().max(), name
    tokenizer = tokenizer_from_gguf(GGUFWeights(file).metadata, file)
    assert tokenizer.tokenizer.encode(TEXT).ids == load_tokenizer("bytes").tokenizer.encode(TEXT).ids
    assert tokenizer.eos_id == 256 and other.stop_ids(tokenizer) == (256, 258)
    assert tokenizer.chat_template and "generation" not in tokenizer.chat_template.replace("add_generation_prompt", "")
    templates = ChatTemplate(tokenizer.chat_template), ChatTemplate.chatml()
    rendered, expected = (template.render(CHAT, add_generation_prompt=True) for template in templates)
    assert rendered == expected


def test_an_earlier_export_is_replaced_and_nothing_else(exported: Path, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(exported, folder)
    export.main(["--from", str(run), "--to", str(folder), "--dtype", "bfloat16"])
    assert HFWeights(folder).dtype == torch.bfloat16 and not (folder / "chat_template.jinja").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "notes.txt").write_text("mine")
    for target, words in (
        (folder, "is an earlier export, but notes.txt is not of it"),
        (run, "is where the weights come from"),
        (tmp_path, "holds something that is not an earlier export"),
        (folder / "notes.txt", "is a file or a link, not a folder"),
    ):
        with pytest.raises(SystemExit, match=re.escape(words)):
            export.main(["--from", str(run), "--to", str(target)])
    with pytest.raises(SystemExit, match="is something else than an earlier export"):
        (tmp_path / "other.gguf").write_text("mine")
        export.main(["--from", str(run), "--gguf", str(tmp_path / "other.gguf")])
    with pytest.raises(SystemExit, match="is where the weights come from"):
        export.main(["--from", str(exported), "--to", str(exported)])
    assert {path: path.read_bytes() for path in before} == before


def test_a_failure_leaves_nothing_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.folders, "commit", full)
    with pytest.raises(SystemExit, match=r"could not be written: .*No space left"):
        export.main(["--from", str(run), "--to", str(tmp_path / "new")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "nothing to write: give --to, --gguf or --adapter"),
        (["--to", "x", "--shard-size", "4"], "--shard-size is '4'; give a whole number with KB, MB or GB"),
        (["--gguf", "x.bin"], "--gguf x.bin does not end in .gguf"),
        (["--to", "x", "--chat-template", "nowhere"], "--chat-template nowhere cannot be read"),
    ],
)
def test_mistakes_are_one_line(exported: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match="^error: " + re.escape(words)):
        export.main(["--from", str(exported), *arguments])
