"""A model on this machine as an engine: a run, a checkpoint, a Hugging Face folder or a .gguf file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from data.calls.call import Call, Failure, Reply, join_seeds
from data.calls.engine import TOO_LONG, OnReply
from nb_lightning.checkpoints.pretrained import Origin, Pretrained, find_origin, load_pretrained
from nb_lightning.generation.decoder import MAX_BATCH, Completion, Request, stream
from nb_lightning.run_folder import CHECKPOINTS
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.messages import ChatError
from nb_lightning.text.variables import Variables

REFUSED = "the chat template refuses the messages"  # the reason of a failure
NO_VARIABLES: Variables = {}


class LocalModel:
    """A model on this machine. What it writes to a call depends on the call alone, not on those beside it.

    The content of its replies is the text as it is written, with the thought that the prompt opens, without the token
    that ends the turn.

    Args:
        path: of the model.
        template: Jinja source of the chat template; None takes the model's own, or ChatML.
        variables: of the template, such as `enable_thinking`.
        max_batch: calls answered at a time.
        device, dtype: as in `load_pretrained`.
    """

    def __init__(
        self, path: str, template: str | None = None, max_batch: int = MAX_BATCH, device: str = "auto",
        dtype: str = "auto", variables: Variables = NO_VARIABLES,
    ) -> None:  # fmt: skip
        self.path, self.template, self.variables = path, template, dict(variables)
        self.max_batch, self.device, self.dtype = max_batch, device, dtype
        self._loaded: Pretrained | None = None

    def about(self) -> dict[str, Any]:
        return dict(self._about)

    @cached_property
    def _about(self) -> dict[str, Any]:
        origin = self._origin
        parts = origin.path.resolve().parts
        name = f"{parts[-3]}/{parts[-1]}" if parts[-2] == CHECKPOINTS else parts[-1]  # run and checkpoint
        # Of the prompts: equal weights may lie beside another tokenizer or template.
        form = json.dumps([self.chat.tokenizer.digest, self.chat.template.source])
        about: dict[str, Any] = {"name": name, "digest": origin.digest()}
        about["prompts"] = hashlib.sha256(form.encode()).hexdigest()
        if self.variables:
            about["template_kwargs"] = self.variables
        return about

    @cached_property
    def chat(self) -> ChatTokenizer:
        """The tokenizer with the chat template that prompts are written in."""
        return ChatTokenizer.of(self._origin.tokenizer(), self.template).with_variables(self.variables)

    @property
    def context(self) -> int | None:
        """Tokens that a prompt must stay below; None if the model's files do not say."""
        return self._origin.context

    @cached_property
    def _origin(self) -> Origin:
        return find_origin(self.path)

    def unload(self) -> None:
        """Free the weights. The next call loads them again."""
        self._loaded = None

    def answer(self, calls: Sequence[Call], on_reply: OnReply) -> None:
        if self._loaded is None:
            self._loaded = load_pretrained(self.path, self.device, self.dtype)
        batch = _Batch(self, self._loaded, calls, on_reply)
        for number, completion in stream(self._loaded.model, batch.requests(), self.max_batch):
            assert isinstance(number, int)
            batch.finish(number, completion)
        if batch.error is not None:
            raise batch.error


class _Batch:
    """The calls of one `answer`: they become requests as rows become free, and completions become replies."""

    def __init__(self, model: LocalModel, loaded: Pretrained, calls: Sequence[Call], on_reply: OnReply) -> None:
        self.chat, self.calls, self.on_reply = model.chat, calls, on_reply
        self.context = model.context
        self.stop_ids = (*loaded.stop_ids, *self.chat.end_ids)
        self.error: Exception | None = None  # the first that `on_reply` raised
        self._prompts: dict[int, tuple[int, str]] = {}  # running call -> tokens of its prompt, the thought it opens

    def requests(self) -> Iterator[Request]:
        """Yield the calls that can be answered, until `on_reply` raises; report the others."""
        asked, encoded = None, None
        for number, call in enumerate(self.calls):
            if self.error is not None:
                return
            if asked is None or call.messages is not asked.messages or call.tools is not asked.tools:
                asked, encoded = call, self._encode(call)  # several calls in a row may ask the same
            if isinstance(encoded, Failure):
                self._report(number, encoded)
                continue
            assert encoded is not None
            self._prompts[number] = len(encoded), self.chat.opened_thought(encoded)
            sampling = replace(call.sampling, stop_ids=(*call.sampling.stop_ids, *self.stop_ids))
            yield Request(number, encoded, sampling, join_seeds(call.seed, call.number))

    def finish(self, number: int, completion: Completion) -> None:
        """Report the reply to a call."""
        prompt_tokens, opening = self._prompts.pop(number)
        ids = completion.ids[:-1] if completion.finish_reason == "stop" else completion.ids
        message = {"role": "assistant", "content": opening + self.chat.tokenizer.decode(ids)}
        self._report(number, Reply(message, completion.finish_reason, prompt_tokens, len(completion.ids)))

    def _encode(self, call: Call) -> list[int] | Failure:
        try:
            ids = self.chat.prompt(call.messages, call.tools, require_tools=True)
        except ChatError as error:
            return Failure(REFUSED, str(error))
        if self.context is not None and len(ids) >= self.context:
            return Failure(TOO_LONG, f"{len(ids):,} tokens of prompt, {self.context:,} of context")
        return ids

    def _report(self, number: int, result: Reply | Failure) -> None:
        try:
            self.on_reply(number, result)
        except Exception as error:
            self.error = self.error or error
