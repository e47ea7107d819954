"""`train.py stage=dpd` from end to end, and the stage's numbers against naive ones."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nb_lightning.batch import IGNORE, PreferenceBatch
from nb_lightning.checkpoints.folders import CheckpointWeights
from nb_lightning.checkpoints.pretrained import load_pretrained
from nb_lightning.config.schema import DIVERGENCES, DPO_VARIANTS
from nb_lightning.losses import dpd, segments
from nb_lightning.losses.divergence import KINDS
from nb_lightning.model.transformer import Transformer
from nb_lightning.stages.dpd import REFERENCE, DPDStage
from nb_lightning.stages.reference_cache import StaleCache
from tests.dpd_harness import (
    POLICY,
    TEACHER,
    TRACE,
    loss_curve,
    make,
    opened,
    overrides,
    random_model,
    run_dpd,
    run_here,
    save_model,
)
from tests.harness import ROOT, curve, environment, logged, read_trace

pytestmark = pytest.mark.runs

KD_AND_DPO = ("stage.lambda_plus=0.5", "stage.lambda_minus=0.25", "stage.dpo_weight=2", "stage.beta=0.3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def unbroken(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_here(made, tmp_path_factory.mktemp("unbroken"), *TRACE)


# What is computed ---------------------------------------------------------------------------------------------------


def naive(policy: Transformer, reference: Transformer, teacher: Transformer, batches: list[PreferenceBatch]) -> Any:
    """DPO loss, margins, and divergences of both sides: one response after the other, nothing packed, float64."""
    models = [m.double() for m in (policy, reference, teacher)]
    losses, margins, kl = [], [], ([], [])
    for batch in batches:
        sides: dict[int, list[Tensor]] = {}
        for a, b in pairwise(batch.cu_seqlens.tolist()):
            ids, labels, index = (x.flatten()[a:b] for x in (batch.input_ids, batch.labels, batch.response_index))
            kept = labels != IGNORE
            if not kept.any():
                continue
            response = int(index[kept][0])
            pi, ref, taught = (m(ids[None])[0][kept].log_softmax(-1) for m in models)
            of_label = [x.gather(1, labels[kept][:, None]).sum() for x in (pi, ref)]
            sides.setdefault(response // 2, []).append(of_label[0] - of_label[1])
            kl[response % 2].append((taught.exp() * (taught - pi)).sum(1))
        for chosen, rejected in sides.values():
            margins.append(0.3 * (chosen - rejected))
            losses.append(-F.logsigmoid(margins[-1]))
    return torch.stack(losses).mean(), torch.stack(margins), [torch.cat(x).mean() for x in kl]


def test_the_first_and_a_later_loss_and_the_validation_equal_naive_ones(made: Path, tmp_path: Path) -> None:
    run = run_here(made, tmp_path, *TRACE, *KD_AND_DPO, "trainer.save_every_n_steps=1", "trainer.keep_last=9")
    data = opened(made, tmp_path / "data")
    start, teacher = (load_pretrained(str(made / name)).model for name in ("policy", "teacher"))
    for step in (0, 5):
        policy = Transformer(POLICY)
        saved = CheckpointWeights(run / f"checkpoints/step-{step:08d}") if step else None
        for name, p in policy.named_parameters():
            p.data.copy_(saved.read(name) if saved else start.get_parameter(name))
        dpo, margins, (plus, minus) = naive(policy, start, teacher, data.steps()[step].micro_batches)
        row = logged(run)[step]
        assert row["train/dpo"] == pytest.approx(dpo.item(), rel=1e-4)
        assert row["train/margin"] == pytest.approx(margins.mean().item(), rel=1e-3, abs=1e-6)
        assert row["train/accuracy"] == pytest.approx((margins > 1e-9).double().mean().item())
        assert row["train/chosen_divergence"] == pytest.approx(plus.item(), rel=1e-4)
        assert row["train/rejected_divergence"] == pytest.approx(minus.item(), rel=1e-4)
        assert row["train/loss"] == pytest.approx((2 * dpo + 0.5 * plus + 0.25 * minus).item(), rel=1e-4)
        assert row["train/pairs"] == len(margins)
    policy = Transformer(POLICY)
    last = CheckpointWeights(run / "checkpoints/step-00000008-end-of-distillation")
    for name, p in policy.named_parameters():
        p.data.copy_(last.read(name))
    for name in ("tasks", "words"):
        held_out = data.held_out(name)
        dpo, margins, (plus, minus) = naive(policy, start, teacher, [held_out[i] for i in range(len(held_out))])
        expected = {"dpo": dpo, "margin": margins.mean(), "accuracy": (margins > 0).double().mean()}
        expected |= {"chosen_divergence": plus, "rejected_divergence": minus}
        for key, value in expected.items():
            assert curve(run, f"val/{key}/{name}")[-1] == pytest.approx(value.item(), rel=1e-3), (key, name)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("stage.lambda_plus=0", "stage.lambda_minus=0", "stage.teacher=null"),
        ("stage.dpo_weight=0",),
        ("stage.head_chunk=16",),  # pairs are longer than a chunk
        ("trainer.precision=bf16-mixed", "trainer.activation_checkpointing=true"),
        ("stage.adapter.name=lora", "stage.adapter.dropout=0.5"),
    ],
    ids=str,
)
def test_before_the_first_step_every_margin_is_exactly_zero(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """Of every pair when it is first drawn, to the last bit, when nothing is learnt meanwhile."""
    seen: set[int] = set()
    zero: list[float] = []
    real = segments.segment_sum

    def watched(self: DPDStage, batch: PreferenceBatch, counts: Any) -> Any:
        new = [place for place, pair in enumerate(batch.pair_ids.tolist()) if pair not in seen]
        seen.update(batch.pair_ids.tolist())
        sums: list[Tensor] = []

        def segment_sum(values: Tensor, index: Tensor, segments: int) -> Tensor:
            out = real(values, index, segments)
            if segments == 2 * batch.pairs and values.numel() == batch.labels.numel():
                sums.append(out.detach().view(-1, 2))
            return out

        with monkeypatch.context() as m:
            m.setattr(dpd, "segment_sum", segment_sum)
            out = loss(self, batch, counts)
        difference = sums[-1] - self.reference[batch.pair_ids]
        zero.extend(difference[new].flatten().tolist())
        return out

    loss = DPDStage.loss
    monkeypatch.setattr(DPDStage, "loss", watched)
    still = ("stage.phases.distillation.lr={start: 0.0, end: null}", "callbacks.phase_validation=null")
    run = run_here(made, tmp_path, *more, *still)
    assert len(seen) > 40 and zero == [0.0] * len(zero)
    assert curve(run, "train/margin")[0] == curve(run, "train/chosen_reward")[0] == 0.0
    assert curve(run, "train/accuracy")[0] == 0.0


def test_it_learns_and_logs_every_term(unbroken: Path) -> None:
    assert loss_curve(unbroken)[-1] < 0.7 * loss_curve(unbroken)[0]
    for side in ("chosen", "rejected"):
        divergence = curve(unbroken, f"train/{side}_divergence")
        assert len(divergence) == 8 and divergence[-1] < divergence[0]
        assert min(curve(unbroken, f"train/{side}_tokens")) > 0
    assert curve(unbroken, "train/margin")[0] == 0.0 and curve(unbroken, "train/dpo")[0] == pytest.approx(0.693147)
    assert {key for row in logged(unbroken) for key in row} >= {f"train/{name}" for name in dpd.DPD_PER}
    manifest = json.loads((unbroken / "manifest.json").read_text())
    assert manifest["finished"] and manifest["skipped_steps"] == 0


def test_the_teacher_is_no_part_of_what_is_saved(unbroken: Path) -> None:
    last = sorted((unbroken / "checkpoints").iterdir())[-1]
    state = torch.load(last / "state", weights_only=True)["state_dict"]
    assert state.keys() == {f"model.{name}" for name in random_model(POLICY, 0).state_dict()}
    assert load_pretrained(str(unbroken)).model.shape.d_model == POLICY.d_model


# However the steps are cut up ---------------------------------------------------------------------------------------


def test_accumulation_changes_nothing(made: Path, tmp_path: Path, unbroken: Path) -> None:
    run = run_here(made, tmp_path, *TRACE, "stage.micro_batch_size=1")
    assert loss_curve(run) == pytest.approx(loss_curve(unbroken), rel=1e-4)
    assert curve(run, "train/margin") == pytest.approx(curve(unbroken, "train/margin"), rel=1e-3, abs=1e-5)
    assert curve(run, "train/margin")[0] == 0.0


def test_resumed_to_the_last_bit_with_the_reference_as_it_was(made: Path, tmp_path: Path, unbroken: Path) -> None:
    run = tmp_path / "runs/dpd"
    shutil.copytree(unbroken, run)
    for path in (run / "checkpoints").iterdir():
        if path.name > "step-00000003":
            shutil.rmtree(path)
    written = (run / REFERENCE).stat().st_mtime_ns
    (run / "trace.jsonl").unlink()
    run_here(made, tmp_path, *TRACE, "resume=true", "init_from=null")
    whole = read_trace(unbroken)
    assert read_trace(run) == {step: whole[step] for step in range(3, 8)}
    assert (run / REFERENCE).stat().st_mtime_ns == written


def torchrun(made: Path, root: Path, *more: str) -> Path:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    words = (*TRACE, "trainer.devices=2", "stage.micro_batch_size=1", *more)
    command += [str(ROOT / "train.py"), *overrides(made, root, *words)]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return root / "runs/dpd"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes(made: Path, tmp_path: Path, unbroken: Path, strategy: str) -> None:
    run = torchrun(made, tmp_path, f"trainer.strategy={strategy}")
    assert loss_curve(run, 0) == loss_curve(run, 1) == pytest.approx(loss_curve(unbroken), rel=1e-4)
    for name in ("train/margin", "val/margin/tasks", "val/accuracy/words", "val/chosen_divergence/words"):
        assert curve(run, name) == pytest.approx(curve(unbroken, name), rel=1e-3, abs=1e-5), name
    assert curve(run, "train/margin")[0] == 0.0


@pytest.mark.slow
def test_stopped_in_a_process_and_resumed(made: Path, tmp_path: Path, unbroken: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *overrides(made, tmp_path, *TRACE, "data.workers=2")]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    trace = tmp_path / "runs/dpd/trace.jsonl"
    while process.poll() is None and not (trace.exists() and trace.read_text().count("\n") > 2):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    run_dpd(made, tmp_path, *TRACE, "resume=true")
    assert read_trace(tmp_path / "runs/dpd") == read_trace(unbroken)


# Knobs --------------------------------------------------------------------------------------------------------------


def test_a_teacher_in_four_bits(made: Path, tmp_path: Path, unbroken: Path) -> None:
    run = run_here(made, tmp_path, *TRACE, "stage.teacher_nf4=true", "stage.phases.distillation.tokens=512")
    (first,) = curve(run, "train/chosen_divergence")
    assert first == pytest.approx(curve(unbroken, "train/chosen_divergence")[0], rel=0.2)
    assert first != curve(unbroken, "train/chosen_divergence")[0]


@pytest.mark.parametrize("more", [("stage.divergence=reverse_kl", "stage.variant=ipo", "stage.beta=0.5"),
                                  ("stage.divergence=jsd", "stage.temperature=2", "stage.variant=hinge")])  # fmt: skip
def test_other_divergences_and_variants_learn(made: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    curve = loss_curve(run_here(made, tmp_path, *TRACE, *more))
    assert curve[-1] < curve[0] and all(value == value for value in curve)


def test_the_config_knows_what_the_losses_know() -> None:
    assert (DPO_VARIANTS, DIVERGENCES) == (dpd.DPO_VARIANTS, KINDS)


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, error",
    [
        (["stage.teacher=null"], "stage.lambda_plus and lambda_minus weigh distances to a teacher: name it with"),
        (["init_from=null"], "stage=dpd needs init_from: the model it begins with, after SFT, is its reference"),
        (["stage.beta=0"], "stage.beta is 0.0; it must be positive"),
        (["stage.variant=simpo"], "stage.variant is 'simpo'; allowed: sigmoid, hinge, ipo"),
        (["stage.divergence=kl"], "stage.divergence is 'kl'; allowed: forward_kl, reverse_kl, jsd"),
        (["stage.lambda_minus=-1"], "stage.lambda_minus is -1.0; it must be finite and not negative"),
        (["stage.dpo_weight=0", "stage.lambda_plus=0", "stage.lambda_minus=0"], "stage.dpo_weight, lambda_plus"),
        (["stage.variant=ipo", "stage.label_smoothing=0.1"], "stage.label_smoothing is 0.1; it must be"),
        (["stage.jsd_beta=1"], "stage.jsd_beta is 1.0; it must lie between 0 and 1"),
        (["stage.temperature=0"], "stage.temperature is 0.0; it must be a positive number"),
        (["stage.teacher=nowhere"], "stage.teacher=nowhere: no checkpoint at 'nowhere'"),
        (["stage.teacher_nf4=true", "trainer.strategy=fsdp"], "stage.teacher_nf4=true does not work with"),
        (["resume=true", "init_from=null"], "there is nothing to resume, and stage=dpd needs init_from to begin"),
    ],
)  # fmt: skip
def test_mistakes_are_named(made: Path, tmp_path: Path, more: list[str], error: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(error)):
        run_here(made, tmp_path, *more)


def test_a_teacher_with_another_vocabulary_is_refused_before_training(made: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    wider = save_model(random_model(POLICY.__class__(**{**vars(TEACHER), "vocab_size": 300}), 0), tmp_path / "wider")
    with pytest.raises(ValueError, match="another vocabulary: the teacher's head has 300 tokens"):
        run_here(made, tmp_path, f"stage.teacher={wider}")
    other = save_model(random_model(TEACHER, 0), tmp_path / "other")
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    text = tokenizer.to_str().replace('"<|pad|>"', '"<|fill|>"')
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"'<\|fill\|>' is token 259 of the teacher's tokenizer and no token of"):
        run_here(made, tmp_path, f"stage.teacher={other}")
    assert not (tmp_path / "runs/dpd/checkpoints").exists()


@pytest.fixture
def half(unbroken: Path, tmp_path: Path) -> Iterator[Path]:
    """A run that stopped after three steps."""
    run = tmp_path / "runs/dpd"
    shutil.copytree(unbroken, run)
    for path in (run / "checkpoints").iterdir():
        if path.name > "step-00000003":
            shutil.rmtree(path)
    yield run


def test_a_stale_reference_is_refused(made: Path, tmp_path: Path, half: Path) -> None:
    shutil.rmtree(half / "checkpoints")  # begin again, with other weights
    other = save_model(random_model(POLICY, 7), tmp_path / "policy")
    with pytest.raises(StaleCache, match="computed with another model than this run has; delete the file"):
        run_here(made, tmp_path, f"init_from={other}")


def test_what_a_resumed_run_must_have(made: Path, tmp_path: Path, half: Path) -> None:
    other = save_model(random_model(TEACHER, 7), tmp_path / "teacher")
    with pytest.raises(ValueError, match="teacher is not the teacher that this run was trained with so far"):
        run_here(made, tmp_path, "resume=true", f"stage.teacher={other}")
    kept = (half / REFERENCE).read_bytes()
    (half / REFERENCE).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(StaleCache, match="its numbers are not those that were written"):
        run_here(made, tmp_path, "resume=true")
    (half / REFERENCE).unlink()
    with pytest.raises(ValueError, match="is gone, or lacks pairs that this plan draws"):
        run_here(made, tmp_path, "resume=true")
