"""The stage inside a real Trainer: schedule at every step, skipped steps, held-out perplexity, other settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from callbacks.context_extension import ContextExtension
from callbacks.fg_wsd import FGWSD
from data.pretrain import PretrainData
from nb_lightning.batch import PackedBatch
from nb_lightning.config.compose import plan_of
from nb_lightning.stages.next_token import NextTokenStage
from tests.config.harness import composed
from tests.harness import TINY, TRACE, read_trace, run_train

pytestmark = pytest.mark.runs


def fit(
    corpus: Path, root: Path, kind: type[NextTokenStage], *callbacks: pl.Callback, **options: Any
) -> NextTokenStage:
    cfg = composed(*TINY, f"paths.root={root}", f"paths.data_root={corpus}")
    plan = plan_of(cfg.stage).in_whole_steps()
    module, data = kind(cfg, plan), PretrainData(cfg, plan)
    data.open_sources()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[FGWSD(), ContextExtension(), *callbacks],
        **{"limit_val_batches": 0, **options},
    )
    trainer.fit(module, datamodule=data)
    return module


def test_everything_moves_at_the_same_step(corpus: Path, tmp_path: Path) -> None:
    run_train(corpus, tmp_path, *TRACE)
    trace = read_trace(tmp_path / "runs/pretrain")
    lr, theta, shape = ([trace[step][key] for step in range(20)] for key in ("lr", "rope_theta", "shape"))
    assert lr[:6] == pytest.approx([2e-3 * n / 6 for n in range(1, 7)], rel=1e-12)
    assert lr[5:16] == [2e-3] * 11
    assert lr[16:] == pytest.approx([2e-3 + (1e-5 - 2e-3) * n / 4 for n in range(1, 5)], rel=1e-12)
    assert lr[19] == 1e-5
    assert theta == [1e4] * 16 + [1e5] * 4
    assert shape == [[8, 32]] * 16 + [[2, 128]] * 4
    assert [trace[step]["tokens_seen"] for step in range(20)] == [512 * n for n in range(1, 21)]


class Poisoned(NextTokenStage):
    """The loss of the 4th and 9th step is not a number."""

    def nll(self, batch: PackedBatch) -> Tensor:
        nll = super().nll(batch)
        return nll * float("nan") if self.tokens_seen in (3 * 512, 8 * 512) else nll


class Weights(pl.Callback):
    def __init__(self) -> None:
        self.after: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: NextTokenStage, *_: Any) -> None:
        self.after.append(module.model.embedding.weight.detach().clone())


def test_a_step_that_is_not_finite_is_skipped_and_counted(corpus: Path, tmp_path: Path) -> None:
    weights = Weights()
    module = fit(corpus, tmp_path, Poisoned, weights)
    assert module.skipped_steps == 2 and module.tokens_seen == 20 * 512
    for step in range(1, 20):
        unchanged = torch.equal(weights.after[step], weights.after[step - 1])
        assert unchanged == (step in (3, 8))
    assert torch.isfinite(weights.after[-1]).all()


def test_held_out_perplexity_is_exp_of_the_mean_over_all_held_out_tokens(corpus: Path, tmp_path: Path) -> None:
    module = fit(corpus, tmp_path, NextTokenStage, limit_val_batches=1.0)
    module.model.eval()
    for name, loader in zip(module.trainer.datamodule.val_names, module.trainer.datamodule.val_dataloader()):
        nll, tokens = 0.0, 0
        for batch in loader:
            logits = module.model(batch.input_ids, batch.position_ids, batch.cu_seqlens).double()
            logprobs = logits.log_softmax(-1).gather(-1, batch.labels.unsqueeze(-1))
            nll -= float(logprobs.detach().sum())
            tokens += batch.labels.numel()
        assert tokens == 4 * 32
        seen = float(module.trainer.callback_metrics[f"val/perplexity/{name}"])
        assert seen == pytest.approx(math.exp(nll / tokens), rel=1e-5)


@pytest.mark.parametrize(
    "override",
    [
        "stage.optim.name=adamw8bit",
        "trainer.precision=bf16-mixed",
        "trainer.precision=bf16-true",
        "data.mask_documents=false",
        "model.tie_embeddings=true",
    ],
)
def test_other_settings_train_too(corpus: Path, tmp_path: Path, override: str) -> None:
    run_train(corpus, tmp_path, *TRACE, override)
    losses = [float.fromhex(line["loss"]) for line in read_trace(tmp_path / "runs/pretrain").values()]
    assert len(losses) == 20 and losses[15] < losses[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("override", ["trainer.compile=true", "trainer.activation_checkpointing=true"])
def test_compiled_or_recomputed_layers_give_the_same_losses(corpus: Path, tmp_path: Path, override: str) -> None:
    traces = []
    for name, extra in (("plain", []), ("other", [override])):
        run_train(corpus, tmp_path, *TRACE, f"run_name={name}", *extra)
        traces.append(read_trace(tmp_path / f"runs/{name}"))
    for step in range(20):
        plain, other = (float.fromhex(trace[step]["loss"]) for trace in traces)
        assert other == pytest.approx(plain, rel=1e-4)


def test_what_a_run_leaves_in_its_folder(corpus: Path, tmp_path: Path) -> None:
    sample = "callbacks.samples={_target_: callbacks.samples.TextSample, prompt: 'The ', max_new_tokens: 5}"
    run_train(corpus, tmp_path, sample, "callbacks.plots={_target_: callbacks.plots.Plots}")
    run = tmp_path / "runs/pretrain"
    for name in ("plan.png", "curves.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert (run / "samples.txt").read_text().count("=== end of ") == 4
    assert list((run / "tensorboard").rglob("events*")) and (run / "config.yaml").is_file()
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["finished"] and manifest["tokens_seen"] == 20 * 512
    assert manifest["starts"][0]["versions"]["torch"] == torch.__version__
    assert [phase["name"] for phase in manifest["plan"]] == list(composed(*TINY).stage.phases)
    assert set(manifest["data"]) == {"docs", "code", "tests", "arithmetic"}
    boundaries = sorted(path.name.partition("-end-of-")[2] for path in (run / "checkpoints").glob("*-end-of-*"))
    assert boundaries == sorted(composed(*TINY).stage.phases)
