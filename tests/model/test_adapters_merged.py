"""Adapters added to their base, and in peft's own format."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from nb_lightning.checkpoints import hf_weights
from nb_lightning.checkpoints.pretrained import find_origin
from nb_lightning.config.schema import AdapterConfig, TrainerConfig
from nb_lightning.generation.decoder import generate
from nb_lightning.generation.sampling import Sampling
from nb_lightning.model import adapters
from nb_lightning.model.layout import build_model
from nb_lightning.model.transformer import Transformer
from nb_lightning.model.weights import load_weights
from tests.model.adapters_harness import (
    SHAPE,
    InMemory,
    adapted,
    base_weights,
    dequantised,
    loss_of,
    merged,
    train,
    trained,
    trained_parameters,
    write_hf,
)
from tests.model.harness import ids


@pytest.mark.parametrize("also_train", [[], ["embedding", "head"]])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_weights_compute_what_the_adapters_do(also_train: list[str], tied: bool) -> None:
    cfg, shape = AdapterConfig("lora", rank=4, also_train=also_train), replace(SHAPE, tie_embeddings=tied)
    base = base_weights(shape)
    model = adapted(cfg, base, shape)
    start = loss_of(model)
    train(model, 8)
    tokens = ids(2, 24, 260)
    torch.testing.assert_close(merged(model, cfg, base, shape)(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    assert loss_of(model) < start - 0.5


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_model_in_training_generates_what_its_merged_weights_do(name: str) -> None:
    """As RL samples between two steps: with a key-value cache, and training goes on afterwards."""
    cfg, base = AdapterConfig(name, rank=4), base_weights()
    model = adapted(cfg, base)
    whole = dequantised(model) if name == "qlora" else base
    train(model, 4)
    loss_of(model).backward()
    gradients = [p.grad for p in trained_parameters(model).values()]
    model.zero_grad()
    prompts = [[1, 2, 3], [7, 8]]
    rows = [generate(m, prompts, Sampling(12, 0.0), seeds=0) for m in (model, merged(model, cfg, whole))]
    assert [row.ids for row in rows[0]] == [row.ids for row in rows[1]]
    assert model.training
    loss_of(model).backward()
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(trained_parameters(model).values(), gradients))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_compiled_layers_train_alike(name: str) -> None:
    runs = []
    for compiled in (False, True):
        trainer = TrainerConfig(compile=compiled, activation_checkpointing=True)
        attach = partial(adapters.attach, cfg=AdapterConfig(name), precision="32-true")
        model = build_model(SHAPE, trainer, "sdpa", torch.device("cpu"), None, None, attach)
        adapters.load_base(model, base_weights(), seed=0)
        runs.append(train(model, 4))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_qlora_merges_into_the_base_it_was_quantised_from() -> None:
    cfg, base = AdapterConfig("qlora", rank=4), base_weights()
    model = adapted(cfg, base)
    four_bit = dequantised(model)
    train(model, 8)
    tokens = ids(2, 24, 260)
    logits = model(tokens)
    torch.testing.assert_close(merged(model, cfg, four_bit)(tokens), logits, rtol=1e-5, atol=1e-5)
    # Into the base's own precision: what is left is the base's rounding to 4 bits, not the adapters'.
    rounding = (merged(model, cfg, base)(tokens) - logits).norm() / logits.norm()
    assert 0.01 < rounding < 0.3


def test_merging_refuses_another_base() -> None:
    cfg, base = AdapterConfig("lora"), base_weights()
    model = adapted(cfg, base)
    saved = {"alpha": 1, "rank": 1, "base": {"path": "p", "tensors": {n: base.digest(n) for n in base.stored}}}
    other = InMemory(
        {**base.tensors, "layers.1.mlp.up_proj.weight": base.tensors["layers.1.mlp.up_proj.weight"] + 1e-7}
    )
    with pytest.raises(ValueError, match=r"memory is not the base .*\(p, as .*: tensor layers.1.mlp.up_proj.weight"):
        load_weights(Transformer(SHAPE), adapters.MergedWeights(other, trained(model), saved))


# peft's format ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("also_train", [[], ["embedding"]])
@pytest.mark.parametrize("tied", [False, True])
def test_peft_loads_what_is_saved_and_computes_the_same(tmp_path: Path, also_train: list[str], tied: bool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    cfg, shape = AdapterConfig("lora", rank=4, alpha=6.0, also_train=also_train), replace(SHAPE, tie_embeddings=tied)
    base = base_weights(shape)
    folder = write_hf(tmp_path / "base", base, shape)
    model = adapted(cfg, base, shape)
    train(model, 8)
    (tmp_path / "adapter").mkdir()
    hf_weights.save_peft(trained(model), cfg, str(folder), tied, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    tokens = ids(2, 24, 260)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)
    reason = f"{tmp_path / 'adapter'} holds adapters in peft's format (for {folder}), and no model; merge them"
    with pytest.raises(ValueError, match="^" + re.escape(reason)):
        find_origin(str(tmp_path / "adapter"))
