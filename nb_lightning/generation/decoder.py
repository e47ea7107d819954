"""Batched sampling from the backbone with a KV cache.

    generate     continue a list of prompts
    stream       yield each completion as soon as it is finished; requests are read from an iterator
    Decoder      the loop under both, one token a call; rows may be added while others run (the server)

A row leaves the batch when it finishes and a waiting one takes its place, so the batch stays full whatever the lengths.
Equal prompts that start together are run once. The draws of a row depend on its seed and the distributions alone, not
on the batch, the row's place in it or the device.

B rows, N tokens of all new prompts, P distinct new prompts, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from nb_lightning.generation.kv_cache import Decode, KVCache, Prefill
from nb_lightning.generation.sampling import Sampling, choose
from nb_lightning.model.transformer import Transformer

MAX_BATCH = 64
PREFILL_TOKENS = 8192  # tokens of the prompts that start in one forward
DRAWS = 256  # random numbers that a row draws at a time


@dataclass(frozen=True)
class Request:
    """One row to generate; `key`, which no other row may have, names it in the results."""

    key: Hashable
    prompt: Sequence[int]
    sampling: Sampling
    seed: int | Sequence[int] = 0


@dataclass
class Completion:
    """What the model wrote.

    Attributes:
        ids: new tokens; with "stop" the last one is the stop token.
        logprobs: nats, of each token under the model's softmax (temperature 1, no top-k and top-p).
        finish_reason: "stop" or "length".
        top: for each token the (id, logprob) of the `Sampling.top_logprobs` most likely ones.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    top: list[list[tuple[int, float]]] = field(default_factory=list)


@dataclass
class NewToken:
    """A token of one row; `finish_reason` is "" unless it is the row's last."""

    key: Hashable
    id: int
    logprob: float
    finish_reason: str
    top: list[tuple[int, float]]


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int | Sequence[int]] | int = 0,
    max_batch: int = MAX_BATCH,
) -> list[Completion]:
    """Continue every prompt.

    Args:
        prompts: token ids, at least one each; repeat a prompt to sample it several times.
        seeds: one for each prompt (an integer or a sequence of integers), or one for all: row i then gets [seed, i].
        max_batch: rows that run at the same time.

    Raises:
        ValueError: an empty prompt, a token that the model does not have, or not one seed for each prompt.
    """
    if isinstance(seeds, int):
        seeds = [[seeds, i] for i in range(len(prompts))]
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    for i, prompt in enumerate(prompts):
        _require_valid(model, i, prompt)
    requests = [Request(i, prompt, sampling, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds))]
    completions = dict(stream(model, requests, min(max_batch, max(1, len(prompts)))))
    return [completions[i] for i in range(len(prompts))]


def stream(
    model: Transformer, requests: Iterable[Request], max_batch: int = MAX_BATCH
) -> Iterator[tuple[Hashable, Completion]]:
    """Yield (key, completion) of each request as soon as it is finished; `requests` is read as rows become free.

    Raises:
        ValueError: an empty prompt or a token that the model does not have.
    """
    decoder, requests = Decoder(model, max_batch), iter(requests)
    running: dict[Hashable, Completion] = {}
    training = model.training
    model.eval()
    try:
        with gathered_parameters(model):
            while True:
                for request in islice(requests, 2 * max_batch - len(running)):  # one batch runs, another waits
                    decoder.add(request.key, request.prompt, request.sampling, request.seed)
                    running[request.key] = Completion()
                if not running:
                    return
                for token in decoder.step():
                    completion = running[token.key]
                    completion.ids.append(token.id)
                    completion.logprobs.append(token.logprob)
                    completion.finish_reason = token.finish_reason
                    completion.top.append(token.top)
                    if token.finish_reason:
                        yield token.key, running.pop(token.key)
    finally:
        model.train(training)


@contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """Under FSDP2, hold full parameters on every rank, so that each may run any number of forwards.

    Entering and leaving is a collective. Without FSDP2 nothing happens.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    for module in sharded[1:]:  # the root keeps its parameters after a forward in any case
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded[1:]:
            module.set_reshard_after_forward(True, recurse=False)
        for module in sharded:
            module.reshard()


def _require_valid(model: Transformer, key: Hashable, prompt: Sequence[int]) -> None:
    if not len(prompt):
        raise ValueError(f"prompt {key} is empty; give it at least one token")
    size = model.shape.vocab_size
    if not (0 <= min(prompt) and max(prompt) < size):
        wrong = next(id for id in prompt if not 0 <= id < size)
        raise ValueError(f"prompt {key} has token {wrong}; the model's vocabulary is 0 to {size - 1}")


class _Row:
    """A prompt, and the state of its generation: tokens drawn so far, the last one, random numbers."""

    def __init__(self, key: Hashable, prompt: Sequence[int], sampling: Sampling, seed: int | Sequence[int]) -> None:
        self.key, self.prompt, self.sampling = key, list(prompt), sampling
        self.last = -1
        self.drawn = 0
        self._random = np.random.default_rng(seed)
        self._draws: list[float] = []

    @property
    def cached(self) -> int:
        """Number of tokens whose keys and values are in the cache: all but the last one drawn."""
        return len(self.prompt) + self.drawn - 1

    def uniform(self) -> float:
        """Return the random number in [0, 1) that decides the next token."""
        if self.drawn % DRAWS == 0:
            self._draws = self._random.random(DRAWS).tolist()
        return self._draws[self.drawn % DRAWS]

    def append(self, id: int, logprob: float, top: list[tuple[int, float]]) -> NewToken:
        """Record a drawn token, and say whether it ends the row."""
        self.last = id
        self.drawn += 1
        reason = ""
        if id in self.sampling.stop_ids:
            reason = "stop"
        elif self.drawn == self.sampling.max_new_tokens:
            reason = "length"
        return NewToken(self.key, id, logprob, reason, top)


class Decoder:
    """Rows that are generated together, and a queue of those that wait; rows may be added at any time.

    Args:
        model: in eval mode.
        max_batch: rows that run at the same time; others wait in the order in which they were added.
        prefill_tokens: tokens of the prompts that start in one forward; a longer prompt starts alone.
    """

    def __init__(self, model: Transformer, max_batch: int = MAX_BATCH, prefill_tokens: int = PREFILL_TOKENS) -> None:
        self.model, self.max_batch, self.prefill_tokens = model, max_batch, prefill_tokens
        self.cache = KVCache(max_batch)
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []  # row i is in slot i

    @property
    def busy(self) -> bool:
        """Whether any row runs or waits."""
        return bool(self._rows or self._waiting)

    def add(self, key: Hashable, prompt: Sequence[int], sampling: Sampling, seed: int | Sequence[int] = 0) -> None:
        """Queue a prompt; `key` names its tokens in what `step` returns.

        Raises:
            ValueError: an empty prompt or a token that the model does not have.
        """
        _require_valid(self.model, key, prompt)
        self._waiting.append(_Row(key, prompt, sampling, seed))

    def cancel(self, key: Hashable) -> None:
        """Drop a row, waiting or running."""
        self._waiting = deque(row for row in self._waiting if row.key != key)
        for slot in reversed(range(len(self._rows))):
            if self._rows[slot].key == key:
                self._leave(slot)

    @torch.no_grad()  # not inference_mode: under FSDP2 parameters are gathered here and used in training afterwards
    def step(self) -> list[NewToken]:
        """Draw one token for each of some rows: the first of rows that start now, or the next of all running rows."""
        free = self.max_batch - len(self._rows)
        # A forward for one new row costs as much as for several: wait until an eighth of the batch is free.
        if self._waiting and free >= min(len(self._waiting), max(1, self.max_batch // 8)):
            return self._start(free)
        return self._continue() if self._rows else []

    def _start(self, free: int) -> list[NewToken]:
        """Run the prompts of waiting rows, at most `free` of them, and draw their first tokens."""
        first = len(self._rows)
        slots_of = self._admit(free)
        self.cache.reserve(max(map(len, slots_of)))
        device = self._device
        ends = torch.tensor([len(prompt) for prompt in slots_of]).cumsum(0)  # [P]
        mask = Prefill(
            self.cache,
            self.model.attention_backend,
            torch.cat((ends.new_zeros(1), ends)).int().to(device),
            [slots[0] for slots in slots_of.values()],
        )
        ids = torch.tensor([id for prompt in slots_of for id in prompt], device=device)  # [N]
        positions = torch.cat([torch.arange(len(prompt)) for prompt in slots_of]).to(device)  # [N]
        last = (ends - 1).to(device)  # [P]
        logits = self.model(  # [P, V]
            ids[None], positions[None], mask=mask, head=lambda hidden, weight: hidden[0, last] @ weight.T
        )
        prompt_of = torch.empty(len(self._rows) - first, dtype=torch.long)  # new row -> its prompt's row in `logits`
        for i, (prompt, slots) in enumerate(slots_of.items()):
            for slot in slots:
                prompt_of[slot - first] = i
                if slot != slots[0]:
                    self.cache.move(slots[0], slot, len(prompt))
        return self._draw(logits[prompt_of.to(device)], first)

    def _admit(self, free: int) -> dict[tuple[int, ...], list[int]]:
        """Move waiting rows into the batch: distinct prompt -> the slots of its rows."""
        slots_of: dict[tuple[int, ...], list[int]] = {}
        tokens = 0
        while self._waiting and free:
            prompt = tuple(self._waiting[0].prompt)
            if prompt not in slots_of:
                if slots_of and tokens + len(prompt) > self.prefill_tokens:
                    break
                tokens += len(prompt)
            slots_of.setdefault(prompt, []).append(len(self._rows))
            self._rows.append(self._waiting.popleft())
            free -= 1
        return slots_of

    def _continue(self) -> list[NewToken]:
        """Run the last token of every row, and draw the next ones."""
        device = self._device
        lengths = [row.cached for row in self._rows]
        self.cache.reserve(max(lengths) + 1)
        mask = Decode(self.cache, lengths, device)
        ids = torch.tensor([row.last for row in self._rows], device=device)  # [B]
        logits = self.model(  # [B, V]
            ids[:, None], mask.positions[:, None], mask=mask, head=lambda hidden, weight: hidden[:, 0] @ weight.T
        )
        return self._draw(logits, 0)

    def _draw(self, logits: Tensor, first: int) -> list[NewToken]:
        """Draw a token for each row from number `first` on, from `logits` [rows, V]; finished rows leave the batch."""
        rows = self._rows[first:]
        logits = logits.float()
        uniforms = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=logits.device)
        ids = choose(logits, [row.sampling for row in rows], uniforms)
        log_total = logits.logsumexp(-1)
        logprobs = (logits.gather(1, ids[:, None])[:, 0] - log_total).tolist()
        tops: list[list[tuple[int, float]]] = [[] for _ in rows]
        top_n = max(row.sampling.top_logprobs for row in rows)
        if top_n:
            top_logits, top_ids = logits.topk(min(top_n, logits.shape[1]))
            pairs = zip(top_ids.tolist(), (top_logits - log_total[:, None]).tolist())
            tops = [list(zip(*pair))[: row.sampling.top_logprobs] for row, pair in zip(rows, pairs)]
        tokens = [row.append(id, logprob, top) for row, id, logprob, top in zip(rows, ids.tolist(), logprobs, tops)]
        for slot in reversed(range(first, len(self._rows))):
            if tokens[slot - first].finish_reason:
                self._leave(slot)
        return tokens

    def _leave(self, slot: int) -> None:
        """Drop the row in `slot`; the last row takes its place."""
        last = self._rows.pop()
        if slot < len(self._rows):
            self.cache.move(len(self._rows), slot, last.cached)
            self._rows[slot] = last

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device
