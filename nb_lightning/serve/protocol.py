"""Requests: the fields of OpenAI's API that are supported, with their types and ranges.

An unsupported field is refused if it would change the text, and ignored if not.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TOP_LOGPROBS = 20
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# Unsupported fields with the only value that is accepted, because it has no effect.
NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "echo": False,
    "suffix": "",
    "best_of": 1,
}
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[Token], Field(min_length=1)]


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """The fields that chat completions and completions share; None means the default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)  # not in OpenAI's API; 0 keeps all tokens
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_fields_without_effect(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in NEUTRAL.items():
            if data.get(name) is not None and data[name] != neutral:
                raise ValueError(f"{name} is not supported by this server")
        return {name: value for name, value in data.items() if name not in IGNORED and name not in NEUTRAL}

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(GenerationRequest):
    """A request for a chat completion; the chat template checks its messages (nb_lightning/text/messages.py)."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # not in OpenAI's API; variables of the template

    @field_validator("messages")
    @classmethod
    def _one_string_of_content(cls, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        checked = []
        for number, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, list):
                parts = (part for part in content if isinstance(part, dict) and part.get("type") == "text")
                texts = [text for part in parts if isinstance(text := part.get("text"), str)]
                if len(texts) < len(content):
                    raise ValueError(f"message {number}: content may have parts of type text only")
                message = {**message, "content": "".join(texts)}
            checked.append({**message, "role": "system"} if message.get("role") == "developer" else message)
        return checked

    @field_validator("tools")
    @classmethod
    def _functions_with_names(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for number, tool in enumerate(tools or []):
            function = tool.get("function")
            if (
                tool.get("type") != "function"
                or not isinstance(function, dict)
                or not isinstance(function.get("name"), str)
            ):
                raise ValueError(f'tool {number} is not {{"type": "function", "function": {{"name": ...}}}}')
        return tools

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionRequest(GenerationRequest):
    """A request for completions of one or several prompts, as text or as token ids."""

    prompt: str | Annotated[list[str] | list[Token] | list[Tokens], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):  # one prompt of token ids
            return [cast(list[int], self.prompt)]
        return cast(list[str | list[int]], self.prompt)
