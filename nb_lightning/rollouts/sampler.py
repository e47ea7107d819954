"""Sample k completions of each prompt and score them with the task's verifier.

    sampler = RolloutSampler(pretrained, get_verifiers(tasks), Sampling(512, temperature=0.6), k=8)
    attempts = sampler.sample_over_ranks(sampler.encode(tasks, seed=0))     # one Attempts for each task, in order

Scoring runs in threads while the model samples other prompts. What is drawn for a prompt depends on its seed alone:
not on the batch, on the other prompts or on the number of processes.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from nb_lightning.checkpoints.pretrained import Pretrained
from nb_lightning.generation.decoder import MAX_BATCH, Completion, Request, stream
from nb_lightning.generation.sampling import Sampling
from nb_lightning.rewards.tasks import Task
from nb_lightning.rewards.verifier import SCORING_THREADS, Verifier, score_texts
from nb_lightning.rollouts.attempts import Attempts, Prompt
from nb_lightning.rollouts.ranks import gather_shares, rank_and_world_size
from nb_lightning.text.chat_tokens import ChatTokenizer, thought_opened_by

OnScored = Callable[[Attempts], object]  # called from a scoring thread; what it returns is ignored


@dataclass(frozen=True)
class RolloutSampler:
    """A model that answers prompts, and the verifiers that score its answers.

    Attributes:
        pretrained: the model with its tokenizer, chat template and stop tokens.
        verifiers: by name, for all tasks that are sampled.
        sampling: how tokens are drawn; the stop tokens of `pretrained` are added.
        k: completions of each prompt.
        max_batch: completions that are sampled at the same time.
    """

    pretrained: Pretrained
    verifiers: Mapping[str, Verifier]
    sampling: Sampling
    k: int
    max_batch: int = MAX_BATCH

    def encode(self, tasks: Sequence[Task], seed: int) -> list[Prompt]:
        """Encode the chat of each task, up to where the assistant begins. `seed` and the task give the prompt's seed.

        Raises:
            ValueError: the model has no chat template, or the template refuses a task's messages; names the task.
        """
        if self.pretrained.chat is None:
            raise ValueError(
                f"{self.pretrained.name} has no chat template, and tasks are chats; name one (--chat-template)"
            )
        chat = ChatTokenizer(self.pretrained.tokenizer, self.pretrained.chat)
        prompts = []
        for task in tasks:
            try:
                ids = chat.prompt(task.messages, task.tools, require_tools=True)
            except ValueError as error:
                raise ValueError(f"task {task.id!r}: {error}") from error
            prompts.append(Prompt(task, ids, (seed, zlib.crc32(task.key.encode()))))
        return prompts

    def sample(self, prompts: Sequence[Prompt]) -> tuple[list[Attempts], float]:
        """Sample and score the prompts of this process, for training: `Attempts.completions` are kept.

        Under FSDP2 every rank must call this, also one without prompts.

        Returns:
            The attempts at each prompt, in order; and the seconds of waiting for scores after the last completion.
        """
        return self._sample(prompts, keep_completions=True)

    def sample_over_ranks(
        self, prompts: Sequence[Prompt], on_scored: OnScored = lambda attempts: None
    ) -> list[Attempts]:
        """Sample and score prompts together with the other ranks: each takes its share, all return all attempts.

        Every rank must call this with the same prompts. `Attempts.completions` are dropped.

        Args:
            on_scored: called with the attempts at each prompt of this rank's share, as soon as they are scored.

        Returns:
            The attempts at each prompt, in order.
        """
        rank, world_size = rank_and_world_size()
        attempts, _ = self._sample(prompts[rank::world_size], keep_completions=False, on_scored=on_scored)
        shares = gather_shares(attempts)
        return [shares[i % world_size][i // world_size] for i in range(len(prompts))]

    def _sample(
        self, prompts: Sequence[Prompt], keep_completions: bool, on_scored: OnScored = lambda attempts: None
    ) -> tuple[list[Attempts], float]:
        attempts = [Attempts(prompt.task) for prompt in prompts]
        finished: dict[int, dict[int, Completion]] = {}  # prompt -> number of the completion -> completion
        with ThreadPoolExecutor(SCORING_THREADS) as threads:
            scoring: list[Future[None]] = []
            for key, completion in stream(self.pretrained.model, self._requests(prompts), self.max_batch):
                assert isinstance(key, tuple)  # see `_requests`
                i, j = key
                finished.setdefault(i, {})[j] = completion
                if len(finished[i]) == self.k:
                    completions = [completion for _, completion in sorted(finished.pop(i).items())]
                    self._record(attempts[i], prompts[i], completions, keep_completions)
                    scoring.append(threads.submit(self._score, attempts[i], on_scored))
            all_sampled = time.perf_counter()
            for future in scoring:
                future.result()  # raises what the verifier or `on_scored` raised
        return attempts, time.perf_counter() - all_sampled

    def _requests(self, prompts: Sequence[Prompt]) -> Iterable[Request]:
        sampling = replace(self.sampling, stop_ids=(*self.sampling.stop_ids, *self.pretrained.stop_ids))
        for i, prompt in enumerate(prompts):
            for j in range(self.k):
                yield Request((i, j), prompt.ids, sampling, [*prompt.seed, j])

    def _record(
        self, attempts: Attempts, prompt: Prompt, completions: Iterable[Completion], keep_completions: bool
    ) -> None:
        tokenizer = self.pretrained.tokenizer
        opening = thought_opened_by(tokenizer, prompt.ids)
        for completion in completions:
            ids = completion.ids[:-1] if completion.finish_reason == "stop" else completion.ids
            attempts.texts.append(opening + tokenizer.decode(ids))
            attempts.n_tokens.append(len(completion.ids))
            attempts.finish_reasons.append(completion.finish_reason)
            if keep_completions:
                attempts.completions.append(completion)

    def _score(self, attempts: Attempts, on_scored: OnScored) -> None:
        attempts.scores = score_texts(self.verifiers, attempts.task, attempts.texts)
        on_scored(attempts)
