"""Pairs under the plan: whole pairs in a row, each once a pass, by their number, and resumable at any step."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from data.bin_packing import pack_pairs
from data.preference import PairSource, PreferenceData
from data.prepare.make import prepare
from data.prepare.settings import ChatSettings, SourceSettings
from data.steps import StepLoader
from nb_lightning.batch import IGNORE, PreferenceBatch, StepBatch
from tests.dpd_harness import make, opened
from tests.sft_harness import write_chats


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def data(made: Path) -> PreferenceData:
    return opened(made, made)


def responses_of(batch: PreferenceBatch, data: PreferenceData) -> dict[int, tuple[str, list[str]]]:
    """pair -> (its prompt, [chosen, rejected]) as texts, from the fields of the batch alone."""
    found: dict[int, tuple[str, list[str]]] = {}
    flat = [x.flatten().tolist() for x in (batch.input_ids, batch.labels, batch.response_index, batch.position_ids)]
    for a, b in pairwise(batch.cu_seqlens.tolist()):
        ids, labels, index, positions = (x[a:b] for x in flat)
        assert positions == list(range(b - a))
        trained = [t for t, label in enumerate(labels) if label != IGNORE]
        assert all((index[t] >= 0) == (t in trained) for t in range(b - a))
        if not trained:
            continue
        (response,) = {index[t] for t in trained}
        assert trained == list(range(trained[0], b - a))  # to the end: what comes after it is left away
        prompt = data.tokenizer.decode(ids[: trained[0] + 1])
        pair = int(batch.pair_ids[response // 2])
        before, texts = found.setdefault(pair, (prompt, []))
        assert before == prompt and len(texts) == response % 2
        texts.append(data.tokenizer.decode([labels[t] for t in trained]))
    assert len(found) == batch.pairs == len(batch.pair_ids)
    return found


def test_a_batch_holds_the_pairs_that_were_written(made: Path, data: PreferenceData) -> None:
    written = {}
    for name in ("tasks", "words"):
        for line in (made / f"{name}.jsonl").read_text().splitlines():
            pair = json.loads(line)
            end = "" if pair.get("rejected_finish") else "<|im_end|>"
            prompt = f"<|im_start|>user\n{pair['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            written[prompt] = [f"{pair['chosen']}<|im_end|>", f"{pair['rejected']}{end}"]
    seen = {}
    for step in range(len(data.steps())):
        for micro in data.steps()[step].micro_batches:
            for pair, (prompt, texts) in responses_of(micro, data).items():
                assert texts == written[prompt]
                assert seen.setdefault(pair, prompt) == prompt
    assert len(set(seen.values())) == len(seen) > 40


def test_ids_count_over_all_sources_held_out_pairs_included(data: PreferenceData) -> None:
    sources = [source for name in data.train for source in (data.packed[name], data.packed_val[name])]
    ranges = [range(source.first_id, source.first_id + len(source)) for source in sources]
    assert [number for some in ranges for number in some] == list(range(data.n_pairs))
    assert data.n_pairs == 70
    drawn = np.concatenate([pairs for _, pairs in data.new_pairs()])
    assert len(set(drawn.tolist())) == len(drawn)
    batches = [micro for step in range(len(data.steps())) for micro in data.steps()[step].micro_batches]
    assert set(drawn.tolist()) == {pair for batch in batches for pair in batch.pair_ids.tolist()}
    first = {pair: step for step, pairs in data.new_pairs() for pair in pairs.tolist()}
    for step in range(len(data.steps())):
        for micro in data.steps()[step].micro_batches:
            assert all(first[pair] <= step for pair in micro.pair_ids.tolist())
    held_out = [data.held_out(name)[i].pair_ids for name in data.val_names for i in range(len(data.held_out(name)))]
    assert torch.cat(held_out).tolist() == data.validated_pairs().tolist()


def test_a_pass_has_every_pair_once(data: PreferenceData) -> None:
    for source in data.packed.values():
        for seq_len, packing in source.packings.items():
            for repeat in range(2):
                rows = [source.pairs_in_row(repeat * packing.n_rows + n, seq_len) for n in range(packing.n_rows)]
                assert sorted(np.concatenate(rows).tolist()) == list(range(len(source)))


@pytest.mark.parametrize("seed", range(5))
def test_packing_of_pairs(seed: int) -> None:
    rng = random.Random(seed)
    samples = np.array([[rng.randint(2, 60), 1] for _ in range(200)])
    packing = pack_pairs(samples, 64, seed)
    kept = []
    for r in range(packing.n_rows):
        pairs = packing.pieces.sample[packing.members[packing.starts[r] : packing.starts[r + 1]]]
        assert sum(samples[2 * p + side, 0] - 1 for p in pairs for side in range(2)) <= 64
        kept += pairs.tolist()
    fits = [p for p in range(100) if samples[2 * p, 0] + samples[2 * p + 1, 0] - 2 <= 64]
    assert sorted(kept) == fits and packing.pieces.dropped == 100 - len(fits) > 0


def fields(steps: list[StepBatch]) -> list[list[list[int]]]:
    names = ("input_ids", "labels", "position_ids", "cu_seqlens", "response_index", "pair_ids")
    return [[getattr(micro, n).flatten().tolist() for n in names] for step in steps for micro in step.micro_batches]


@pytest.mark.runs
def test_resume_anywhere_with_any_workers_and_world_size(made: Path, data: PreferenceData) -> None:
    whole = [data.steps()[step] for step in range(len(data.steps()))]
    again = opened(made, made)
    for start, workers in ((0, 0), (5, 2)):
        assert fields(list(StepLoader(again.steps(), start, num_workers=workers))) == fields(whole[start:])
    ranks = [opened(made, made, "stage.micro_batch_size=1").steps(rank, 2) for rank in range(2)]
    for step, one in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        ids = torch.cat([micro.pair_ids for share in shares for micro in share.micro_batches])
        assert torch.equal(ids, torch.cat([micro.pair_ids for micro in one.micro_batches]))
    assert again.pairs_digest == data.pairs_digest and again.digests == data.digests


def test_held_out_rows_and_batches_that_count_nothing(data: PreferenceData) -> None:
    held_out = data.held_out("words")
    silent = held_out[len(held_out)]
    assert silent.input_ids.shape == held_out[0].input_ids.shape and silent.pairs == len(silent.pair_ids) == 0
    assert {name: int(count) for name, count in silent.counts.items()} == dict.fromkeys(silent.counts, 0)
    assert bool((silent.labels == IGNORE).all()) and bool((silent.response_index == -1).all())
    assert all(int(count) > 0 for count in held_out[0].counts.values())


@pytest.mark.runs
def test_a_row_of_pairs_is_not_for_sft_nor_others_for_dpd(made: Path, corpus: Path, tmp_path: Path) -> None:
    write_chats(tmp_path / "chats.jsonl", "x", 20)
    settings = SourceSettings("bytes", val_fraction=0.3, chat=ChatSettings())
    prepare([tmp_path / "chats.jsonl"], str(tmp_path / "chats"), settings, progress=False)
    for more, error in (
        (
            f"data.sources.words={tmp_path}/chats",
            "words: .* holds conversations; data.prepare --pairs makes pref",
        ),
        (f"data.sources.words={corpus}/demo/docs", "words: .* holds documents; data.prepare --pairs makes pref"),
        (f"data.template={__file__}", "was prepared with another chat template than .*test_preference.py"),
        ("stage.phases.distillation.seq_len=32", "tasks: .* has no pair for a row of 32 tokens; raise seq_len$"),
        ("data.mask_documents=false", "data.mask_documents=false: .*; stage=dpd needs true"),
    ):
        with pytest.raises(ValueError, match=error):
            opened(made, tmp_path, more)


def test_rows_of_sources_are_whole_pairs(data: PreferenceData) -> None:
    source: PairSource = data.packed["words"]
    row = source.row(0, 128)
    assert len(row) == 2 * len(source.pairs_in_row(0, 128)) and sum(len(marked) - 1 for marked in row) <= 128
