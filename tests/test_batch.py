"""`PackedBatch.from_rows` against a token-by-token construction, and what moves with a batch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from nb_lightning.batch import IGNORE, PackedBatch, StepBatch, pack_responses
from tests.losses.pairs_harness import pack_pairs

EOS = 9


def by_hand(rows: list[list[int]]) -> tuple[list[list[int]], list[list[int]], list[list[int]], list[int]]:
    """Inputs, labels, positions and document boundaries, one token at a time."""
    inputs, labels, positions, boundaries = [], [], [], []
    flat = 0
    for row in rows:
        inputs.append([])
        labels.append([])
        positions.append([])
        position = 0
        for t in range(len(row) - 1):
            if position == 0:
                boundaries.append(flat)
            inputs[-1].append(row[t])
            labels[-1].append(row[t + 1])
            positions[-1].append(position)
            position = 0 if row[t] == EOS else position + 1
            flat += 1
    return inputs, labels, positions, [*boundaries, flat]


def check(rows: list[list[int]]) -> None:
    batch = PackedBatch.from_rows(torch.tensor(rows), EOS)
    inputs, labels, positions, boundaries = by_hand(rows)
    assert batch.input_ids.tolist() == inputs
    assert batch.labels.tolist() == labels
    assert batch.position_ids.tolist() == positions
    assert batch.cu_seqlens.tolist() == boundaries


@pytest.mark.parametrize("seed", range(25))
def test_random_rows_are_split_as_token_by_token(seed: int) -> None:
    rng = random.Random(seed)
    B, T = rng.randint(1, 4), rng.randint(1, 12)
    check([[rng.choice([1, 2, 3, EOS]) for _ in range(T + 1)] for _ in range(B)])


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2, EOS, 3, 4, 5]],  # a document boundary inside
        [[1, 2, 3, 4, EOS, 5]],  # EOS is the last input: the row ends and so does the document
        [[1, 2, 3, 4, 5, EOS]],  # EOS is only the last label
        [[EOS, 1, 2, 3, 4, 5]],  # the end of a document begun in an earlier row
        [[1, EOS, EOS, EOS, 2, 3]],  # consecutive: documents of one token
        [[EOS, EOS, EOS], [EOS, EOS, EOS]],
        [[1, 2, 3], [4, 5, 6]],  # no EOS: a new row is a new document all the same
        [[1, 2, EOS, 3], [4, EOS, 5, 6]],
    ],
)
def test_documents_at_the_edges_of_rows_are_split_as_token_by_token(rows: list[list[int]]) -> None:
    check(rows)


def test_two_rows_are_split_as_written_out_here() -> None:
    batch = PackedBatch.from_rows(torch.tensor([[1, EOS, 2, 3, EOS, 4], [5, 6, EOS, EOS, 7, 8]]), EOS)
    assert batch.input_ids.tolist() == [[1, EOS, 2, 3, EOS], [5, 6, EOS, EOS, 7]]
    assert batch.labels.tolist() == [[EOS, 2, 3, EOS, 4], [6, EOS, EOS, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 8, 9, 10]


def test_fields_have_their_dtypes_and_are_contiguous() -> None:
    batch = PackedBatch.from_rows(torch.tensor([[1, EOS, 2, 3], [4, 5, 6, 7]]), EOS)
    assert (batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype) == (torch.int64,) * 3
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.input_ids.is_contiguous() and batch.labels.is_contiguous()


def test_without_eos_id_a_row_is_one_document() -> None:
    batch = PackedBatch.from_rows(torch.tensor([[1, EOS, 2, 3]]), None)
    assert (batch.input_ids.tolist(), batch.labels.tolist()) == ([[1, EOS, 2]], [[EOS, 2, 3]])
    assert batch.position_ids is None and batch.cu_seqlens is None


def test_labels_may_be_changed_without_changing_the_inputs() -> None:
    batch = PackedBatch.from_rows(torch.tensor([[1, 2, 3, 4]]), EOS)
    batch.labels.fill_(IGNORE)
    assert batch.input_ids.tolist() == [[1, 2, 3]]


def test_counts_are_of_what_is_not_ignored() -> None:
    batch = PackedBatch.from_rows(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), EOS)
    batch.labels[0, :2] = IGNORE
    assert batch.counts["tokens"].item() == 4
    assert batch.counts["tokens"].shape == () and batch.counts["tokens"].dtype == torch.int64


# Moving -------------------------------------------------------------------------------------------------------------


def step_batch() -> StepBatch:
    packed = PackedBatch.from_rows(torch.tensor([[1, EOS, 2, 3]]), EOS)
    plain = PackedBatch.from_rows(torch.tensor([[1, EOS, 2, 3]]), None)
    return StepBatch([packed, plain], tokens=6, sample_ids=torch.tensor([4, 5]))


def tensors(batch: StepBatch) -> list[Tensor]:
    packed, plain = batch.micro_batches
    inside = [packed.input_ids, packed.labels, packed.position_ids, packed.cu_seqlens, plain.input_ids, plain.labels]
    return [*inside, batch.sample_ids]


def check_rest(batch: StepBatch) -> None:
    """What is no tensor came along."""
    assert isinstance(batch, StepBatch) and batch.tokens == 6
    assert batch.micro_batches[1].position_ids is None and batch.micro_batches[1].cu_seqlens is None


def test_to_a_device_reaches_every_tensor_and_leaves_the_original() -> None:
    batch = step_batch()
    moved = batch.to("meta")
    assert {x.device.type for x in tensors(moved)} == {"meta"}
    assert {x.device.type for x in tensors(batch)} == {"cpu"}
    check_rest(moved)


def test_to_a_dtype_reaches_every_tensor() -> None:
    moved = step_batch().to(torch.int16)
    assert {x.dtype for x in tensors(moved)} == {torch.int16}
    assert [x.tolist() for x in tensors(moved)] == [x.tolist() for x in tensors(step_batch())]


def test_lightning_moves_it_whole() -> None:
    from lightning.fabric.utilities import move_data_to_device

    moved = move_data_to_device(step_batch(), torch.device("meta"))
    assert {x.device.type for x in tensors(moved)} == {"meta"}
    check_rest(moved)


def test_the_data_loader_pins_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x + 1000)  # pinning needs a GPU: leave a mark instead
    pinned = pin_memory(step_batch())
    assert [x.tolist() for x in tensors(pinned)] == [(x + 1000).tolist() for x in tensors(step_batch())]
    check_rest(pinned)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pinned_memory_is_pinned() -> None:
    assert all(x.is_pinned() for x in tensors(step_batch().pin_memory()))


# Packed prompts and responses ---------------------------------------------------------------------------------------


def test_packed_responses_equal_numbers_by_hand() -> None:
    """The first response token is predicted by the last prompt token, the last token is read by nothing."""
    packed, index = pack_responses([[1, 2], [3], [4], [5, 6]], [[7, 8], [], [9], []])
    batch = PackedBatch(**packed)
    assert batch.input_ids.tolist() == [[1, 2, 7, 3, 4, 5]]
    assert batch.labels.tolist() == [[IGNORE, 7, 8, IGNORE, 9, IGNORE]]
    assert index.tolist() == [[-1, 0, 0, -1, 2, -1]] and index.dtype == torch.int32
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 0]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 5, 6] and batch.cu_seqlens.dtype == torch.int32
    assert batch.counts["tokens"] == 3


def test_pairs_are_packed_side_by_side_and_counted() -> None:
    batch = pack_pairs([([1], [2, 3], [4]), ([5], [], [6, 7])], ref_logprobs=torch.zeros(2, 2))
    assert batch.response_index.tolist() == [[0, 0, 1, -1, 3, 3]]
    assert batch.labels.tolist() == [[2, 3, 4, IGNORE, 6, 7]]
    assert batch.counts == {"pairs": 2, "chosen_tokens": 2, "rejected_tokens": 3}
    moved = batch.to(torch.device("meta"))
    assert moved.response_index.is_meta and moved.ref_logprobs.is_meta and moved.pairs == 2
