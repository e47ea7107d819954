"""Sample and score responses to tasks: of a local model, or of an endpoint that speaks OpenAI's API.

Each task's responses go into a journal as soon as they are scored, so a stopped run resumes with the tasks that are
left. Every response has a seed derived from the task and its number, so the result does not depend on the stops.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from data.pairs.endpoint import connect, endpoint_errors
from data.pairs.workspace import Journal
from nb_lightning.checkpoints.pretrained import find_origin, load_pretrained
from nb_lightning.generation.sampling import Sampling
from nb_lightning.rewards.registry import get_verifier, get_verifiers
from nb_lightning.rewards.tasks import Task
from nb_lightning.rollouts.attempts import Attempts
from nb_lightning.rollouts.sampler import RolloutSampler
from nb_lightning.run_folder import CHECKPOINTS
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.left_out import missing_content
from nb_lightning.text.messages import REASONING, ChatError, check_messages
from nb_lightning.text.thoughts import opened_thought, thought_of
from nb_lightning.text.tokenizer import TextTokenizer
from nb_lightning.text.variables import Variables


@dataclass(frozen=True)
class Response:
    """A scored response of a model.

    Attributes:
        text: as the assistant wrote it in the student's chat template, without the token that ends a turn.
        finish: "stop" or "length".
        reward, status: of the task's verifier.
    """

    text: str
    finish: str
    reward: float
    status: str


MESSAGE_FIELDS = ("role", "content", *REASONING, "tool_calls", "function_call")  # what is read of a reply
OnAnswered = Callable[[Task, list[Response]], None]  # called from any thread


class Sampler(Protocol):
    """Answers tasks, each `k` times."""

    @property
    def k(self) -> int: ...

    def about(self) -> dict[str, Any]:
        """Identify the model, for the claim and the provenance of the pairs."""
        ...

    def sample(self, tasks: Sequence[Task], on_answered: OnAnswered) -> None:
        """Answer and score every task, in any order."""
        ...


def key_of(task: Task) -> str:
    """Return the task's key in a journal."""
    return f"{task.source}\n{task.id}"


def sample_all(
    sampler: Sampler, tasks: Sequence[Task], journal: Path, progress: Callable[[], Any]
) -> dict[str, list[Response]]:
    """Sample all tasks that the journal lacks; return `key_of` each task -> its responses.

    Args:
        progress: called once for each task.
    """
    answered = Journal(journal)
    left = [task for task in tasks if key_of(task) not in answered.entries]

    def on_answered(task: Task, responses: list[Response]) -> None:
        answered.add(key_of(task), [asdict(response) for response in responses])
        progress()

    for _ in range(len(tasks) - len(left)):
        progress()
    if left:
        sampler.sample(left, on_answered)
    return {key_of(task): [Response(**fields) for fields in answered.entries[key_of(task)]] for task in tasks}


@dataclass
class LocalSampler:
    """A model on this machine: a run, a checkpoint, a Hugging Face folder or a .gguf file.

    Args:
        path: of the model.
        seed: of all responses, together with the task and the response's number.
        max_batch: responses sampled at a time.
        template: Jinja source of the chat template; None takes the model's own.
        variables: of the template, such as `enable_thinking`.
    """

    path: str
    sampling: Sampling
    k: int
    seed: int
    max_batch: int
    template: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    variables: Variables = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        origin = find_origin(self.path)
        parts = origin.path.resolve().parts
        name = f"{parts[-3]}/{parts[-1]}" if parts[-2] == CHECKPOINTS else parts[-1]  # run and checkpoint
        return {"name": name, "digest": origin.digest()}

    def chat_tokenizer(self) -> ChatTokenizer:
        return self._chat_tokenizer(find_origin(self.path).tokenizer())

    def _chat_tokenizer(self, tokenizer: TextTokenizer) -> ChatTokenizer:
        return ChatTokenizer.of(tokenizer, self.template).with_variables(self.variables)

    def sample(self, tasks: Sequence[Task], on_answered: OnAnswered) -> None:
        pretrained = load_pretrained(self.path, self.device, self.dtype)
        chat = self._chat_tokenizer(pretrained.tokenizer)
        pretrained = replace(pretrained, chat=chat.template, stop_ids=(*pretrained.stop_ids, *chat.end_ids))

        def on_scored(a: Attempts) -> None:
            scored = zip(a.texts, a.finish_reasons, a.scores)
            on_answered(a.task, [Response(text, finish, s.reward, s.info["status"]) for text, finish, s in scored])

        sampler = RolloutSampler(pretrained, get_verifiers(tasks), self.sampling, self.k, self.max_batch)
        sampler.sample_over_ranks(sampler.encode(tasks, self.seed), on_scored)


@dataclass
class EndpointSampler:
    """A model behind an endpoint. Its replies become text in the student's template.

    Args:
        url: base address, such as http://localhost:8000/v1.
        model: the endpoint's name for the model.
        seed: as in `LocalSampler`.
        chat: writes the student's template.
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

    def sample(self, tasks: Sequence[Task], on_answered: OnAnswered) -> None:
        verifiers = {name: get_verifier(name) for name in {task.verifier for task in tasks}}
        with connect(self.url) as endpoint, ThreadPoolExecutor(self.concurrency) as pool:

            def answer(task: Task) -> None:
                answers = [self._answer(endpoint, task, j) for j in range(self.k)]
                question, texts = str(task.messages[-1].get("content", "")), [text for text, _ in answers]
                scores = verifiers[task.verifier].score(question, texts, task.reference)
                scored = zip(answers, scores)
                on_answered(task, [Response(text, finish, s.reward, s.info["status"]) for (text, finish), s in scored])

            for future in [pool.submit(answer, task) for task in tasks]:
                try:
                    future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

    def _answer(self, endpoint: Any, task: Task, j: int) -> tuple[str, str]:
        """Ask for response `j` to a task; return its text and how it finished."""
        s = self.sampling
        with endpoint_errors(self.url):
            reply = endpoint.chat.completions.create(
                model=self.model, messages=task.messages, temperature=s.temperature, top_p=s.top_p,
                max_tokens=s.max_new_tokens, seed=zlib.crc32(f"{self.seed} {key_of(task)} {j}".encode()) >> 1,
            )  # fmt: skip
            choice = reply.choices[0]
            fields = {"content": "", **choice.message.model_dump(exclude_none=True), "role": "assistant"}
        message = {key: fields[key] for key in MESSAGE_FIELDS if key in fields}
        try:
            text = render_last(check_messages([*task.messages, message], strict=True), self.chat)
        except ChatError as error:
            raise ValueError(f"{self.url}: the template cannot write an answer to task {task.id!r}: {error}") from error
        return text, "length" if choice.finish_reason == "length" else "stop"


def render_last(messages: list[Any], chat: ChatTokenizer) -> str:
    """Render the last message as the template writes it, with its whole thought, without the token that ends a turn.

    Raises:
        ChatError: as `ChatTemplate.render_turns`; or the template leaves out the reasoning or a call.
    """
    text, turns = chat.template.render_turns(messages)
    end = chat.tokenizer.tokenizer.id_to_token(chat.end_id)
    assert end is not None
    turn, opens = turns[-1], chat.template.opens_thought
    written = text[turn.start : turn.end]
    if thought_of(messages[-1], opens) not in written:
        raise ChatError("the template leaves out the reasoning", f"message {turn.index}")
    if left_out := missing_content(messages[-1], turn.index, written, opens):
        raise left_out
    return opened_thought(text[: turn.start]) + written.rstrip().removesuffix(end)
