"""The teacher's most likely tokens kept beside the samples: against the teacher itself, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data import teacher_cache
from data.teacher_cache import TeacherCache
from data.teacher_logprobs import main
from nb_lightning.checkpoints.pretrained import load_pretrained
from nb_lightning.token_source import TRAINED, Source
from tests.dpd_harness import TEACHER, TRACE, loss_curve, make, opened, random_model, run_here, save_model
from tests.harness import curve

pytestmark = pytest.mark.runs

SOURCES = ("demo_pairs/tasks/source", "words")
CACHED = ("stage.teacher=null", "data.cached_teacher=true")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("pairs"))


def cached(pairs: Path, folder: Path, *more: str) -> Path:
    """A copy with what the teacher knows in it."""
    shutil.copytree(pairs, folder)
    for source in SOURCES:
        main(["--source", str(folder / source), "--teacher", str(folder / "teacher"), "--batch-tokens", "300", *more])
    return folder


@pytest.fixture(scope="module")
def whole(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached(pairs, tmp_path_factory.mktemp("whole") / "made", "--k", "260")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_token_has_its_most_likely_ones(pairs: Path, tmp_path: Path, temperature: float) -> None:
    made = cached(pairs, tmp_path / "made", "--k", "5", "--temperature", str(temperature))
    teacher = load_pretrained(str(pairs / "teacher")).model
    for split in ("train", "val"):
        source = Source(str(made / "words" / split))
        cache, samples = TeacherCache(source), source.samples()
        for sample, end in enumerate(np.cumsum(samples[:, 0])):
            length, first = samples[sample]
            marked = source.read_on(int(end - length), int(length))
            logits = teacher(torch.from_numpy(marked & (TRAINED - 1))[None])[0]
            expected = (logits[first - 1 : -1].detach().float() / temperature).log_softmax(-1).topk(5)
            records = cache.read(sample)
            assert records["ids"].tolist() == expected.indices.tolist()
            np.testing.assert_allclose(records["logprobs"], expected.values, atol=1e-5)


def test_with_all_tokens_it_is_the_teacher_itself(pairs: Path, whole: Path, tmp_path: Path) -> None:
    for more in ((), ("stage.divergence=jsd",)):
        name = f"run_name=run{len(more)}"
        by_teacher = run_here(pairs, tmp_path / "teacher", name, *more, *TRACE)
        by_cache = run_here(whole, tmp_path / "cache", name, *more, *CACHED, *TRACE)
        assert loss_curve(by_cache) == pytest.approx(loss_curve(by_teacher), rel=1e-3)
        for name in ("train/rejected_divergence", "val/chosen_divergence/words"):
            assert curve(by_cache, name) == pytest.approx(curve(by_teacher, name), rel=1e-3)


def test_fewer_tokens_are_a_lower_bound(pairs: Path, whole: Path, tmp_path: Path) -> None:
    few = cached(pairs, tmp_path / "made", "--k", "3")
    one_step = ("stage.phases.distillation.tokens=512", *CACHED)
    bound, full = (curve(run_here(made, tmp_path / made.name, *one_step, f"run_name={n}"), "train/chosen_divergence")
                   for n, made in (("few", few), ("full", whole)))  # fmt: skip
    assert 0 < bound[0] < full[0]


def test_stopped_it_goes_on_file_by_file(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "FILE_TOKENS", 20)
    made = cached(pairs, tmp_path / "made", "--k", "4")
    folder = made / "words/train"
    about = json.loads((folder / "teacher.json").read_text())
    assert len(about["files"]) > 3
    cut = {**about, "files": about["files"][:2]}
    (folder / "teacher.json").write_text(json.dumps(cut))
    with pytest.raises(ValueError, match=r"teacher.json is not whole; run python -m data.teacher_logprobs again"):
        opened(made, tmp_path, *CACHED)
    kept = (folder / about["files"][1]["name"]).stat().st_mtime_ns
    main(["--source", str(made / "words"), "--teacher", str(made / "teacher"), "--k", "4"])
    assert json.loads((folder / "teacher.json").read_text())["files"] == about["files"]
    assert (folder / about["files"][1]["name"]).stat().st_mtime_ns == kept
    step = opened(made, tmp_path, *CACHED).steps()[0].micro_batches[0]
    assert step.teacher_ids.shape == (*step.labels.shape, 4) == step.teacher_logprobs.shape


def test_what_does_not_fit_is_named(pairs: Path, whole: Path, tmp_path: Path) -> None:
    for made, more, error in (
        (
            pairs,
            CACHED,
            "data.sources.tasks .data.cached_teacher=true.: .* has no teacher.json; make it with python",
        ),
        (
            whole,
            (*CACHED, "stage.temperature=2"),
            "stage.temperature is 2.0, but the cached teacher .* asked at 1.0",
        ),
        (whole, CACHED[1:], "stage.teacher and data.cached_teacher=true are two teachers; choose one"),
    ):
        with pytest.raises(ValueError, match=error):
            opened(made, tmp_path, *more)
    damaged = tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    file = damaged / "words/train/teacher-000000.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    data = opened(damaged, tmp_path, *CACHED)
    with pytest.raises(ValueError, match=r"teacher-000000.npy is damaged: its SHA-256 differs from teacher.json"):
        [data.steps()[step] for step in range(4)]
    assert data.digests == opened(whole, tmp_path, *CACHED).digests != opened(pairs, tmp_path).digests
    other = save_model(random_model(TEACHER, 5), tmp_path / "other")
    source = ["--source", str(whole / "words"), "--teacher"]
    for arguments, error in (
        ([*source, str(other), "--k", "260"], "is of another teacher, name; replace it with --overwrite"),
        ([*source, str(whole / "teacher"), "--k", "5"], "is of another k; replace it"),
        ([*source, str(other), "--k", "261"], "--k is 261; the teacher has 260 tokens"),
        (["--source", "s3://x", "--teacher", str(other)], "--source s3://x is remote"),
    ):
        with pytest.raises(SystemExit, match=error):
            main(arguments)
