"""A run that begins with weights from elsewhere: a Hugging Face folder, a .gguf file."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nb_lightning.checkpoints import folders
from nb_lightning.checkpoints.gguf import save_gguf
from nb_lightning.checkpoints.gguf_tokenizer import tokenizer_to_gguf
from nb_lightning.checkpoints.hf_weights import to_hf
from nb_lightning.checkpoints.pretrained import find_origin, shape_at
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.config.checks import check
from nb_lightning.config.compose import compose, plan_of, register
from nb_lightning.config.schema import Config
from nb_lightning.stages.next_token import NextTokenStage
from nb_lightning.text.tokenizer import byte_tokenizer
from tests.checkpoints.harness import NANBEIGE, write
from tests.harness import ROOT, TRACE, Train, read_trace, run_train
from tests.stages.distributed_harness import losses, torchrun

pytestmark = pytest.mark.runs

# The shape that the harness gives the demo model.
SMALL = {
    **NANBEIGE, "vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64,
}  # fmt: skip
STILL = ("stage.phases.warmup.lr.end=0", "trainer.save_every_n_steps=1", "trainer.keep_last=99")  # step 1 moves nothing


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A Hugging Face folder in that shape, tied or not."""

    @functools.cache
    def made(tied: bool) -> Path:
        folder = tmp_path_factory.mktemp("models") / "small"
        write(folder, {**SMALL, "tie_word_embeddings": tied}, "20KB")
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        return folder

    return made


def assert_began_with(run: Path, origin: str) -> None:
    weights = find_origin(origin).open()
    began = folders.CheckpointWeights(folders.all_checkpoints(run)[0])
    for name in weights.stored:
        assert torch.equal(began.read(name), weights.read(name)), name


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_hugging_face_folder_then_the_run_it_began(
    train: Train, tmp_path: Path, small: Callable[[bool], Path], tied: bool
) -> None:
    folder, run = small(tied), tmp_path / "runs/pretrain"
    done = train(*STILL, f"init_from={folder}", f"model.tie_embeddings={tied}")
    assert_began_with(run, str(folder))
    assert f"RoPE base 10000 from the first phase on; the weights of {folder} were made with 7e+07" in done.stdout
    assert folders.read_info(folders.all_checkpoints(run)[0])["context"] == 65536
    cfg = composed(f"init_from={run}")
    check(cfg)
    assert cfg.model.rope_theta == 100_000.0  # of its last phase
    assert cfg.model.d_model == 32 and cfg.model.tie_embeddings is tied and cfg.data.tokenizer == str(run)
    assert load_tokenizer(cfg.data.tokenizer).digest == load_tokenizer("bytes").digest


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file(train: Train, tmp_path: Path, small: Callable[[bool], Path], tied: bool) -> None:
    file = tmp_path / "small.gguf"
    origin = find_origin(str(small(tied)))
    save_gguf(origin.open(), origin.shape, file, "bfloat16", 512, tokenizer_to_gguf(load_tokenizer("bytes"), 260), "0")
    train(*STILL, f"init_from={file}", f"model.tie_embeddings={tied}")
    assert_began_with(tmp_path / "runs/pretrain", str(file))


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sharded_over_two_processes(corpus: Path, tmp_path: Path, small: Callable[[bool], Path], tied: bool) -> None:
    same = (f"init_from={small(tied)}", f"model.tie_embeddings={tied}", "stage.phases.decay.micro_batch_size=1")
    run_train(corpus, tmp_path, *TRACE, *same, "run_name=single")
    torchrun(corpus, tmp_path, *same, "trainer.strategy=fsdp", "run_name=sharded")
    single, sharded = (read_trace(tmp_path / "runs" / name, *rank) for name, rank in (("single", []), ("sharded", [0])))
    assert losses(single) == pytest.approx(losses(sharded), rel=1e-4)
    assert_exported_whole(tmp_path, "sharded")


def assert_exported_whole(root: Path, run: str) -> None:
    """What two ranks saved in shards is, in plain transformers, what Lightning's own reader finds in them."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from transformers import AutoModelForCausalLM

    last = folders.all_checkpoints(root / "runs" / run)[-1]
    assert (last / "state/__1_0.distcp").is_file()
    dcp_to_torch_save(last / "state", root / "whole")
    expected = torch.load(root / "whole", weights_only=True)["state_dict"]
    command = [sys.executable, "-m", "nb_lightning.export", "--from", str(last), "--to", f"{root}/exported"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found = AutoModelForCausalLM.from_pretrained(root / "exported").state_dict()
    for name, value in expected.items():
        assert torch.equal(found[to_hf(name.removeprefix("model."))], value), name


def composed(*overrides: str) -> Config:
    register(shape_at)
    return compose(ROOT / "conf", ["model=from_hf", *overrides])


@pytest.mark.parametrize("tied", [False, True])
def test_the_shape_is_read_from_there(small: Callable[[bool], Path], tied: bool) -> None:
    cfg = composed(f"init_from={small(tied)}")
    check(cfg)
    assert (cfg.model.d_model, cfg.model.n_kv_heads, cfg.model.d_mlp, cfg.model.vocab_size) == (32, 1, 64, 260)
    assert (cfg.model.rope_theta, cfg.model.tie_embeddings) == (70e6, tied)
    assert [phase.rope_theta for phase in cfg.stage.phases.values()] == [70e6, 70e6]  # the model's, where none is given


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([], "model=from_hf takes the shape from init_from=: name a Hugging Face folder"),
        (["init_from=nowhere"], "init_from=nowhere: no checkpoint at 'nowhere'"),
        (["init_from=nowhere.gguf"], "init_from=nowhere.gguf: no checkpoint at 'nowhere.gguf': name a run"),
    ],
)
def test_nothing_to_read_the_shape_from(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check(composed(*overrides))


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.d_mlp=32", "model.d_mlp is 32, but init_from={} has 64 (model=from_hf takes the shape from there)"),
        ("model.norm_eps=0.1", "model.norm_eps is 0.1, but init_from={} has 1e-05"),
        ("model.tie_embeddings=true", "model.tie_embeddings is True, but init_from={} has False"),
    ],
)
def test_another_shape_is_refused_by_the_key(small: Callable[[bool], Path], override: str, words: str) -> None:
    folder = str(small(False))
    cfg = composed(f"init_from={folder}", override)
    with pytest.raises(ValueError, match="^" + re.escape(words.format(folder))):
        NextTokenStage(cfg, plan_of(cfg.stage)).begin_from(find_origin(folder))
