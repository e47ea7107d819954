"""`train.py stage=reward_model` from end to end: what is compared, the loss against a naive one, and that it learns."""

from __future__ import annotations

import json
import re
import shutil
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data.reward import RewardData
from nb_lightning.batch import IGNORE, PackedBatch
from nb_lightning.checkpoints.folders import read_info
from nb_lightning.checkpoints.pretrained import load_pretrained
from nb_lightning.config.schema import REWARD_LOSSES
from nb_lightning.losses.pairwise import REWARD_LOSSES as LOSSES_OF_THE_LIBRARY
from nb_lightning.model.transformer import Transformer
from nb_lightning.text.chat_tokens import ChatTokenizer
from tests.dpd_harness import make, trained
from tests.harness import curve, read_trace
from tests.reward_harness import TRACE, opened, run_here, run_two

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def unbroken(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_here(made, tmp_path_factory.mktemp("unbroken"), *TRACE)


@pytest.fixture(scope="module")
def data(made: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardData:
    return opened(made, tmp_path_factory.mktemp("data"))


def losses_of(run: Path, rank: int | None = None) -> list[float]:
    trace = read_trace(run, rank)
    return [float.fromhex(trace[step]["loss"]) for step in sorted(trace)]


def comparisons(batch: PackedBatch) -> list[tuple[list[int], int]]:
    """(tokens, answer) of each, from the fields of the batch alone."""
    found = []
    flat = [x.flatten().tolist() for x in (batch.input_ids, batch.labels, batch.position_ids)]
    for a, b in pairwise(batch.cu_seqlens.tolist()):
        ids, labels, positions = (x[a:b] for x in flat)
        assert positions == list(range(b - a))
        if set(labels) != {IGNORE}:  # else the end of a row
            assert set(labels[:-1]) == {IGNORE}  # nothing but the answer, after the last token
            found.append((ids, labels[-1]))
    return found


def test_both_orders_of_every_pair_and_only_the_answer_is_trained(made: Path, data: RewardData) -> None:
    chat = ChatTokenizer(data.tokenizer, data.chat)
    a, b = (chat.tokenizer.tokenizer.token_to_id(answer) for answer in "AB")
    written: dict[tuple[int, ...], int] = {}
    for line in (made / "tasks.jsonl").read_text().splitlines():
        pair = json.loads(line)
        messages = [{"role": "user", "content": pair["prompt"]}]
        ended = "rejected_finish" not in pair
        chosen, rejected = (
            chat.answered(messages, pair["chosen"]).ids,
            chat.answered(messages, pair["rejected"], ended).ids,
        )
        written |= {(*chosen, *rejected): a, (*rejected, *chosen): b}
    seen: dict[tuple[int, ...], int] = {}
    for source in (data.packed["tasks"], data.packed_val["tasks"]):
        for nth in range(source.packings[192].n_rows):
            found = comparisons(data.assemble([(source, nth)], 192))
            assert found
            assert not seen.keys() & {tuple(ids) for ids, _ in found}  # each once a pass
            seen |= {tuple(ids): answer for ids, answer in found}
    assert seen == written and len(seen) == 100


def naive(model: Transformer, batches: list[PackedBatch], answers: tuple[int, int]) -> tuple[Any, Any]:
    """-log sigmoid of the margin and accuracy: one comparison after the other, float64."""
    margins = []
    for batch in batches:
        for ids, answer in comparisons(batch):
            logits = model.double()(torch.tensor([ids]))[0, -1]
            wrong = answers[1 - answers.index(answer)]
            margins.append(logits[answer] - logits[wrong])
    found = torch.stack(margins)
    return -F.logsigmoid(found).mean(), (found > 0).double().mean()


def test_the_first_loss_and_the_validation_equal_naive_ones(made: Path, data: RewardData, unbroken: Path) -> None:
    answers = data.form.answers
    loss, accuracy = naive(load_pretrained(str(made / "policy")).model, data.steps()[0].micro_batches, answers)
    assert losses_of(unbroken)[0] == pytest.approx(loss.item(), rel=1e-4)
    assert curve(unbroken, "train/accuracy")[0] == pytest.approx(accuracy.item())
    model = load_pretrained(str(unbroken)).model
    for name in ("tasks", "words"):
        held_out = data.held_out(name)
        loss, accuracy = naive(model, [held_out[i] for i in range(len(held_out))], answers)
        assert curve(unbroken, f"val/loss/{name}")[-1] == pytest.approx(loss.item(), rel=1e-3)
        assert curve(unbroken, f"val/accuracy/{name}")[-1] == pytest.approx(accuracy.item())


@pytest.mark.parametrize("loss", REWARD_LOSSES)
def test_it_learns_an_easy_rule(made: Path, tmp_path: Path, loss: str) -> None:
    """Every rejected response ends in "!": known of prompts that it never saw."""
    more = ("stage.phases.comparisons.tokens=76800", f"stage.loss={loss}", "trainer.val_every_n_steps=1000")
    run = run_here(made, tmp_path, *more)
    assert curve(run, "val/accuracy/tasks")[-1] > 0.95 and curve(run, "val/accuracy/words")[-1] > 0.95
    assert curve(run, "train/loss")[-1] < 0.2 * curve(run, "train/loss")[0]


def test_accumulation_changes_nothing(made: Path, tmp_path: Path, unbroken: Path) -> None:
    run = run_here(made, tmp_path, *TRACE, "stage.micro_batch_size=1")
    assert losses_of(run) == pytest.approx(losses_of(unbroken), rel=1e-4)


def test_resumed_to_the_last_bit(made: Path, tmp_path: Path, unbroken: Path) -> None:
    run = tmp_path / "runs/reward_model"
    shutil.copytree(unbroken, run)
    for path in (run / "checkpoints").iterdir():
        if path.name > "step-00000003":
            shutil.rmtree(path)
    (run / "trace.jsonl").unlink()
    run_here(made, tmp_path, *TRACE, "resume=true", "init_from=null")
    whole = read_trace(unbroken)
    assert read_trace(run) == {step: whole[step] for step in range(3, 8)}
    assert trained(run).digest("head.weight") == trained(unbroken).digest("head.weight")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes(made: Path, tmp_path: Path, unbroken: Path, strategy: str) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    run = run_two(made, tmp_path, strategy, port)
    assert losses_of(run, 0) == losses_of(run, 1) == pytest.approx(losses_of(unbroken), rel=1e-4)
    for name in ("train/accuracy", "val/loss/tasks", "val/accuracy/words"):
        assert curve(run, name) == pytest.approx(curve(unbroken, name), rel=1e-3, abs=1e-5), name


def test_a_checkpoint_says_how_comparisons_are_written(data: RewardData, unbroken: Path) -> None:
    last = sorted((unbroken / "checkpoints").iterdir())[-1]
    assert read_info(last)["comparison"] == {"answers": list(data.form.answers), "digest": data.form.digest}


def test_the_config_knows_what_the_losses_know() -> None:
    assert REWARD_LOSSES == LOSSES_OF_THE_LIBRARY


@pytest.mark.parametrize(
    "more, error",
    [
        (["stage.loss=hinge"], "stage.loss is 'hinge'; allowed: bradley_terry, cross_entropy"),
        (
            ["data.tasks=[x.jsonl]"],
            "data.tasks are answered, and a reward model only compares answers; set data.tasks=[]",
        ),
        (["stage.phases.comparisons.seq_len=24"], "data.sources.tasks: "),
    ],
)
def test_mistakes_are_named(made: Path, tmp_path: Path, more: list[str], error: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(error)):
        run_here(made, tmp_path, *more)
