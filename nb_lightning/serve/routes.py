"""The process that answers HTTP: requests become rows for the worker, its tokens become responses."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from litserve import LitAPI, LitServer
from litserve.specs.base import LitSpec
from litserve.utils import ResponseBufferItem
from starlette.exceptions import HTTPException as AnyHTTPException

from nb_lightning.generation.decoder import NewToken
from nb_lightning.generation.sampling import Sampling
from nb_lightning.serve.engine import FAILED, STEPS
from nb_lightning.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest
from nb_lightning.serve.replies import CHAT, TEXT, Choice, Delta, Job
from nb_lightning.serve.text_stream import REASONING, TOOL_CALL, TokenBytes
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.messages import ChatError
from nb_lightning.text.tokenizer import TextTokenizer
from nb_lightning.text.variables import Variables

T = TypeVar("T")
COMPLETION_TOKENS = 16  # OpenAI's default for completions
CLIENT_CLOSED_REQUEST = 499  # nginx's status; nobody reads it


@dataclass(frozen=True)
class ServedModel:
    """What the routes know about the model.

    Attributes:
        context: tokens of prompt and completion together, at most.
        defaults: `temperature`, `top_p` and `top_k` of requests that do not set them.
        max_rows: completions that run and wait at the same time, at most.
        reasoning: return <think> ... </think> as `reasoning_content` instead of in the content.
    """

    name: str
    tokenizer: TextTokenizer
    chat: ChatTokenizer | None
    stop_ids: tuple[int, ...]
    vocab_size: int
    context: int
    defaults: Mapping[str, float]
    max_rows: int
    reasoning: bool = False


class OpenAI(LitSpec):
    """The routes, and the rows that the worker decodes for them."""

    # LitSpec leaves these None until `setup`.
    response_buffer: dict[str, ResponseBufferItem]
    request_queue: Any
    data_streamer: Callable[..., AsyncIterator[list[NewToken]]]

    def __init__(self, served: ServedModel) -> None:
        super().__init__()
        self.api_path = "/v1/chat/completions"  # also the name of LitServe's queue to the worker
        self.served = served
        self.token_bytes = TokenBytes(served.tokenizer.tokenizer)
        self._threads = ThreadPoolExecutor(2)
        self._keys = itertools.count()
        self._rows: dict[Hashable, asyncio.Queue[NewToken]] = {}
        self._listener: asyncio.Task[None] | None = None

    @property
    def stream(self) -> bool:
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {"api_path": self.api_path}  # the worker needs no more

    def pre_setup(self, lit_api: LitAPI) -> None:
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/v1/models/{name:path}", self.model, ["GET"])
        self.add_endpoint("/v1/chat/completions", self.chat, ["POST"])
        self.add_endpoint("/v1/completions", self.completions, ["POST"])

    def setup(self, server: LitServer) -> None:
        super().setup(server)
        self.response_buffer[STEPS] = ResponseBufferItem(asyncio.Event(), response_queue=deque())

    # Routes

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self.model(self.served.name)]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return {"id": name, "object": "model", "created": 0, "owned_by": "nb_lightning"}

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self._check_model(body.model)
        tools = body.tools if body.tool_choice != "none" else None
        variables = body.chat_template_kwargs or {}
        prompt, is_reasoning = await self._in_thread(self._render, body.messages, tools, variables)
        job = self._make_job(
            CHAT,
            body,
            [prompt],
            body.max_completion_tokens or body.max_tokens,
            body.top_logprobs,
            logprobs=bool(body.logprobs),
            tags=[REASONING] * self.served.reasoning + [TOOL_CALL] * bool(tools),
            inside=REASONING if is_reasoning and self.served.reasoning else "",
        )
        return await self._respond(job, body, request)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        self._check_model(body.model)
        prompts = await self._in_thread(lambda: [self._encode(prompt) for prompt in body.prompts])
        tokens, logprobs = body.max_tokens or COMPLETION_TOKENS, body.logprobs is not None
        return await self._respond(
            self._make_job(TEXT, body, prompts, tokens, body.logprobs, logprobs=logprobs), body, request
        )

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run work in a thread of our pool; LitServe's pool receives the tokens."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    # From requests to jobs

    def _check_model(self, name: str) -> None:
        if name != self.served.name:
            message = f"there is no model {name!a}; this server has {self.served.name!r}"
            raise refusal(message, 404, "model", "model_not_found")

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, variables: Variables
    ) -> tuple[list[int], bool]:
        """Return the prompt's token ids, and whether it ends inside reasoning."""
        if self.served.chat is None:
            raise refusal("this model has no chat template; use /v1/completions")
        try:
            chat = self.served.chat.with_variables(variables)
        except (ChatError, UnicodeEncodeError, RecursionError) as error:
            raise refusal(str(error), param="chat_template_kwargs") from error
        try:
            ids = chat.prompt(messages, tools)
        except (ChatError, UnicodeEncodeError, RecursionError) as error:
            raise refusal(f"messages: {error}", param="messages") from error
        return ids, bool(self.served.chat.opened_thought(ids))

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):  # with the tokenizer's first token, if it has one
            prompt = self.served.tokenizer.tokenizer.encode(prompt).ids
        return prompt or [self.served.tokenizer.eos_id]  # an empty prompt is the beginning of a document

    def _make_job(
        self,
        kind: str,
        body: GenerationRequest,
        prompts: list[list[int]],
        tokens: int | None,
        top_logprobs: int | None,
        **form: Any,
    ) -> Job:
        """Check a request against the model's limits.

        Args:
            tokens: of the completion, at most; None: as many as the context has room for.
            form: the fields of `Job` that say how the response looks.

        Raises:
            HTTPException: the request is refused.
        """
        served, n = self.served, body.n or 1
        rows, longest = len(prompts) * n, max(map(len, prompts))
        left = served.context - longest
        if left < (tokens or 1):
            wanted = f" and {tokens} of completion" if tokens else ""
            message = f"{longest} tokens of prompt{wanted}; this model's context is {served.context} tokens"
            raise refusal(message, code="context_length_exceeded")
        if max(map(max, prompts)) >= served.vocab_size:
            raise refusal(f"prompt: the model's tokens are 0 to {served.vocab_size - 1}", param="prompt")
        if rows > served.max_rows:
            raise refusal(f"{rows} completions in one request; this server takes {served.max_rows}", param="n")
        if rows + len(self._rows) > served.max_rows:
            raise refusal("the queue is full; try again later", 429, code="queue_full")
        settings = {**served.defaults, **body.model_dump(include={"temperature", "top_p", "top_k"}, exclude_none=True)}
        sampling = Sampling(tokens or left, stop_ids=served.stop_ids, top_logprobs=top_logprobs or 0, **settings)
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
        return Job(kind, body.model, prompts, n, sampling, seed, self.token_bytes, stops=body.stops, **form)

    # From jobs to responses

    async def _respond(self, job: Job, body: GenerationRequest, request: Request) -> Response:
        deltas = self._deltas(job)
        try:
            if body.stream:
                first = await _unless_gone(request, anext(deltas))  # errors up to here still set the status
                usage = bool(body.stream_options and body.stream_options.include_usage)
                return StreamingResponse(_events(job, first, deltas, usage), media_type="text/event-stream")
            return _json(await _unless_gone(request, _complete_body(job, deltas)))
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def _deltas(self, job: Job) -> AsyncGenerator[Delta, None]:
        """Send the job's rows to the worker and yield what is new in them; closing the generator cancels them."""
        if self._listener is None:
            self._listener = asyncio.create_task(self._listen())
        queue: asyncio.Queue[NewToken] = asyncio.Queue()
        running: dict[Hashable, Choice] = {next(self._keys): choice for choice in job.choices}
        self._rows |= dict.fromkeys(running, queue)
        try:
            rows = ((key, job.prompts[choice.index // job.n], choice.index) for key, choice in running.items())
            self._send("add", [(key, prompt, job.sampling, [job.seed, index]) for key, prompt, index in rows])
            while running:
                new: defaultdict[Hashable, list[NewToken]] = defaultdict(list)
                token = await queue.get()
                new[token.key].append(token)
                while not queue.empty():  # several, if the client reads slowly
                    token = queue.get_nowait()
                    new[token.key].append(token)
                for key in new.keys() & running.keys():  # not tokens after a stop string
                    if any(token.finish_reason == FAILED for token in new[key]):
                        raise HTTPException(500, "the model failed; see the server's log")
                    delta = running[key].add(new[key])
                    if delta.finish_reason:
                        del running[key], self._rows[key]
                        self._send("cancel", [key])
                    if delta.fields or delta.tokens or delta.finish_reason:
                        yield delta
        finally:
            if running:
                self._rows = {key: queue for key, queue in self._rows.items() if key not in running}
                self._send("cancel", list(running))

    def _send(self, action: str, rows: list[Any]) -> None:
        self.request_queue.put((0, None, time.monotonic(), (action, rows)))

    async def _listen(self) -> None:
        item = self.response_buffer[STEPS]
        async for tokens in self.data_streamer(item.response_queue, item.event):
            for token in tokens:
                if token.key in self._rows:
                    self._rows[token.key].put_nowait(token)


async def _complete_body(job: Job, deltas: AsyncIterator[Delta]) -> dict[str, Any]:
    choices = [Delta(choice.index) for choice in job.choices]
    async for delta in deltas:
        choices[delta.index].extend(delta)
    return job.body(choices, is_chunk=False, usage=job.usage())


async def _events(job: Job, first: Delta, deltas: AsyncGenerator[Delta, None], usage: bool) -> AsyncIterator[str]:
    """Yield server-sent events, a chunk for each delta."""
    more = {"usage": None} if usage else {}
    async with aclosing(deltas):
        try:
            if job.kind == CHAT:
                role = [Delta(choice.index, [("role", "assistant"), ("content", "")]) for choice in job.choices]
                yield _event(job.body(role, is_chunk=True, **more))
            yield _event(job.body([first], is_chunk=True, **more))
            async for delta in deltas:
                yield _event(job.body([delta], is_chunk=True, **more))
        except HTTPException as error:  # the status is sent already
            yield _event(_error_body(error.status_code, str(error.detail)))
            return
    if usage:
        yield _event(job.body([], is_chunk=True, usage=job.usage()))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


class ClientGone(Exception):
    """The client closed the connection before it had a response."""


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`, but cancel it if the client closes the connection.

    Starlette does that only while a response streams.

    Raises:
        ClientGone: the client closed the connection.
    """

    async def wait_until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def run() -> T:
        return await work

    tasks = asyncio.create_task(run()), asyncio.create_task(wait_until_gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


# Errors


def refusal(message: str, status: int = 400, param: str | None = None, code: str | None = None) -> HTTPException:
    return HTTPException(status, {"message": message, "param": param, "code": code})


def _error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    kind = "server_error" if status >= 500 else kind
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(request: Request, error: Exception) -> Response:
    """Return any error in OpenAI's shape."""
    if isinstance(error, RequestValidationError):
        problems = [(".".join(map(str, e["loc"][1:])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        message = "; ".join(f"{field}: {problem}" if field else problem for field, problem in problems[:3])
        return _json(_error_body(400, message, problems[0][0] or None), 400)
    if isinstance(error, AnyHTTPException):  # FastAPI's too, whose detail may be a dict
        detail = error.detail if isinstance(error.detail, dict) else {"message": str(error.detail)}
        return _json(_error_body(error.status_code, **detail), error.status_code, error.headers)
    return _json(_error_body(500, "internal error; see the server's log"), 500)


def add_error_handlers(app: FastAPI) -> None:
    for kind in (RequestValidationError, AnyHTTPException, Exception):
        app.add_exception_handler(kind, error_response)


def _json(body: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, headers, media_type="application/json")
