"""LoRA and QLoRA: the low-rank step by hand, a base that stays as it is, merging, resuming, and peft's own format."""

from __future__ import annotations

import gc
import json
import math
import shutil
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nb_lightning import adapters, bnb, checkpoints
from nb_lightning.config import AdapterConfig, TrainerConfig
from nb_lightning.config_checks import check
from nb_lightning.generate import generate
from nb_lightning.hf_config import config_from_shape
from nb_lightning.losses import cross_entropy
from nb_lightning.model import ModelShape, Transformer
from nb_lightning.optim import build_optimizer
from nb_lightning.pretrained import find
from nb_lightning.sampling import Sampling
from nb_lightning.strategies import build_model
from nb_lightning.weights import Stored, Weights, fill, save_hf
from tests.harness import TINY, read_trace
from tests.test_conf import composed
from tests.test_distributed import assert_same_training, losses, torchrun
from tests.test_model import ids

SHAPE = ModelShape(260, 64, 2, 2, 1, 32, 128, init_std=0.1)
WIDE = ("model.d_model=64", "model.head_dim=32", "model.d_mlp=128")  # harness.TINY in this shape


class InMemory(Weights):
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        super().__init__("memory", {name: Stored(name, tuple(t.shape)) for name, t in tensors.items()}, torch.float32)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def base_weights(shape: ModelShape = SHAPE) -> InMemory:
    return InMemory({name: p.detach() for name, p in Transformer(shape).named_parameters()})


def adapted(cfg: AdapterConfig, weights: Weights, shape: ModelShape = SHAPE, precision: str = "32-true") -> Transformer:
    attach = partial(adapters.attach, cfg=cfg, precision=precision)
    trainer = TrainerConfig(precision=precision)
    model = build_model(shape, trainer, "sdpa", torch.device("cpu"), None, None, attach)
    adapters.fill(model, weights, seed=0)
    return model


def loss_of(model: Transformer) -> Tensor:
    tokens = ids(2, 24, 260)
    return model(tokens, head=partial(cross_entropy, labels=tokens.roll(-1, 1))) / tokens.numel()


def train(model: Transformer, steps: int, mixed: bool = False) -> list[float]:
    optimizer = build_optimizer(model, "adamw", (0.9, 0.95), 1e-8, 0.0)
    optimizer.param_groups[0]["lr"] = 1e-2
    values = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


def trained(model: Transformer) -> InMemory:
    """What a checkpoint would hold."""
    return InMemory({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})


def merged(model: Transformer, cfg: AdapterConfig, base: Weights, shape: ModelShape = SHAPE) -> Transformer:
    tensors = {name: base.digest(name) for name in base.stored}
    saved = {"alpha": cfg.alpha, "rank": cfg.rank, "base": {"path": "memory", "tensors": tensors}}
    plain = Transformer(shape)
    fill(plain, adapters.Merged(base, trained(model), saved))
    return plain


# One step -----------------------------------------------------------------------------------------------------------


def test_a_step_is_the_low_rank_step_by_hand() -> None:
    """In float64: gradients of A and B from that of the whole matrix, then AdamW's first step."""
    cfg = AdapterConfig("lora", rank=3, alpha=5.0, targets=["o_proj"])
    model = adapted(cfg, base_weights()).double()
    layer = model.layers[0].attention.o_proj
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    torch.nn.init.normal_(b, generator=torch.Generator().manual_seed(1))
    before_a, before_b = a.detach().clone(), b.detach().clone()

    plain = Transformer(SHAPE).double()
    fill(plain, base_weights())
    whole = [plain.layers[i].attention.o_proj.weight for i in range(2)]
    with torch.no_grad():
        whole[0] += 5 / 3 * b @ a
    loss = loss_of(plain)
    loss.backward()
    gradient_a, gradient_b = 5 / 3 * b.T @ whole[0].grad, 5 / 3 * whole[0].grad @ a.T

    optimizer = build_optimizer(model, "adamw", (0.9, 0.95), 1e-8, weight_decay=0.1)
    assert [p for group in optimizer.param_groups for p in group["params"]] == [
        p for layer in model.layers for p in layer.attention.o_proj.parameters() if p.requires_grad
    ]
    optimizer.param_groups[0]["lr"] = 1e-3
    assert loss_of(model).item() == pytest.approx(loss.item(), abs=1e-12)
    loss_of(model).backward()
    torch.testing.assert_close(a.grad, gradient_a, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(b.grad, gradient_b, rtol=1e-9, atol=1e-12)
    optimizer.step()
    for now, before, gradient in ((a, before_a, gradient_a), (b, before_b, gradient_b)):
        expected = before * (1 - 1e-3 * 0.1) - 1e-3 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(now.detach(), expected, rtol=1e-9, atol=1e-12)


def test_at_the_start_the_model_is_its_base_and_depends_on_the_seed_alone() -> None:
    plain = Transformer(SHAPE)
    model = adapted(AdapterConfig("lora"), base_weights())
    assert torch.equal(loss_of(model), loss_of(plain))
    a = model.layers[1].mlp.down_proj.lora_A.default.weight.detach()
    assert a.abs().max() <= 128**-0.5 and float(a.std()) == pytest.approx(128**-0.5 / math.sqrt(3), rel=0.1)
    again = adapted(AdapterConfig("lora", targets=["down_proj"]), base_weights())
    assert torch.equal(a, again.layers[1].mlp.down_proj.lora_A.default.weight)


@pytest.mark.parametrize("name", ["lora", "qlora"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_loss_falls_and_the_base_stays_to_the_last_bit(name: str, precision: str) -> None:
    model = adapted(AdapterConfig(name, rank=4), base_weights(), precision=precision)
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    values = train(model, 8, mixed=precision == "bf16-mixed")
    assert values[-1] < values[0] - 0.5
    for key, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in key)
        assert (
            p.dtype == (torch.float32 if p.requires_grad or precision == "32-true" else torch.bfloat16)
            or p.dtype == torch.uint8
        )
        if key in frozen:
            assert torch.equal(p, frozen[key])
    assert ("layers.0.mlp.up_proj.base_layer.weight" in frozen) and len(frozen) == 21
    four_bit = [key for key, p in frozen.items() if p.dtype == torch.uint8]
    assert len(four_bit) == (14 if name == "qlora" else 0)


def test_also_train() -> None:
    cfg = AdapterConfig("lora", targets=["q_proj"], also_train=["head"])
    model = adapted(cfg, base_weights(), precision="bf16-mixed")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    names = [key for key in trained(model).stored if ".lora_" not in key]
    assert names == ["head.weight"]


@pytest.mark.parametrize(
    "cfg",
    [
        AdapterConfig("lora"),
        AdapterConfig("qlora", rank=3, targets=["v_proj", "gate_proj"]),
        AdapterConfig("lora", also_train=["embedding", "head"]),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_count_of_what_trains(cfg: AdapterConfig, tied: bool) -> None:
    shape = replace(SHAPE, tie_embeddings=tied)
    model = adapted(cfg, base_weights(shape), shape)
    number = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapters.trained_parameters(shape, cfg) == number
    assert adapters.trained_parameters(shape, AdapterConfig()) == shape.parameters()


def test_dropout_is_drawn_again_when_a_layer_is_recomputed() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(AdapterConfig("lora", dropout=0.5), base_weights())
        model.activation_checkpointing = checkpointing
        for p in trained(model).tensors.values():
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        loss_of(model).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*gradients)
    model.eval()
    assert torch.equal(loss_of(model), loss_of(model))


# 4 bits -------------------------------------------------------------------------------------------------------------


def dequantised(model: Transformer) -> InMemory:
    """The base that a QLoRA model computes with."""
    import bitsandbytes.functional as F

    tensors = {}
    for key, p in model.named_parameters():
        if p.dtype == torch.uint8:
            tensors[adapters.base_name(key)] = F.dequantize_4bit(p.data, p.quant_state)
        elif not p.requires_grad:
            tensors[key] = p.detach()
    return InMemory(tensors)


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_is_the_nearest_of_sixteen_values_in_blocks_of_64(double_quant: bool) -> None:
    """QLoRA (arXiv 2305.14314), section 3: quantiles of the normal distribution, scaled by each block's largest."""
    levels = torch.tensor([-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803,
                           0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0])  # fmt: skip
    base = base_weights()
    model = adapted(AdapterConfig("qlora", double_quant=double_quant), base)
    for key in ("layers.0.attention.k_proj.weight", "layers.1.mlp.down_proj.weight"):
        blocks = base.read(key).view(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        expected = levels[(blocks / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)] * scale
        found = dequantised(model).read(key).view(-1, 64)
        # Scales in 8 bits are off by less than 1 % of the largest.
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(scale.max()) if double_quant else 1e-6)


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    shape = replace(SHAPE, d_mlp=96)
    with pytest.raises(ValueError, match=r"qlora needs layers whose number of inputs is a multiple of 64, .* with 96"):
        adapted(AdapterConfig("qlora"), base_weights(shape), shape)


def test_gradients_are_those_through_the_dequantised_base_before_and_after_an_evaluation() -> None:
    """bitsandbytes packs weights anew in eval mode on some CPUs, and then gives no gradient to what comes before."""
    model = adapted(AdapterConfig("qlora"), base_weights())
    train(model, 3)
    reference = adapted(AdapterConfig("lora"), dequantised(model))
    reference.load_state_dict(trained(model).tensors, strict=False)
    for evaluated in (False, True):
        if evaluated:
            model.eval()
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                loss_of(model)
            model.train()
        for m in (model, reference):
            m.zero_grad()
            loss_of(m).backward()
        for name, p in trained_parameters(model).items():
            torch.testing.assert_close(p.grad, trained_parameters(reference)[name].grad, rtol=1e-4, atol=1e-7)


def trained_parameters(model: Transformer) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_compute_dtype(compute: str) -> None:
    model = adapted(AdapterConfig("qlora", compute_dtype=compute), base_weights())
    seen = []
    original = torch.ops.bitsandbytes.gemm_4bit.default

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is original:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Spy():
        loss_of(model).backward()
    assert len(seen) == 14 and set(seen) == {getattr(torch, compute)}


def test_filling_holds_one_whole_tensor_at_a_time_and_allocates_only_what_stays() -> None:
    base, alive, most = base_weights(), [], 0

    class Reader(InMemory):
        def read(self, name: str) -> Tensor:
            nonlocal most
            tensor = base.tensors[name].clone()
            alive.append(weakref.ref(tensor.untyped_storage()))
            most = max(most, sum(ref() is not None for ref in alive))
            return tensor

    model = adapted(AdapterConfig("qlora"), Reader(base.tensors))
    gc.collect()
    assert most <= 2 and not any(ref() is not None for ref in alive)
    size = sum(p.untyped_storage().nbytes() for p in model.parameters() if not p.requires_grad)
    linears = SHAPE.parameters() - 2 * 260 * 64 - 5 * 64
    assert size == linears / 2 + (2 * 260 * 64 + 5 * 64) * 4


# Merging ------------------------------------------------------------------------------------------------------------


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
        adapters.fill(model, base_weights(), seed=0)
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
        fill(Transformer(SHAPE), adapters.Merged(other, trained(model), saved))


# peft's format ------------------------------------------------------------------------------------------------------


def write_hf(folder: Path, weights: Weights, shape: ModelShape) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_hf(weights, shape, folder, torch.float32, 10**9)
    (folder / "config.json").write_text(json.dumps(config_from_shape(shape, torch.float32)))
    return folder


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
    adapters.save_peft(trained(model), cfg, str(folder), tied, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    tokens = ids(2, 24, 260)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("base"), base_weights(), SHAPE)


def fit(corpus: Path, root: Path, *overrides: str) -> Path:
    """`train.py` in this process, which has imported peft already; returns the run."""
    import train as command

    paths = [f"paths.root={root}", f"paths.data_root={corpus}"]
    cfg = composed(*TINY, *WIDE, *paths, "+callbacks.trace={_target_: nb_trace.StepTrace}", *overrides)
    check(cfg, ["nb_trace"])
    run = root / "runs" / cfg.run_name
    run.mkdir(parents=True, exist_ok=True)  # Hydra's part
    command.run(cfg)
    return run


LORA = ("stage.adapter.name=lora", "stage.adapter.rank=4")
QLORA = ("stage.adapter.name=qlora", "stage.adapter.rank=4", "stage.adapter.dropout=0.1")


@pytest.fixture(scope="module")
def unbroken(corpus: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(corpus, tmp_path_factory.mktemp("unbroken"), *QLORA, f"init_from={base}")


@pytest.fixture(scope="module")
def lora(corpus: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(corpus, tmp_path_factory.mktemp("lora"), *LORA, f"init_from={base}")


def cut(run: Path, root: Path, steps: str = "step-00000010") -> Path:
    """A copy of a run that was stopped after its tenth step."""
    shutil.copytree(run, root / "runs" / run.name)
    for path in (root / "runs" / run.name / "checkpoints").iterdir():
        if path.name > steps:
            shutil.rmtree(path)
    for trace in (root / "runs" / run.name).glob("trace.jsonl*"):
        trace.unlink()
    return root / "runs" / run.name


def test_a_checkpoint_holds_what_trains_and_names_its_base(unbroken: Path, base: Path) -> None:
    (folder,) = (unbroken / "checkpoints").glob("*end-of-decay")
    state = torch.load(folder / checkpoints.STATE, weights_only=True)
    assert len(state["state_dict"]) == 28 and all("lora_" in name for name in state["state_dict"])
    assert len(state["optimizer_states"][0]["state"]) == 28
    manifest = json.loads((unbroken / "manifest.json").read_text())
    assert manifest["trained_parameters"] == adapters.trained_parameters(SHAPE, AdapterConfig("qlora", rank=4))
    saved = checkpoints.read_info(folder)["adapter"]
    assert saved["base"]["path"] == str(base.resolve())
    assert saved["base"]["tensors"].keys() == base_weights().stored.keys()
    assert saved["base"]["tensors"]["norm.weight"] == base_weights().digest("norm.weight")


def test_resume_is_exact(unbroken: Path, corpus: Path, base: Path, tmp_path: Path) -> None:
    """With QLoRA and dropout, to the last bit of loss, gradients and weights."""
    run = cut(unbroken, tmp_path)
    fit(corpus, tmp_path, *QLORA, f"init_from={base}", "resume=true")
    whole, resumed = read_trace(unbroken), read_trace(run)
    assert sorted(resumed) == list(range(10, 20))
    assert all(resumed[step] == whole[step] for step in resumed)
    states = [
        torch.load(next((folder / "checkpoints").glob("*end-of-decay")) / checkpoints.STATE, weights_only=True)
        for folder in (unbroken, run)
    ]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["init_from={other}"], "init_from={other} is not the base that the adapters were trained on ({base}, as"),
        (["init_from={base}", "stage.adapter.rank=8"], "stage.adapter.rank is 8, but "),
        (["init_from={base}", "stage.adapter.name=none"], "stage.adapter.name is none, but "),
    ],
)
def test_resume_refuses_another_base_or_other_adapters(
    unbroken: Path, corpus: Path, base: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    cut(unbroken, tmp_path)
    other = base_weights()
    other.tensors["layers.0.mlp.up_proj.weight"][3, 4] += 1e-3
    names = {"base": str(base), "other": str(write_hf(tmp_path / "other", other, SHAPE))}
    given = [override.format(**names) for override in overrides]
    with pytest.raises(ValueError) as caught:
        fit(corpus, tmp_path, *QLORA, "resume=true", *given)
    assert str(caught.value).startswith(message.format(**names))


def test_a_later_stage_begins_with_base_and_adapters_merged(
    lora: Path, corpus: Path, base: Path, tmp_path: Path
) -> None:
    origin = find(str(lora))
    expected = Transformer(SHAPE)
    fill(expected, origin.open())
    run = fit(corpus, tmp_path, f"init_from={lora}", "stage.phases.warmup.lr.end=0", "trainer.save_every_n_steps=1",
              "trainer.keep_last=99", "stage.total_tokens=5120")  # fmt: skip
    first = torch.load(run / "checkpoints/step-00000001/state", weights_only=True)["state_dict"]
    for name, p in expected.named_parameters():
        assert torch.equal(first[f"model.{name}"], p)
    assert not torch.equal(expected.layers[0].mlp.up_proj.weight, base_weights().tensors["layers.0.mlp.up_proj.weight"])


def test_exported_adapters_load_in_peft_on_the_same_base(lora: Path, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from nb_lightning import export

    export.run(export.parser().parse_args(["--from", str(lora), "--adapter", f"{tmp_path}/adapter"]))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    ours = Transformer(SHAPE)
    fill(ours, find(str(lora)).open())
    tokens = ids(2, 24, 260)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="is no run of adapters"):
        export.run(export.parser().parse_args(["--from", str(base), "--adapter", f"{tmp_path}/other"]))


def test_adapters_on_adapters(lora: Path, corpus: Path, tmp_path: Path) -> None:
    run = fit(corpus, tmp_path, *QLORA, f"init_from={lora}", "run_name=second")
    weights = find(str(run)).open()
    assert isinstance(weights, adapters.Merged) and isinstance(weights.base, adapters.Merged)
    weights.require(SHAPE)
    assert torch.isfinite(weights.read("layers.0.mlp.up_proj.weight")).all()


def test_a_base_that_is_gone_is_named(lora: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora, run)
    for path in (run / "checkpoints").glob("*/checkpoint.json"):
        path.write_text(path.read_text().replace('"path": "', '"path": "/nowhere'))
    with pytest.raises(ValueError, match=r"holds adapters only, and their base is gone: .*/nowhere"):
        find(str(run)).open()


def test_accumulation(lora: Path, corpus: Path, base: Path, tmp_path: Path) -> None:
    run = fit(corpus, tmp_path, *LORA, f"init_from={base}", "stage.micro_batch_size=2",
              "stage.phases.decay.micro_batch_size=1", "trainer.activation_checkpointing=true")  # fmt: skip
    assert_same_training(losses(read_trace(lora)), losses(read_trace(run)))


@pytest.mark.parametrize("strategy, adapter", [("ddp", "qlora"), pytest.param("fsdp", "lora", marks=pytest.mark.slow)])
def test_two_processes(
    request: pytest.FixtureRequest, corpus: Path, base: Path, tmp_path: Path, strategy: str, adapter: str
) -> None:
    options = ["stage.adapter.rank=4", f"init_from={base}", f"stage.adapter.name={adapter}"]
    single = request.getfixturevalue("lora") if adapter == "lora" else fit(corpus, tmp_path / "single", *options)
    two = ["stage.phases.decay.micro_batch_size=1", f"trainer.strategy={strategy}"]
    torchrun(corpus, tmp_path, *WIDE, *options, *two)
    run = tmp_path / "runs/pretrain"
    for rank in range(2):
        assert_same_training(losses(read_trace(single)), losses(read_trace(run, rank)))
    one, other = find(str(single)).open(), find(str(run)).open()
    for name in one.stored:
        torch.testing.assert_close(one.read(name), other.read(name), rtol=0, atol=1e-5)
    if strategy == "fsdp":  # its checkpoint is in shards: that resumes too
        cut(run, tmp_path / "again")
        torchrun(corpus, tmp_path / "again", *WIDE, *options, *two, "resume=true")
        assert_same_training(
            losses(read_trace(single))[10:],
            [float.fromhex(line["loss"]) for line in read_trace(tmp_path / "again/runs/pretrain", 0).values()],
        )


# Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("name=dora", "stage.adapter.name is 'dora'; allowed: none, lora, qlora"),
        ("name=lora rank=0", "stage.adapter.rank is 0; it must be positive"),
        ("name=lora alpha=-1", "stage.adapter.alpha is -1.0; it must be positive"),
        ("name=lora dropout=1", "stage.adapter.dropout is 1.0; it must be from 0 to below 1"),
        ("name=lora targets=[]", "stage.adapter.targets is empty; allowed: q_proj, k_proj"),
        ("name=lora targets=[q_proj,head]", "stage.adapter.targets[1] is 'head'; allowed: q_proj, k_proj"),
        ("name=lora also_train=[norm]", "stage.adapter.also_train[0] is 'norm'; allowed: embedding, head"),
        ("name=qlora compute_dtype=fp16", "stage.adapter.compute_dtype is 'fp16'; allowed: auto, float32, bfloat16"),
        ("name=lora", "stage.adapter.name=lora needs init_from"),
    ],
)
def test_a_setting_that_cannot_work_is_named(overrides: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(composed(*(f"stage.adapter.{override}" for override in overrides.split())))
    assert str(caught.value).startswith(message)


def test_qlora_refuses_fsdp() -> None:
    with pytest.raises(ValueError, match=r"^stage.adapter.name=qlora does not work with trainer.strategy=fsdp"):
        check(composed("stage.adapter.name=qlora", "init_from=x", "trainer=fsdp", "stage.micro_batch_size=1"))


@pytest.mark.parametrize(
    "missing, message", [("peft", "stage.adapter needs peft"), ("bitsandbytes", "stage.adapter.name=qlora needs bits")]
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, missing: str, message: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    bnb._linear_class.cache_clear()
    with pytest.raises(ValueError, match=f"{message}.*pip install 'nb_lightning"):
        adapted(AdapterConfig("qlora"), base_weights())
