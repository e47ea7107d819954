"""Store a teacher's most likely tokens at every response token of a source of pairs.

    python -m data.teacher_logprobs --source outputs/data/pairs/source --teacher MODEL --k 64
    python train.py stage=dpd data.cached_teacher=true stage.teacher=null ...

With them, `stage=dpd` needs no teacher beside the student. All tokens but the k most likely count as one, so the
divergence is a lower bound of the exact one. After a stop, the same command resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.bin_packing import assemble_batch
from data.teacher_cache import CacheWriter, record_dtype
from nb_lightning.checkpoints.pretrained import find_origin, load_pretrained, require_same_vocabulary
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.errors import one_line_errors
from nb_lightning.losses.head import CHUNK_SIZE
from nb_lightning.model.transformer import Transformer
from nb_lightning.token_source import SPLITS, Source

DESCRIPTION = "Store a teacher's most likely tokens at every response token of a source of pairs."


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m data.teacher_logprobs", description=DESCRIPTION)
    p.add_argument("--source", required=True, metavar="FOLDER", help="made by data.prepare --pairs")
    p.add_argument(
        "--teacher", required=True, metavar="MODEL", help="run, checkpoint, Hugging Face folder or .gguf file"
    )
    p.add_argument("--tokenizer", metavar="PATH", help="of the source, if it is not the teacher's file")
    p.add_argument("--k", type=int, default=64, help="tokens stored at each position (default: %(default)s)")
    p.add_argument(
        "--temperature", type=float, default=1.0, help="the value of stage.temperature (default: %(default)s)"
    )
    p.add_argument("--batch-tokens", type=int, default=8192, help="tokens of a forward (default: %(default)s)")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    p.add_argument("--overwrite", action="store_true", help="replace the records of another teacher, k or temperature")
    a = p.parse_args(arguments)
    with one_line_errors():
        run(a)


def run(a: argparse.Namespace) -> None:
    """Write the records of both splits.

    Raises:
        ValueError: the arguments cannot be used.
    """
    if "://" in a.source:
        raise ValueError(f"--source {a.source} is remote; make it of a local copy")
    sources = [Source(f"{a.source}/{split}") for split in SPLITS]
    origin = find_origin(a.teacher)
    if not all(source.manifest.pairs for source in sources):
        raise ValueError(f"--source {a.source} holds no pairs; data.prepare --pairs makes them")
    if not 0 < a.k <= origin.shape.vocab_size:
        raise ValueError(f"--k is {a.k}; the teacher has {origin.shape.vocab_size:,} tokens")
    if not 0 < a.temperature < float("inf"):
        raise ValueError(f"--temperature is {a.temperature}; it must be a positive number")
    tokenizer = load_tokenizer(a.tokenizer) if a.tokenizer else origin.tokenizer()
    if tokenizer.digest != sources[0].manifest.tokenizer:
        raise ValueError(
            f"--source {a.source} was tokenized with another tokenizer than "
            f"{a.tokenizer or a.teacher}; name its own with --tokenizer"
        )
    require_same_vocabulary(origin, tokenizer, origin.shape.vocab_size)
    about = {"teacher": origin.digest(), "name": origin.path.resolve().name, "k": a.k, "temperature": a.temperature}
    writers = [CacheWriter(source, about, a.overwrite) for source in sources]
    model = load_pretrained(a.teacher, a.device, a.dtype).model
    for source, writer in zip(sources, writers):
        with tqdm(total=len(writer.samples), desc=Path(source.folder).name, unit="sample", disable=None) as bar:
            for samples in writer.missing():
                bar.update(samples.start - bar.n)
                batches = _batches(source, writer.samples, samples, a.batch_tokens)
                records = [top_k(model, marked, first, a.k, a.temperature) for marked, first in batches]
                writer.write(samples, np.concatenate(records))
            bar.update(len(writer.samples) - bar.n)


def _batches(
    source: Source, lengths: np.ndarray, samples: range, tokens: int
) -> Iterator[tuple[list[np.ndarray], list[int]]]:
    """Yield the marked tokens of some samples at a time, and the index of the first trained token in each."""
    ends = np.cumsum(lengths[:, 0], dtype=np.int64)
    batch: list[np.ndarray] = []
    first: list[int] = []
    for sample in samples:
        length = int(lengths[sample, 0])
        if batch and sum(map(len, batch)) + length > tokens:
            yield batch, first
            batch, first = [], []
        batch.append(source.read_on(int(ends[sample]) - length, length))
        first.append(int(lengths[sample, 1]))
    yield batch, first


@torch.no_grad()
def top_k(model: Transformer, samples: list[np.ndarray], first: list[int], k: int, temperature: float) -> np.ndarray:
    """Compute the records of some samples, one sample after the other (`teacher_cache.record_dtype`).

    Args:
        samples: marked tokens of each.
        first: index of the first trained token in each.
    """
    places = [len(marked) - 1 for marked in samples]
    starts = np.cumsum([0, *places])
    at = np.concatenate([np.arange(start + f - 1, start + n) for start, f, n in zip(starts, first, places)])
    device = model.embedding.weight.device
    batch = assemble_batch([samples], int(starts[-1]), 0).to(device)
    head = partial(_top_k_of_logits, at=torch.from_numpy(at).to(device), k=k, temperature=temperature)
    ids, logprobs = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, head=head)
    records = np.empty(len(at), dtype=record_dtype(k))
    records["ids"], records["logprobs"] = ids.cpu().numpy(), logprobs.cpu().numpy()
    return records


def _top_k_of_logits(
    hidden: Tensor, head_weight: Tensor, at: Tensor, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ids int32 [n, k] and log-probabilities float32 [n, k] of the most likely tokens.

    Args:
        hidden: [B, T, D].
        head_weight: [V, D].
        at: [n] int64, indices into the B * T positions.
    """
    ids: list[Tensor] = []
    logprobs: list[Tensor] = []
    for h in hidden.flatten(0, 1)[at].split(CHUNK_SIZE):
        top_logprobs, top_ids = ((h @ head_weight.T).float() / temperature).log_softmax(-1).topk(k)
        ids.append(top_ids.int())
        logprobs.append(top_logprobs)
    return torch.cat(ids), torch.cat(logprobs)


if __name__ == "__main__":
    main()
