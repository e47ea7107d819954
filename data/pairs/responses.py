"""Sample and score responses to tasks: calls to an engine, then pure functions of their replies.

The replies are in the caller's journal, so a stopped run resumes with the calls that are left. Every call has a seed
derived from the task and the response's number, so the result does not depend on the stops.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from data.calls.call import Call, Reply, join_seeds
from data.calls.caller import Caller
from data.calls.engine import Engine
from data.calls.local import LocalModel
from nb_lightning.generation.sampling import Sampling
from nb_lightning.rewards.registry import get_verifiers
from nb_lightning.rewards.tasks import Task
from nb_lightning.rewards.verifier import SCORING_THREADS, score_texts
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.left_out import compare_turn
from nb_lightning.text.messages import REASONING, ChatError, check_messages
from nb_lightning.text.thoughts import opened_thought

MESSAGE_FIELDS = ("role", "content", *REASONING, "tool_calls", "function_call")  # what is read of a reply


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


@dataclass(frozen=True)
class Responses:
    """All responses of a model.

    Attributes:
        by_task: a task's key -> its responses.
        unwritable: why the student's template cannot write a reply -> how many such replies there are. They are no
            responses, and neither are failed calls.
    """

    by_task: dict[str, list[Response]]
    unwritable: dict[str, int]


@dataclass(frozen=True)
class Sampler:
    """Who answers tasks, and how.

    Attributes:
        role: "teacher" or "student".
        k: responses to each task.
        seed: of all responses, together with the task and the response's number.
        chat: writes an endpoint's replies in the student's template; None for a model on this machine, whose replies
            are that text already.
    """

    role: str
    engine: Engine
    sampling: Sampling
    k: int
    seed: int
    chat: ChatTokenizer | None = None

    def calls(self, task: Task) -> list[Call]:
        """Return the calls for the responses to a task."""
        seed = join_seeds(self.seed, zlib.crc32(task.key.encode()))
        return [Call(task.messages, self.sampling, seed, j, task.tools) for j in range(self.k)]

    def text(self, task: Task, reply: Reply) -> str:
        """Return a reply as text in the student's template.

        Raises:
            ChatError: the template cannot write it.
        """
        if self.chat is None:
            return reply.message["content"]
        message = {key: reply.message[key] for key in MESSAGE_FIELDS if key in reply.message}
        return render_last(check_messages([*task.messages, message], strict=True), self.chat, task.tools)

    def sample(self, tasks: Sequence[Task], caller: Caller) -> Responses:
        """Answer and score all tasks."""
        replies = iter(caller.ask(self.engine, [call for task in tasks for call in self.calls(task)], self.role))
        if isinstance(self.engine, LocalModel):
            self.engine.unload()  # the next model may need the memory
        texts: dict[str, list[tuple[str, str]]] = {}  # with finish
        unwritable: dict[str, int] = {}
        for task in tasks:
            written = texts.setdefault(task.key, [])
            for reply in (next(replies) for _ in range(self.k)):
                if reply is None:
                    continue
                try:
                    written.append((self.text(task, reply), "length" if reply.is_cut else "stop"))
                except ChatError as error:
                    unwritable[error.kind] = unwritable.get(error.kind, 0) + 1
        return Responses(score_all(tasks, texts, self.role), unwritable)


def score_all(tasks: Sequence[Task], texts: dict[str, list[tuple[str, str]]], role: str) -> dict[str, list[Response]]:
    """Score texts by the verifiers of their tasks, which run model-written code in their own processes.

    Args:
        texts: a task's key -> the texts of its responses, and how each finished.
    """
    verifiers = get_verifiers(tasks) if tasks else {}

    def score(task: Task) -> list[Response]:
        written = texts[task.key]
        if not written:
            return []
        scores = score_texts(verifiers, task, [text for text, _ in written])
        return [Response(text, finish, s.reward, s.info["status"]) for (text, finish), s in zip(written, scores)]

    with ThreadPoolExecutor(SCORING_THREADS) as threads:
        scored = tqdm(threads.map(score, tasks), f"{role}, scores", len(tasks), unit="prompt", disable=None)
        return {task.key: responses for task, responses in zip(tasks, scored)}


def render_last(messages: list[Any], chat: ChatTokenizer, tools: Sequence[Any] | None = None) -> str:
    """Render the last message as the template writes it, with its whole thought, without the token that ends a turn.

    Raises:
        ChatError: as `ChatTemplate.render_turns`; or the template leaves out the reasoning or a call.
    """
    text, turns = chat.template.render_turns(messages, tools)
    end = chat.tokenizer.tokenizer.id_to_token(chat.end_id_of(bool(tools)))
    assert end is not None
    turn, opens = turns[-1], chat.template.opens_thought
    written = text[turn.start : turn.end]
    has_thought, left_out = compare_turn(messages[-1], turn.index, written, opens)
    if not has_thought:
        raise ChatError("the template leaves out the reasoning", f"message {turn.index}")
    if left_out is not None:
        raise left_out
    return opened_thought(text[: turn.start]) + written.rstrip().removesuffix(end)
