"""Checkpoints that are damaged, hostile or of another model: one line that names what, and nothing is run."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file, save_file

from nb_lightning.checkpoints import folders, hf_weights
from nb_lightning.checkpoints.hf_config import shape_from_config
from nb_lightning.checkpoints.hf_weights import HFWeights
from tests.checkpoints.harness import NANBEIGE, load, write
from tests.model.harness import TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "model", NANBEIGE)
    return tmp_path / "model"


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


Q, BIAS = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.bias"
THIRD = "model.layers.2.mlp.up_proj.weight"  # of a model with two layers


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(Q), f"tensor {Q} is missing"),
        (lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight is missing"),
        (lambda t: t.update({Q: t[Q][:40].clone()}), f"tensor {Q} is [40, 40], the model's is [80, 40]"),
        (lambda t: t.update({THIRD: t[Q].clone()}), f"tensor {THIRD} is not part of the model"),
        (lambda t: t.update({BIAS: t[Q][0].clone()}), f"tensor {BIAS} is not part of the model"),
        (lambda t: t.update({"visual.proj": t[Q].clone()}), "tensor visual.proj is not part of a Llama model"),
        (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), f"tensor {Q} is F8_E4M3; allowed: F32, BF16, F16"),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), f"tensor {Q} is I8; allowed: F32, BF16, F16"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(folder: Path, change: Callable[..., Any], words: str) -> None:
    changed(folder, change)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_buffers_of_old_checkpoints_are_no_weights(folder: Path) -> None:
    before = load(folder).state_dict()
    changed(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert all(torch.equal(value, before[name]) for name, value in load(folder).state_dict().items())


def test_a_tied_config_with_a_head_in_the_file(tmp_path: Path) -> None:
    write(tmp_path, {**NANBEIGE, "tie_word_embeddings": True})
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    changed(tmp_path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    model = load(tmp_path)
    assert model.head.weight is model.embedding.weight
    changed(tmp_path, lambda t: t.update({"lm_head.weight": 2 * t[embedding]}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding, to which the config ties it$"):
        load(tmp_path)


ELSEWHERE = ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", "x.bin", ".safetensors", 7]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_that_leads_elsewhere_opens_nothing(
    folder: Path, name: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: name}}))
    monkeypatch.setattr(hf_weights, "safe_open", None)  # would be called
    words = f"names {str(name)!r}; only .safetensors files beside it are opened"
    with pytest.raises(ValueError, match=re.escape(words)):
        HFWeights(folder)


MARK = Path(tempfile.gettempdir()) / f"nb_lightning-{os.getpid()}-was-run"


class Payload:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARK}",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.pkl"])
def test_a_pickle_is_never_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=re.escape(f"{folder} holds {name}, a pickle, which can run code")):
        load(folder)
    (folder / name).rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is not a readable safetensors file: "):
        load(folder)
    assert not MARK.exists()


def test_what_is_missing_or_damaged_is_named(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    for content in (data[:-1], data[:100], b"", b"\xff" * 100):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model.safetensors is not a readable safetensors file: "):
            load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor model.safetensors.index.json$"):
        load(folder)
    index = folder / "model.safetensors.index.json"
    for content, words in (
        ("{", "is not readable JSON"),
        ("[" * 100_000, "is not readable JSON"),
        ("[]", "holds a list, not a JSON object"),
        ("{}", "has no weight_map"),
        (json.dumps({"weight_map": {Q: "gone.safetensors"}}), "names gone.safetensors, which is not there"),
    ):
        index.write_text(content)
        with pytest.raises(ValueError, match=words):
            load(folder)


def test_a_config_of_more_layers_than_there_are_tensors_costs_nothing(folder: Path) -> None:
    shape = shape_from_config({**NANBEIGE, "num_hidden_layers": 10_000_000})
    with pytest.raises(ValueError, match="21 tensors are too few for 10000000 layers"):
        HFWeights(folder).require(shape)


def test_a_tensor_twice(folder: Path) -> None:
    write(folder, NANBEIGE, "20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = folder / min(index["weight_map"].values())
    shutil.copy(first, folder / "again.safetensors")
    index["weight_map"]["x"] = "again.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"is in again.safetensors and again in {first.name}$"):
        HFWeights(folder)


# Checkpoints of ours ------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, write_state: Callable[[Path], Any]) -> Path:
    """One that is whole by its manifest, whatever is in it."""
    temporary = folder / "checkpoints/.writing"
    temporary.mkdir(parents=True)
    write_state(temporary / "state")
    folders.commit(temporary, folder / "checkpoints/step-1", {"model": asdict(TINY)})
    return folder / "checkpoints/step-1"


def test_a_payload_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    def single(state: Path) -> None:
        torch.save({"state_dict": {"model.norm.weight": Payload()}}, state)

    def sharded(state: Path) -> None:
        state.mkdir()
        (state / ".metadata").write_bytes(pickle.dumps(Payload()))

    for name, write_state, words in (
        ("single", single, "state holds something else than tensors: Weights only load failed"),
        ("sharded", sharded, r"state/.metadata is no table of shards: it asks for posix.system"),
    ):
        folder = checkpoint(tmp_path / name, write_state)
        with pytest.raises(folders.DamagedCheckpoint, match=words) as caught:
            folders.CheckpointWeights(folder)
        assert "\n" not in str(caught.value)
    assert not MARK.exists()


def test_a_table_of_shards_that_leads_elsewhere(tmp_path: Path) -> None:
    def write_state(state: Path) -> None:
        save = {"state_dict": {"model.norm.weight": torch.ones(24)}}
        torch.distributed.checkpoint.save(save, checkpoint_id=state, no_dist=True)
        table = pickle.loads((state / ".metadata").read_bytes())
        for info in table.storage_data.values():
            info.relative_path = "../../" + info.relative_path
        (state / ".metadata").write_bytes(pickle.dumps(table))

    folder = checkpoint(tmp_path, write_state)
    with pytest.raises(folders.DamagedCheckpoint, match=r"names '../../__0_0.distcp', a file outside its folder"):
        folders.CheckpointWeights(folder)
