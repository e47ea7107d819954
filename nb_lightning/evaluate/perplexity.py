"""How well a model predicts text: nats per token, perplexity, and bits per byte, which also compares tokenizers.

Every token of a document is predicted exactly once, the end token too. A document follows an end token. Of a
conversation, what is trained on is predicted. A document of more than `seq_len` tokens is cut into windows; the first
token of each is predicted from the token before it alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nb_lightning.checkpoints.pretrained import Pretrained
from nb_lightning.evaluate.statistics import bootstrap
from nb_lightning.losses.head import token_logprobs
from nb_lightning.model.transformer import Transformer

PACKED_TOKENS = 8192  # windows are packed into one forward up to this many tokens
READ_TOKENS = 2**20  # tokens of a source that are read at a time


@dataclass(frozen=True)
class Document:
    """A text to predict.

    Attributes:
        ids: token ids, the end token last.
        bytes: the size of the text in UTF-8; 0 if it is not known.
        is_trained: of a conversation, which of `ids` are trained on; None: this is a text, and all are predicted.
    """

    ids: list[int]
    bytes: int
    is_trained: list[bool] | None = None


@dataclass(frozen=True)
class _Window:
    """Tokens of one document: `ids[0]` is only seen, and `ids[1 + i]` is predicted if `counts[i]`."""

    document: int
    ids: list[int]
    counts: list[bool]


def perplexity(
    pretrained: Pretrained,
    documents: Iterable[Document],
    seq_len: int,
    max_tokens: int | None = None,
    on_tokens: Callable[[int], Any] = lambda tokens: None,
) -> dict[str, Any]:
    """Measure how well a model predicts documents.

    Args:
        seq_len: the largest context, in tokens.
        max_tokens: begin no further document when this many tokens are predicted; None: predict all.
        on_tokens: called with the number of tokens of each document when it is read.

    Returns:
        documents, tokens, bytes: how much was predicted; nats_per_token; interval: its 95 % bootstrap interval over
        documents; perplexity; bits_per_byte (None if the bytes are not known).

    Raises:
        ValueError: no document.
    """
    nll: list[float] = []  # negative log-likelihood of each document, in nats
    sizes: list[tuple[int, int]] = []  # tokens and bytes of each document
    pack: list[_Window] = []
    n_packed = 0
    for document in documents:
        if max_tokens is not None and sum(tokens for tokens, _ in sizes) >= max_tokens:
            break
        nll.append(0.0)
        ids, counts = document.ids, document.is_trained
        if counts is None:
            ids, counts = [pretrained.tokenizer.eos_id, *ids], [True] * (len(ids) + 1)
        for start in range(0, len(ids) - 1, seq_len):
            end = start + seq_len + 1
            window = _Window(len(nll) - 1, ids[start:end], counts[start + 1 : end])
            if pack and n_packed + len(window.ids) > PACKED_TOKENS:
                _predict(pretrained.model, pack, nll)
                pack, n_packed = [], 0
            pack.append(window)
            n_packed += len(window.ids)
        sizes.append((sum(counts[1:]), document.bytes))
        on_tokens(sizes[-1][0])
    if not sizes:
        raise ValueError("no document to predict")
    _predict(pretrained.model, pack, nll)
    tokens, n_bytes = (int(total) for total in np.sum(sizes, axis=0))
    total = math.fsum(nll)
    return {
        "documents": len(nll),
        "tokens": tokens,
        "bytes": n_bytes,
        "nats_per_token": total / tokens,
        "interval": bootstrap(np.array(nll), np.array([tokens for tokens, _ in sizes])),
        "perplexity": math.exp(min(total / tokens, 700)),
        "bits_per_byte": total / math.log(2) / n_bytes if n_bytes else None,
    }


@torch.no_grad()
def _predict(model: Transformer, pack: list[_Window], nll: list[float]) -> None:
    """Add the negative log-likelihood of each window to that of its document."""
    device = model.embedding.weight.device
    lengths = [len(window.counts) for window in pack]
    ids = torch.tensor([id for window in pack for id in window.ids[:-1]], device=device)  # [N]
    labels = torch.tensor([id for window in pack for id in window.ids[1:]], device=device)  # [N]
    counts = torch.tensor([count for window in pack for count in window.counts])  # [N]
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device) if len(pack) > 1 else None
    head = partial(_logprobs, labels=labels)
    logprobs = model(ids[None], positions[None], ends, head=head)  # [N]
    for window, window_logprobs in zip(pack, (logprobs.double().cpu() * counts).split(lengths)):
        nll[window.document] -= float(window_logprobs.sum())


def _logprobs(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    return token_logprobs(hidden[0], head_weight, labels)


def source_documents(folder: str, pretrained: Pretrained, split: str = "val") -> Iterator[Document]:
    """Read the documents, or the conversations, of a split of a tokenized source.

    Raises:
        ValueError: no data there, damaged data, pairs, or data of another tokenizer than the model's.
    """
    from nb_lightning.token_source import TRAINED, Source  # here: it imports litdata, which others do not need

    source = Source(f"{folder}/{split}")
    eos_id = source.manifest.eos_id
    if source.manifest.tokenizer != pretrained.tokenizer.digest:
        raise ValueError(f"{folder} was tokenized with another tokenizer than {pretrained.name}'s; evaluate its text")
    if source.manifest.pairs:
        raise ValueError(f"{folder} holds pairs; --source takes documents or conversations")
    if source.manifest.is_chat:
        start = 0
        for length, _ in source.samples().tolist():
            marked = source.read_on(start, length)
            yield Document((marked & (TRAINED - 1)).tolist(), 0, ((marked & TRAINED) > 0).tolist())
            start += length
        return
    unfinished: list[int] = []  # the beginning of a document that the next read continues
    for chunk, tokens in enumerate(source.chunk_tokens.tolist()):
        for start in range(0, tokens, READ_TOKENS):
            read = source.read(chunk, start, min(READ_TOKENS, tokens - start))
            pieces = np.split(read, np.flatnonzero(read == eos_id) + 1)
            for piece in pieces[:-1]:
                yield _from_ids([*unfinished, *piece.tolist()], pretrained)
                unfinished = []
            unfinished += pieces[-1].tolist()
    if unfinished:
        yield _from_ids(unfinished, pretrained)


def text_documents(file: str, pretrained: Pretrained) -> Iterator[Document]:
    """Read the field "text" of each line of a .jsonl file, or any other file as one text.

    Raises:
        ValueError: a file that cannot be read, or a line without a text; names the line.
    """
    try:
        content = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text: {error}") from error
    texts = [content]
    if file.endswith(".jsonl"):
        texts = []
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                try:
                    texts.append(json.loads(line)["text"])
                    texts[-1].encode()
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f'{file}:{number}: not an object with a string "text"') from error
    for text in texts:
        yield Document(pretrained.tokenizer.encode([text])[0], len(text.encode()))


def _from_ids(ids: list[int], pretrained: Pretrained) -> Document:
    text = pretrained.tokenizer.decode(ids[:-1] if ids[-1] == pretrained.tokenizer.eos_id else ids)
    return Document(ids, len(text.encode()))
