"""Packed rows under the plan: every sample once a pass, one integer of state, the loss of samples as if alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from data.bin_packing import assemble_batch
from data.mixture import RowOrder
from data.sft import SFTData
from data.steps import StepLoader
from nb_lightning.batch import IGNORE, PackedBatch, StepBatch
from nb_lightning.config.compose import plan_of
from nb_lightning.losses.head import cross_entropy
from nb_lightning.model.transformer import ModelShape, Transformer
from nb_lightning.phases import LearningRate, Phase, PhasePlan
from nb_lightning.token_source import TRAINED
from tests.config.harness import composed
from tests.sft_harness import make_sources, overrides


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("chats"))


def opened(chats: Path, *more: str) -> SFTData:
    cfg = composed(*overrides(chats, chats / "out", *more))
    data = SFTData(cfg, plan_of(cfg.stage).in_whole_steps())
    data.open_sources()
    return data


@pytest.fixture(scope="module")
def data(chats: Path) -> SFTData:
    return opened(chats)


def everything(batch: PackedBatch) -> list[list[int]]:
    assert batch.position_ids is not None and batch.cu_seqlens is not None
    return [t.flatten().tolist() for t in (batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens)]


def micro_batches(steps: list[StepBatch]) -> list[list[list[int]]]:
    return [everything(micro) for step in steps for micro in step.micro_batches]


def samples_of(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of each document of a batch."""
    bounds = batch.cu_seqlens.tolist()
    inputs, labels = batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist()
    return [(inputs[a:b], labels[a:b]) for a, b in pairwise(bounds)]


# Which rows come ------------------------------------------------------------------------------------------------------

SIZES = {("a", 16): 16 * 10, ("b", 16): 16 * 7, ("a", 32): 32 * 4, ("c", 32): 32 * 3}


def plan(*phases: tuple[int, dict[str, float], int]) -> PhasePlan:
    made = [
        Phase(f"p{i}", steps * 64, LearningRate(1e-3), mixture, seq_len, 1e4, 64, 1)
        for i, (steps, mixture, seq_len) in enumerate(phases)
    ]
    return PhasePlan(tuple(made))


def test_every_row_once_a_pass_and_on_from_phase_to_phase() -> None:
    """A phase goes on in a source where the last one of its context length stopped; each length is a stream."""
    parts = plan((5, {"a": 0.5, "b": 0.5}, 16), (3, {"a": 0.5, "c": 0.5}, 32), (10, {"a": 0.25, "b": 0.75}, 16))
    order = RowOrder(parts, SIZES, seed=3)
    rows = [order.locate(i) for i in range(order.total_rows)]
    for stream in SIZES:
        numbers = [row.start // row.seq_len for row in rows if (row.source, row.seq_len) == stream]
        assert sorted(numbers) == list(range(len(numbers))), stream
        taken = [row.start // row.seq_len for row in rows[: 5 * 4] if (row.source, row.seq_len) == stream]
        assert sorted(taken) == list(range(len(taken)))  # phase 0 has the first of them
    assert order.consumed(parts.total_tokens) == {"a": 16 * 20 + 32 * 3, "b": 16 * 40, "c": 32 * 3}
    repeats = order.repeats(parts.total_tokens)
    assert repeats == pytest.approx({"a": 20 / 10 + 3 / 4, "b": 40 / 7, "c": 1.0})


def test_a_pass_has_every_sample_once(data: SFTData) -> None:
    for name, source in data.packed.items():
        for seq_len, packing in source.packings.items():
            passes = []
            for repeat in range(2):
                rows = [source.row(repeat * packing.n_rows + n, seq_len) for n in range(packing.n_rows)]
                passes.append([marked.tolist() for row in rows for marked in row])
            whole = []
            ends = source.ends.tolist()
            for a, b in zip([0, *ends], ends):
                marked = source.source.read_on(a, b - a).tolist()
                if len(marked) - 1 <= seq_len:
                    whole.append(marked)
            assert sorted(passes[0]) == sorted(passes[1]) == sorted(whole), name
            assert passes[0] != passes[1]  # in another order
            assert len(whole) + packing.pieces.dropped == len(ends)


def test_the_mixture_is_exact_at_every_row(data: SFTData) -> None:
    order = data.order
    within: Counter[str] = Counter()
    for i in range(order.total_rows):
        row = order.locate(i)
        phase = data.plan.phases[row.phase]
        if i and order.locate(i - 1).phase != row.phase:
            within.clear()
        within[row.source] += 1
        n = sum(within.values())
        assert all(abs(within[name] - weight * n) < 1 for name, weight in phase.mixture.items())
        assert row.seq_len == phase.seq_len


# One integer ----------------------------------------------------------------------------------------------------------


@pytest.mark.runs
def test_resume_anywhere_with_any_workers_and_world_size(chats: Path, data: SFTData) -> None:
    whole = [data.steps()[step] for step in range(len(data.steps()))]
    again = opened(chats)
    assert micro_batches(list(StepLoader(again.steps(), 0))) == micro_batches(whole)
    for start, workers in ((5, 0), (6, 2), (11, 2)):
        assert micro_batches(list(StepLoader(again.steps(), start, num_workers=workers))) == micro_batches(
            whole[start:]
        )
    shared = opened(chats, "stage.micro_batch_size=1", "stage.phases.overall.micro_batch_size=1")
    ranks = [shared.steps(rank, 2) for rank in range(2)]
    for step, one in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        assert torch.cat([share.sample_ids for share in shares]).tolist() == one.sample_ids.tolist()
        rows = torch.cat([micro.input_ids for share in shares for micro in share.micro_batches])
        assert torch.equal(rows, torch.cat([micro.input_ids for micro in one.micro_batches]))
    other = opened(chats, "seed=1")
    assert micro_batches([other.steps()[0]]) != micro_batches(whole[:1])


def test_the_digest_knows_what_is_done_with_over_long_samples(chats: Path, data: SFTData) -> None:
    other = opened(chats, "data.over_long=truncate")
    assert all(other.digests[name] != digest for name, digest in data.digests.items())
    assert sum(p.pieces.dropped for s in other.packed.values() for p in s.packings.values()) == 0
    assert sum(p.pieces.cut for s in other.packed.values() for p in s.packings.values()) > 0


def test_split_samples_come_in_pieces_that_make_them_up(chats: Path) -> None:
    source = opened(chats, "data.over_long=split").packed["tools_calls"]
    packing = next(iter(source.packings.values()))
    cut = opened(chats, "data.over_long=split", "stage.phases.overall.seq_len=64").packed["tools_calls"]
    (seq_len, pieces) = next(iter(cut.packings.items()))
    assert seq_len == 64 and packing.pieces.cut == 0 < pieces.pieces.cut
    trained = Counter()
    for marked in (w for n in range(pieces.n_rows) for w in cut.row(n, 64)):
        trained.update(token for token in marked[1:].tolist() if token & TRAINED)
    expected = Counter()
    for marked in (w for n in range(packing.n_rows) for w in source.row(n, packing.seq_len)):
        expected.update(token for token in marked[1:].tolist() if token & TRAINED)
    assert trained == expected  # every trained token is some piece's label, once


# The loss -------------------------------------------------------------------------------------------------------------


def model() -> Transformer:
    made = Transformer(ModelShape(260, 32, 2, 2, 1, 16, 64, rope_theta=1e4))
    made.init_weights(0)
    return made.double()


def nll(net: Transformer, batch: PackedBatch) -> torch.Tensor:
    return net(
        batch.input_ids, batch.position_ids, batch.cu_seqlens, head=lambda h, w: cross_entropy(h, w, batch.labels)
    )


def test_packed_loss_is_the_mean_of_the_samples_alone(data: SFTData) -> None:
    net = model()
    for step in (0, 7):
        for micro in data.steps()[step].micro_batches:
            packed = nll(net, micro) / micro.counts["tokens"]
            packed.backward()
            gradients = [p.grad.clone() for p in net.parameters()]
            net.zero_grad()
            total, tokens = torch.zeros((), dtype=torch.float64), 0
            for inputs, labels in samples_of(micro):
                alone = PackedBatch(torch.tensor([inputs]), torch.tensor([labels]))
                if int(alone.counts["tokens"]):
                    total = total + nll(net, alone)
                    tokens += int(alone.counts["tokens"])
            (total / tokens).backward()
            assert tokens == int(micro.counts["tokens"])
            assert packed.item() == pytest.approx(total.item() / tokens, rel=1e-6)
            for ours, p in zip(gradients, net.parameters()):
                torch.testing.assert_close(ours, p.grad, rtol=1e-6, atol=1e-9)
            net.zero_grad()


def test_a_row_without_a_trained_token_counts_nothing() -> None:
    net = model()
    marked = np.arange(3, 23)
    trained = marked | np.where(np.arange(20) > 5, TRAINED, 0)
    silent = assemble_batch([[marked]], 19, pad_id=0)
    assert (silent.labels == IGNORE).all() and int(silent.counts["tokens"]) == 0
    loss = nll(net, silent)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.isnan().any() for p in net.parameters())
    net.zero_grad()
    both, one = assemble_batch([[marked], [trained]], 19, 0), assemble_batch([[trained]], 19, 0)
    assert nll(net, both).item() == pytest.approx(nll(net, one).item(), rel=1e-9)
    assert int(both.counts["tokens"]) == 14


def test_labels_are_exactly_the_answers(data: SFTData) -> None:
    tokenizer = data.tokenizer
    seen = 0
    for name, source in data.packed.items():
        for marked in source.row(0, next(iter(source.packings))):
            batch = assemble_batch([[marked]], len(marked) - 1, 0)
            labels = [label for label in batch.labels[0].tolist() if label != IGNORE]
            answers = tokenizer.decode(labels).split("<|im_end|>")
            assert answers.pop() == "" and all(answer.startswith(f"{name} ") for answer in answers)
            text = tokenizer.decode((marked & (TRAINED - 1)).tolist())
            parts = text.split("<|im_start|>assistant\n")[1:]
            assert answers == [part.split("<|im_end|>")[0] for part in parts]
            seen += len(answers)
    assert seen > 10


# Held out, and what does not fit --------------------------------------------------------------------------------------


def test_held_out_rows(data: SFTData) -> None:
    held_out = data.held_out("maths_sort")
    assert held_out.n_rows == 4 and len(held_out) == 1
    assert everything(held_out[0]) == everything(data.held_out("maths_sort")[0])
    assert int(held_out[1].counts["tokens"]) == 0 and held_out[1].input_ids.shape == held_out[0].input_ids.shape
    train = {tuple(inputs) for n in range(3) for m in data.steps()[n].micro_batches for inputs, _ in samples_of(m)}
    assert train.isdisjoint(tuple(i) for i, labels in samples_of(held_out[0]) if set(labels) != {IGNORE})


@pytest.mark.runs
def test_what_does_not_fit_is_named(chats: Path, corpus: Path) -> None:
    for more, error in (
        (["data.over_long=cut"], "data.over_long is 'cut'; allowed: drop, truncate, split"),
        (["data.mask_documents=false"], "data.mask_documents=false: samples in a row must not see one another"),
        (["data.template=nowhere.jinja"], "data.template=nowhere.jinja cannot be read"),
        ([f"data.template={__file__}"], "was prepared with another chat template than .*sft.py; prepare it"),
        (["stage.phases.overall.seq_len=16"], "no sample for a row of 16 tokens; raise seq_len, or set data.over"),
        (["data.sources.maths_sort=nowhere"], "no tokenized data at nowhere/train: .*source.json is missing"),
        ([f"data.sources.maths_sort={corpus}/demo/docs"], "holds documents; data.prepare --chat makes conversations"),
    ):
        with pytest.raises(ValueError, match=error):
            opened(chats, *more)


def test_the_report_tells_a_pass_and_what_is_left_out(chats: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        opened(chats)
    line = next(r.message for r in caplog.records if r.message.startswith("code_functions") and "of 128" in r.message)
    assert "over-long dropped" in line and "% full (one pass: " in line
