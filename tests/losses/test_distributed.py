"""DPD inside the root module's forward under FSDP2, two processes against one. Run by torchrun, this file is a rank."""

from __future__ import annotations

import socket
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nb_lightning.batch import PreferenceBatch, pack_responses
from nb_lightning.losses.divergence import TeacherOutputs
from nb_lightning.losses.dpd import dpd_loss, response_logprobs
from nb_lightning.model.layout import shard
from nb_lightning.model.transformer import ModelShape, Transformer
from tests.harness import ROOT, environment
from tests.losses.pairs_harness import V, pack_pairs, random_pairs

pytestmark = pytest.mark.runs

LENGTHS = [(3, 5, 2), (1, 1, 7), (4, 3, 1), (2, 0, 4), (5, 6, 0), (2, 9, 3)]


def model(seed: int, d_model: int = 16) -> Transformer:
    shape = ModelShape(
        vocab_size=V, d_model=d_model, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_mlp=24, norm_eps=1e-5,
        rope_theta=1e4, init_std=0.3,
    )  # fmt: skip
    made = Transformer(shape)
    made.init_weights(seed)
    return made


def step(policy: Transformer, batches: list[PreferenceBatch], counts: dict[str, torch.Tensor], ranks: int) -> Any:
    """Loss of these micro-batches, and the sum of their statistics; gradients are left in the policy."""
    reference, teacher = model(1), model(2, d_model=24)
    total, logged = torch.zeros(()), {}
    for batch in batches:
        inputs = batch.input_ids, batch.position_ids, batch.cu_seqlens
        with torch.no_grad():
            batch.ref_logprobs = reference(*inputs, head=partial(response_logprobs, batch=batch))
            of_teacher = teacher(
                *inputs, head=lambda hidden, head_weight: TeacherOutputs(hidden.flatten(0, 1), head_weight)
            )
        loss, sums = policy(
            *inputs, head=partial(dpd_loss, batch=batch, counts=counts, teacher=of_teacher, chunk_size=8)
        )
        (loss * ranks).backward()
        total = total + loss.detach()
        logged = {name: logged.get(name, 0) + value for name, value in sums.items()}
    return total, logged


def batches_of(cuts: list[int]) -> list[PreferenceBatch]:
    return [pack_pairs(random_pairs(LENGTHS)[a:b]) for a, b in pairwise(cuts)]


def rank_main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, policy = dist.get_rank(), model(0)
    shard(policy, dist.device_mesh.init_device_mesh("cpu", (2,)), "32-true")
    batches = batches_of([[0, 1, 3], [3, 6]][rank])
    if rank == 1:  # FSDP2 wants as many forwards on every rank: one of no pair at all
        packed, index = pack_responses([[1]], [[]])
        batches.append(PreferenceBatch(**packed, pairs=0, response_index=index))
    counts = {name: sum(batch.counts[name] for batch in batches) for name in batches[0].counts}
    for value in counts.values():
        dist.all_reduce(value)
    loss, sums = step(policy, batches, counts, 2)
    for value in (loss, *sums.values()):
        dist.all_reduce(value)
    gradients = {name: p.grad.full_tensor() for name, p in policy.named_parameters()}
    if rank == 0:
        torch.save({"loss": loss, "sums": sums, "gradients": gradients, "counts": counts}, folder / "found.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_under_fsdp2_equal_one(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    done = subprocess.run(
        [*launcher, __file__, str(tmp_path)], env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    policy, batches = model(0), batches_of([0, 6])
    assert found["counts"] == batches[0].counts
    loss, sums = step(policy, batches, batches[0].counts, 1)
    torch.testing.assert_close(found["loss"], loss, atol=1e-6, rtol=1e-6)
    for name, p in policy.named_parameters():
        torch.testing.assert_close(found["gradients"][name], p.grad, atol=1e-6, rtol=1e-5, msg=name)
    torch.testing.assert_close(found["sums"], sums, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank_main(Path(sys.argv[1]))
