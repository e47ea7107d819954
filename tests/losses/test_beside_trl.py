"""Our losses against TRL's own code on the same model and the same batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nb_lightning.batch import IGNORE, PreferenceBatch, RolloutBatch, pack_responses
from nb_lightning.losses import dpd, grpo
from nb_lightning.losses.divergence import Divergence, TeacherOutputs
from tests.losses.pairs_harness import pack_pairs, random_pairs

pytest.importorskip("trl")
# transformers and TRL warn about themselves.
pytestmark = [pytest.mark.runs, pytest.mark.filterwarnings("ignore")]
V, EOS = 31, 1
LENGTHS = [(3, 5, 2), (2, 1, 7), (4, 3, 1), (6, 4, 9)]
BETA = 0.3


def llama(width: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=EOS, pad_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).float().eval()


def pairs() -> list[tuple[list[int], ...]]:
    """Token ids from 4 up, responses ended by EOS as TRL ends them."""
    drawn = [[[4 + token % (V - 4) for token in part] for part in pair] for pair in random_pairs(LENGTHS)]
    return [(prompt, [*chosen, EOS], [*rejected, EOS]) for prompt, chosen, rejected in drawn]


def states(model: Any, batch: PreferenceBatch) -> Tensor:
    """[1, T, D] hidden states of our packed documents, one document at a time."""
    edges = batch.cu_seqlens.tolist()
    documents = [batch.input_ids[:, a:b] for a, b in pairwise(edges)]
    return torch.cat([model.model(document).last_hidden_state for document in documents], 1)


def padded_logits(hidden: Tensor, head_weight: Tensor, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Logits [S, L, V] and labels [S, L] of the packed documents as TRL has them: padded rows."""
    lengths = batch.cu_seqlens.diff().tolist()
    logits = torch.nn.utils.rnn.pad_sequence((hidden @ head_weight.T)[0].split(lengths), batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(batch.labels[0].split(lengths), batch_first=True, padding_value=IGNORE)
    return logits, labels


# Distillation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind, beta", [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5), ("jsd", 0.2)])
def test_distillation_equals_trls_gkd_loss(kind: str, beta: float, temperature: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = llama(16, 0), llama(24, 1)
    batch = pack_pairs(pairs())
    with torch.no_grad():
        hidden, of_teacher = states(student, batch), states(teacher, batch)
    hidden.requires_grad_()
    weights = (0.6, 0.4)
    loss, _ = dpd.dpd_loss(
        hidden, student.lm_head.weight, batch, batch.counts, TeacherOutputs(of_teacher[0], teacher.lm_head.weight),
        dpo_weight=0, lambda_plus=weights[0], lambda_minus=weights[1],
        divergence=Divergence(kind, beta or 0.5, temperature),
    )  # fmt: skip
    logits, labels = padded_logits(hidden, student.lm_head.weight, batch)
    teacher_logits, _ = padded_logits(of_teacher, teacher.lm_head.weight, batch)
    expected = sum(
        w * GKDTrainer.generalized_jsd_loss(
            logits[side::2], teacher_logits[side::2], labels[side::2], beta=beta, temperature=temperature
        )
        for side, w in enumerate(weights)
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    inputs = (hidden, student.lm_head.weight)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


# DPO ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """TRL's DPOTrainer over our pairs, whose policy is not its reference."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    names = ["<bos>", "<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(4, V))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")

    def text(ids: list[int]) -> str:
        return " ".join(names[i] for i in ids if i != EOS)  # TRL adds it

    columns = {
        name: [text(pair[i]) + (" " if i == 0 else "") for pair in pairs()]
        for i, name in enumerate(("prompt", "chosen", "rejected"))
    }
    folder: Path = tmp_path_factory.mktemp("trl")
    yield DPOTrainer(
        model=llama(16, 0), ref_model=llama(16, 1), train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        args=DPOConfig(
            output_dir=str(folder), per_device_train_batch_size=len(LENGTHS), beta=BETA, report_to="none", use_cpu=True,
            bf16=False, gradient_checkpointing=False, seed=0,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("variant", dpd.DPO_VARIANTS)
def test_dpo_equals_trls_dpo_trainer(trainer: Any, variant: str) -> None:
    policy, reference = llama(16, 0), llama(16, 1)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(LENGTHS))])
    trainer.loss_types = [variant]
    expected = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    (of_head,) = torch.autograd.grad(expected, trainer.model.lm_head.weight)

    batch = pack_pairs(pairs())
    with torch.no_grad():
        batch.ref_logprobs = dpd.response_logprobs(states(reference, batch), reference.lm_head.weight, batch)
    loss, sums = dpd.dpd_loss(
        states(policy, batch), policy.lm_head.weight, batch, batch.counts, beta=BETA, variant=variant
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, policy.lm_head.weight)[0], of_head, atol=1e-5, rtol=1e-4)
    metrics = {
        name: values[-1] for name, values in trainer._metrics["train" if trainer.model.training else "eval"].items()
    }
    for ours, theirs in (
        ("chosen_reward", "rewards/chosen"), ("rejected_reward", "rewards/rejected"), ("margin", "rewards/margins"),
        ("accuracy", "rewards/accuracies"),
    ):  # fmt: skip
        assert sums[ours].item() / len(LENGTHS) == pytest.approx(metrics[theirs], rel=1e-4, abs=1e-6), ours


# GRPO ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss_type, normalisation", [("bnpo", "token"), ("dapo", "token"), ("grpo", "sequence"), ("dr_grpo", "constant")]
)
@pytest.mark.parametrize("kl_weight", [0.0, 0.2])
def test_grpo_equals_trls_grpo_trainer(loss_type: str, normalisation: str, kl_weight: float) -> None:
    """TRL's loss function itself, with a stand-in for its trainer that hands it our log-probabilities."""
    from trl import GRPOTrainer

    generator = torch.Generator().manual_seed(0)
    lengths, longest, D = [5, 2, 7, 1], 8, 6
    packed, index = pack_responses(
        [[4, 5]] * 4, [torch.randint(0, V, (n,), generator=generator).tolist() for n in lengths]
    )
    hidden = torch.randn(1, index.numel(), D, generator=generator).requires_grad_()
    head_weight = torch.randn(V, D, generator=generator).requires_grad_()

    def noise() -> Tensor:
        return torch.randn(index.shape, generator=generator) / 4

    logprobs = (hidden @ head_weight.T).log_softmax(-1)[0]
    logprobs = logprobs.gather(1, packed["labels"].clamp(min=0).T).T  # [1, T]
    batch = RolloutBatch(
        **packed, completion_index=index, advantages=torch.tensor([1.0, -0.5, 0.3, -1.2]),
        old_logprobs=logprobs.detach() + noise(), ref_logprobs=logprobs.detach() + noise(),
    )  # fmt: skip

    def padded(values: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([values[index == i] for i in range(4)], batch_first=True)

    mask = padded(torch.ones_like(logprobs))
    metrics: dict[str, Any] = {"train": defaultdict(list)}
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded(logprobs), mask, None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=kl_weight, loss_type=loss_type, epsilon_low=0.1, epsilon_high=0.3,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        use_vllm=False, vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1,
        max_completion_length=longest, _entropy_bonus_enabled=False, _metrics=metrics,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, **_: x, gather=lambda x: x),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(4, 2), "prompt_mask": torch.ones(4, 2), "completion_ids": mask,
        "completion_mask": mask, "advantages": batch.advantages, "old_per_token_logps": padded(batch.old_logprobs),
        "ref_per_token_logps": padded(batch.ref_logprobs), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    expected = GRPOTrainer._compute_loss(stand_in, None, inputs)
    loss, sums = grpo.grpo_loss(
        hidden, head_weight, batch, batch.counts, clip_low=0.1, clip_high=0.3,
        normalisation=normalisation, max_tokens=longest, kl_weight=kl_weight,
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, head_weight)), torch.autograd.grad(expected, (hidden, head_weight))
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert sums["clipped_low"] / batch.counts["tokens"] == pytest.approx(metrics["train"]["clip_ratio/low_mean"][0])
    assert sums["clipped_high"] / batch.counts["tokens"] == pytest.approx(metrics["train"]["clip_ratio/high_mean"][0])
    assert sums["clipped_low"] > 0 and sums["clipped_high"] > 0
