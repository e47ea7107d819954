"""The running batch: rows come and go, and none of them notices."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace

import pytest
import torch

from nb_lightning.generation import decoder as module
from nb_lightning.generation.decoder import Completion, Decoder, Request, generate, stream
from nb_lightning.model.transformer import Transformer
from tests.generation.harness import PROMPT_LENGTHS, SAMPLED, collect, model_of, prompts, run_all


@pytest.fixture(scope="module")
def model() -> Transformer:
    return model_of()


def test_rows_join_while_others_run(model: Transformer) -> None:
    alone = generate(model, prompts(), SAMPLED, [[4, i] for i in range(8)])
    decoder = Decoder(model, max_batch=4)
    completions: dict[Hashable, Completion] = {}
    waiting = list(enumerate(prompts()))
    while waiting or decoder.busy:
        if waiting:
            i, prompt = waiting.pop(0)
            decoder.add(i, prompt, SAMPLED, [4, i])
        for _ in range(5):
            collect(decoder, completions)
    assert [completions[i].ids for i in range(8)] == [completion.ids for completion in alone]


def test_finished_rows_leave_and_no_forward_is_wasted(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    real = Transformer.forward

    def forward(self: Transformer, ids: torch.Tensor, *args: object, **kwargs: object) -> object:
        shapes.append(tuple(ids.shape))
        return real(self, ids, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", forward)
    asked = prompts()
    completions = generate(model, [*asked, asked[4], asked[4]], SAMPLED, seeds=2)
    lengths = [len(completion.ids) for completion in completions]
    assert shapes[0] == (1, sum(PROMPT_LENGTHS))  # the three equal prompts were run once
    assert shapes[1:] == [(sum(n > step for n in lengths), 1) for step in range(1, max(lengths))]


def test_waiting_prompts_are_run_together_up_to_a_limit(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = module.Prefill
    monkeypatch.setattr(
        module, "Prefill", lambda cache, backend, cu, slots: sizes.append(len(slots)) or real(cache, backend, cu, slots)
    )
    decoder = Decoder(model, prefill_tokens=20)
    for i, prompt in enumerate(prompts()):
        decoder.add(i, prompt, SAMPLED, [4, i])
    completions = run_all(decoder)
    assert sizes == [3, 1, 1, 2, 1]  # 3 + 11 + 1, 7, 30 (alone, though too long), 2 + 5, 19
    alone = generate(model, prompts(), SAMPLED, [[4, i] for i in range(8)])
    assert [completions[i].ids for i in range(8)] == [completion.ids for completion in alone]


def test_a_stream_is_read_little_by_little(model: Transformer) -> None:
    """Of all that is read, one batch runs and one waits (six, and one of them has just finished)."""
    read = 0

    def requests() -> Iterator[Request]:
        nonlocal read
        for i in range(40):
            read += 1
            yield Request(i, [1 + i], replace(SAMPLED, max_new_tokens=8), [4, i])

    completions, most = {}, 0
    for key, completion in stream(model, requests(), max_batch=3):
        assert completion.finish_reason
        completions[key] = completion
        most = max(most, read - len(completions))
    assert most == 5 and sorted(completions) == list(range(40)) and list(completions) != sorted(completions)
    alone = generate(
        model, [[1 + i] for i in range(40)], replace(SAMPLED, max_new_tokens=8), [[4, i] for i in range(40)]
    )
    assert [completions[i].ids for i in range(40)] == [completion.ids for completion in alone]


def test_cancel(model: Transformer) -> None:
    alone = generate(model, prompts(), SAMPLED, [[4, i] for i in range(8)])
    decoder = Decoder(model, max_batch=4)
    for i, prompt in enumerate(prompts()):
        decoder.add(i, prompt, SAMPLED, [4, i])
    completions: dict[Hashable, Completion] = {}
    for _ in range(3):
        collect(decoder, completions)
    for key in (0, 3, 6, "nobody"):  # the first, the last of those that run, one that waits
        decoder.cancel(key)
    before = {key: len(completions[key].ids) for key in (0, 3)}
    while decoder.busy:
        collect(decoder, completions)
    assert {key: len(completions[key].ids) for key in (0, 3)} == before and 6 not in completions
    assert all(completions[i].ids == alone[i].ids for i in (1, 2, 4, 5, 7))
    assert decoder.step() == []
