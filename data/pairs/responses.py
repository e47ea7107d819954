"""Responses of a model to tasks, scored: of a local model, or behind an endpoint that speaks OpenAI's API.

What was sampled is kept in a journal as it is done, a line a task, so that a stopped run goes on with the tasks that
are left. Each response has a seed of its own, so what is drawn does not depend on where it was stopped.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from data.pairs.endpoint import asking, client
from nb_lightning.checkpoints.pretrained import find_origin, load_pretrained
from nb_lightning.generation.sampling import Sampling
from nb_lightning.rewards.registry import get_verifier, get_verifiers
from nb_lightning.rewards.tasks import Task
from nb_lightning.rollouts.attempts import Attempts
from nb_lightning.rollouts.sampler import RolloutSampler
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.messages import ChatError


@dataclass(frozen=True)
class Response:
    """What a model answered.

    Attributes:
        text: as the assistant wrote it in the student's chat template, without the token that ends a turn.
        finish: "stop" or "length".
        reward, status: of the task's verifier.
    """

    text: str
    finish: str
    reward: float
    status: str


Done = Callable[[Task, list[Response]], None]  # called from any thread


class Sampler(Protocol):
    """Answers tasks, each `k` times."""

    k: int

    def about(self) -> dict[str, Any]:
        """What identifies it, for the pairs' provenance."""

    def sample(self, tasks: Sequence[Task], done: Done) -> None:
        """Answer and score every task, in any order."""


class Journal:
    """A file with a JSON object a line, each with a key; a torn last line is cut off."""

    def __init__(self, path: Path) -> None:
        self.path, self.entries, self._lock = path, {}, threading.Lock()
        if path.exists():
            whole = path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
            os.truncate(path, len(whole))
            for line in whole.split(b"\n")[:-1]:
                entry = json.loads(line)
                self.entries[entry["key"]] = entry["value"]

    def add(self, key: str, value: Any) -> None:
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False)
        with self._lock, open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")
            self.entries[key] = json.loads(line)["value"]


def key_of(task: Task) -> str:
    return f"{task.source}\n{task.id}"


def sample_all(
    sampler: Sampler, tasks: Sequence[Task], path: Path, progress: Callable[[], Any]
) -> dict[str, list[Response]]:
    """The responses to all tasks, by `key_of`; those in the journal at `path` are not sampled again."""
    journal = Journal(path)
    left = [task for task in tasks if key_of(task) not in journal.entries]

    def done(task: Task, responses: list[Response]) -> None:
        journal.add(key_of(task), [asdict(response) for response in responses])
        progress()

    for _ in range(len(tasks) - len(left)):
        progress()
    if left:
        sampler.sample(left, done)
    return {key_of(task): [Response(**r) for r in journal.entries[key_of(task)]] for task in tasks}


@dataclass
class LocalSampler:
    """A run, a checkpoint, a Hugging Face folder or a .gguf file.

    Args:
        template: instead of its own.
    """

    path: str
    sampling: Sampling
    k: int
    seed: int
    max_batch: int
    template: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def about(self) -> dict[str, Any]:
        origin = find_origin(self.path)
        parts = origin.path.resolve().parts
        name = f"{parts[-3]}/{parts[-1]}" if parts[-2] == "checkpoints" else parts[-1]  # of a run, and which of its
        return {"name": name, "digest": origin.digest()}

    def chat_tokenizer(self) -> ChatTokenizer:
        return ChatTokenizer.of(find_origin(self.path).tokenizer(), self.template)

    def sample(self, tasks: Sequence[Task], done: Done) -> None:
        pretrained = load_pretrained(self.path, self.device, self.dtype)
        chat = ChatTokenizer.of(pretrained.tokenizer, self.template)
        pretrained = replace(pretrained, chat=chat.template, stop_ids=(*pretrained.stop_ids, chat.end_id))

        def scored(a: Attempts) -> None:
            found = zip(a.texts, a.finish_reasons, a.scores)
            done(a.task, [Response(text, finish, s.reward, s.info["status"]) for text, finish, s in found])

        sampler = RolloutSampler(pretrained, get_verifiers(tasks), self.sampling, self.k, self.max_batch)
        sampler.sample_over_ranks(sampler.encode(tasks, self.seed), scored)


@dataclass
class EndpointSampler:
    """A model behind an endpoint.

    What it answers, a message with perhaps reasoning and calls, becomes text in the student's template.

    Args:
        url: base address, say http://localhost:8000/v1.
        chat: of the student.
        concurrency: requests at a time.
    """

    url: str
    model: str
    sampling: Sampling
    k: int
    seed: int
    chat: ChatTokenizer
    concurrency: int = 8

    def about(self) -> dict[str, Any]:
        return {"name": self.model, "url": self.url}

    def sample(self, tasks: Sequence[Task], done: Done) -> None:
        verifiers = {name: get_verifier(name) for name in {task.verifier for task in tasks}}
        with client(self.url) as endpoint, ThreadPoolExecutor(self.concurrency) as pool:

            def answer(task: Task) -> None:
                answers = [self._answer(endpoint, task, j) for j in range(self.k)]
                texts, asked = [text for text, _ in answers], str(task.messages[-1].get("content", ""))
                scores = verifiers[task.verifier].score(asked, texts, task.reference)
                found = zip(answers, scores)
                done(task, [Response(text, finish, s.reward, s.info["status"]) for (text, finish), s in found])

            for future in [pool.submit(answer, task) for task in tasks]:
                try:
                    future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

    def _answer(self, endpoint: Any, task: Task, j: int) -> tuple[str, str]:
        s = self.sampling
        with asking(self.url):
            reply = endpoint.chat.completions.create(
                model=self.model, messages=task.messages, temperature=s.temperature, top_p=s.top_p,
                max_tokens=s.max_new_tokens, seed=zlib.crc32(f"{self.seed} {key_of(task)} {j}".encode()) >> 1,
            )  # fmt: skip
            choice = reply.choices[0]
            message = {"content": "", **choice.message.model_dump(exclude_none=True), "role": "assistant"}
        keep = ("role", "content", "reasoning_content", "tool_calls")
        message = {key: message[key] for key in keep if key in message}
        try:
            text = written(self.chat, [*task.messages, message])
        except ChatError as error:
            raise ValueError(f"{self.url}: the template cannot write an answer to task {task.id!r}: {error}") from error
        return text, "length" if choice.finish_reason == "length" else "stop"


def written(chat: ChatTokenizer, messages: list[Any]) -> str:
    """The last message as the template writes it, without the token that ends a turn."""
    text, turns = chat.template.render_turns(messages)
    end = chat.tokenizer.tokenizer.id_to_token(chat.end_id)
    return text[turns[-1].start : turns[-1].end].rstrip().removesuffix(end)
