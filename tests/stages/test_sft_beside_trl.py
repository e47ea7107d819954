"""The loss curve of SFT beside TRL's SFTTrainer: same samples, weights and optimizer; packed here, padded there."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks.fg_wsd import FGWSD
from nb_lightning.batch import PackedBatch, StepBatch, pack_responses
from nb_lightning.checkpoints.hf_weights import to_hf
from nb_lightning.phases import LearningRate, Phase, PhasePlan
from nb_lightning.stages.next_token import NextTokenStage
from tests.config.harness import composed

STEPS, SAMPLES_A_STEP, LR, VOCAB = 20, 4, 1e-3, 260
MODEL = dict(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_mlp=64)


def samples() -> list[tuple[list[int], list[int]]]:
    """Prompts and completions of ragged lengths, some of one token."""
    rng = random.Random(0)
    ids = lambda n: [rng.randrange(VOCAB) for _ in range(n)]  # noqa: E731
    return [(ids(rng.randint(1, 20)), ids(rng.choice((1, 3, 17, 40)))) for _ in range(STEPS * SAMPLES_A_STEP)]


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.seen: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, module: NextTokenStage) -> None:
        self.weights = {name: p.detach().clone() for name, p in module.model.named_parameters()}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(outputs["train/loss"]))


def ours(groups: list[list[tuple[list[int], list[int]]]]) -> Losses:
    """Each step's samples in two micro-batches, packed."""
    steps = []
    for group in groups:
        halves = [group[: len(group) // 2], group[len(group) // 2 :]]
        micro_batches = [PackedBatch(**pack_responses(*zip(*half))[0]) for half in halves]
        steps.append(StepBatch(micro_batches, 512, torch.arange(len(group))))
    phase = Phase("all", STEPS * 512, LearningRate(LR), {"a": 1.0}, 512, 10_000.0, 512, 1)
    cfg = composed(
        "stage=sft",
        *(f"model.{key}={value}" for key, value in MODEL.items()),
        "stage.optim.betas=[0.9,0.999]",
        "stage.optim.weight_decay=0.0",
    )
    losses = Losses()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[FGWSD(), losses],
    )  # fmt: skip
    trainer.fit(NextTokenStage(cfg, PhasePlan((phase,))), DataLoader(steps, batch_size=None))
    return losses


def trl(folder: Path, flat: list[tuple[list[int], list[int]]], weights: dict[str, torch.Tensor]) -> list[float]:
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer

    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=False, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, attn_implementation="sdpa",
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict({to_hf(name): weight for name, weight in weights.items()})
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
    seen: list[float] = []

    class Recording(SFTTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            seen.append(float(loss))
            return loss

    rows = [{"input_ids": q + c, "completion_mask": [0] * len(q) + [1] * len(c)} for q, c in flat]
    settings = SFTConfig(
        output_dir=str(folder), packing=False, max_length=None, completion_only_loss=True, learning_rate=LR,
        per_device_train_batch_size=SAMPLES_A_STEP, max_steps=STEPS, lr_scheduler_type="constant", max_grad_norm=1.0,
        weight_decay=0.0, bf16=False, use_cpu=True, gradient_checkpointing=False, logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Recording(model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return seen


@pytest.mark.slow
def test_the_same_twenty_losses(tmp_path: Path) -> None:
    flat = samples()
    mine = ours([flat[i : i + SAMPLES_A_STEP] for i in range(0, len(flat), SAMPLES_A_STEP)])
    theirs = trl(tmp_path, flat, mine.weights)
    assert len(mine.seen) == len(theirs) == STEPS
    assert mine.seen == pytest.approx(theirs, abs=1e-4)
    assert mine.seen[-1] < mine.seen[0] - 0.01  # they moved
