"""What goes wrong outside the program: one clear line, an exit code that says so, and nothing half-written."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from nb_lightning.checkpoints import folders
from tests.harness import Train, command, environment, run_train

pytestmark = pytest.mark.runs


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("error: "))


def test_missing_data(train: Train, tmp_path: Path) -> None:
    error = error_of(train(f"paths.data_root={tmp_path}/nowhere", check=False))
    assert "no tokenized data at" in error and "docs/train/source.json is missing" in error


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("harm, words", [("flip", "is damaged (its SHA-256 differs"), ("truncate", "bytes, not")])
def test_damaged_chunk_is_named_and_not_trained_on(
    corpus: Path, tmp_path: Path, workers: int, harm: str, words: str
) -> None:
    root = tmp_path / "data"
    shutil.copytree(corpus, root)
    for chunk in (root / "demo/code/train").glob("chunk-*.bin"):
        content = bytearray(chunk.read_bytes())
        if harm == "flip":
            content[-100] ^= 4
        chunk.write_bytes(content if harm == "flip" else content[:-7])
    error = error_of(run_train(root, tmp_path, f"data.workers={workers}", check=False))
    assert "demo/code/train/chunk-0-" in error and words in error
    assert not folders.all_checkpoints(tmp_path / "runs/pretrain")


def test_source_of_another_tokenizer(corpus: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(corpus, root)
    path = root / "demo/docs/train/source.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": "another"}))
    assert "was tokenized with another tokenizer" in error_of(run_train(root, tmp_path, check=False))


def test_vocabulary_larger_than_the_model(train: Train) -> None:
    assert "but model.vocab_size is 100" in error_of(train("model.vocab_size=100", check=False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_fsdp_without_a_gpu(train: Train) -> None:
    error = error_of(train("trainer=fsdp", "trainer.devices=1", check=False))
    assert "trainer.accelerator=cuda, but torch sees no GPU here" in error


def test_xformers_without_a_gpu(train: Train) -> None:
    assert "trainer.attention=xformers needs a CUDA device" in error_of(
        train("trainer.attention=xformers", check=False)
    )


def test_a_loss_that_is_not_finite_never_reaches_the_weights(train: Train, tmp_path: Path) -> None:
    error = error_of(train("model.init_std=1e30", "stage.optim.max_skipped_steps=7", check=False))
    assert "7 optimizer steps in a row were not finite" in error and "phase diversity_enriched_stable" in error
    saved = folders.all_checkpoints(tmp_path / "runs/pretrain")
    assert saved  # one at step 5, one at the boundary: as whole and as finite as the weights at the start
    for folder in saved:
        weights = torch.load(folder / folders.STATE, weights_only=True)["state_dict"]
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_full_disk_leaves_the_earlier_checkpoints_whole(corpus: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write fails in the middle, as it does there."""
    run_train(corpus, tmp_path, "run_name=room")
    size = (tmp_path / "runs/room/checkpoints/step-00000006-end-of-warmup/state").stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, size - 1000))

    done = subprocess.run(
        command(corpus, tmp_path), cwd=tmp_path, env=environment(), capture_output=True, text=True, preexec_fn=limit
    )
    error = error_of(done)
    assert "could not save" in error and "step-00000005" in error and "resume=true" in error
    assert not list((tmp_path / "runs/pretrain/checkpoints").iterdir())


def test_no_room_for_the_checkpoints_is_said_before_training(train: Train) -> None:
    error = error_of(train("model.vocab_size=2000000000", check=False))  # no disk holds this one
    assert "GB free; the checkpoints of this run need about" in error


def test_init_from_takes_the_weights_of_another_run(train: Train, tmp_path: Path) -> None:
    train("run_name=first")
    first = folders.all_checkpoints(tmp_path / "runs/first")[-1]
    train("run_name=second", f"init_from={tmp_path}/runs/first", "trainer.save_every_n_steps=1", "trainer.keep_last=99",
          "stage.phases.warmup.lr.end=0")  # fmt: skip
    weights = [torch.load(folder / "state", weights_only=True)["state_dict"]
               for folder in (first, folders.all_checkpoints(tmp_path / "runs/second")[0])]  # fmt: skip
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("run_name=b init_from=nowhere", "init_from=nowhere is not there"),
        (
            "run_name=b init_from={run} model.d_mlp=48",
            "model.d_mlp is 48, but init_from={run} has 64",
        ),
        (
            "run_name=b init_from={run} model.n_layers=1",
            "model.n_layers is 1, but init_from={run} has 2",
        ),
        ("init_from={run}", "holds a run already"),
        (
            "run_name=b ckpt_path={run} stage.phases.warmup.mixture.docs=0.2 stage.phases.warmup.mixture.tests=0.3",
            "stage.phases.warmup.mixture is {'docs': 0.2, 'code': 0.5, 'tests': 0.3}, "
            "but the checkpoint's 10240 tokens were trained with {'docs': 0.3, 'code': 0.5, 'tests': 0.2}",
        ),
        ("run_name=b ckpt_path={run} model.d_mlp=48", "model.d_mlp is 48, but "),
        ("run_name=b ckpt_path={run} seed=5", "seed is 5, but "),
        (
            "run_name=b ckpt_path={run} data.sources.docs=${paths.data_root}/demo/code",
            "data.sources.docs holds other data",
        ),
    ],
)
def test_starting_points_that_do_not_fit(finished: Path, corpus: Path, overrides: str, words: str) -> None:
    chosen = overrides.replace("{run}", str(finished / "runs/pretrain")).split()
    words = words.replace("{run}", str(finished / "runs/pretrain"))
    assert words in error_of(run_train(corpus, finished, *chosen, check=False))


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    run_train(corpus, root)
    return root


def test_a_decay_can_grow_from_a_stable_checkpoint(finished: Path, corpus: Path) -> None:
    """Another run continues the first one's boundary checkpoint, optimizer and all, into a decay of its own."""
    boundary = next((finished / "runs/pretrain/checkpoints").glob("*end-of-high_quality_stable"))
    run_train(corpus, finished, f"ckpt_path={boundary}", "run_name=branch", "stage.phases.decay.lr.shape=cosine")
    names = [path.name for path in folders.all_checkpoints(finished / "runs/branch")]
    assert names == ["step-00000020-end-of-decay"]
