"""Read the conversation of a record, in every form that public sets have.

| a record has | which is |
|---|---|
| `messages` | a list of {role, content, ...} (nb_lightning/text/messages.py) |
| `conversations` | ShareGPT's list of {from, value} |
| `prompt` and `completion` | two texts (a user's and an assistant's turn), or two lists of messages |
| `instruction` and `output` | Alpaca's texts (data/prepare/other_forms.py) |

and may have `tools` (a list, or its JSON; or `functions`, OpenAI's earlier form), `system` (a text) and
`chat_template_kwargs` (variables of the template, an object or its JSON, which win over the command's).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data.prepare.other_forms import ALPACA, alpaca_prompt, from_sharegpt
from nb_lightning.text.messages import ChatError, check_json, check_messages, is_trained
from nb_lightning.text.thoughts import without_thought
from nb_lightning.text.variables import check_variables

TOOLS, VARIABLES = ("tools", "functions"), "chat_template_kwargs"
FIELDS = ("messages", "conversations", "prompt", "completion", *ALPACA, *TOOLS, "system", VARIABLES)


@dataclass(frozen=True)
class Chat:
    """A checked conversation.

    Attributes:
        trained: indices of the messages to train on.
        question: number of messages before the first answer to a user, by which conversations are held out.
        variables: of the template, in this conversation.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    trained: frozenset[int]
    question: int
    variables: dict[str, Any] = field(default_factory=dict)


def chat_of(record: Mapping[str, Any]) -> Chat:
    """Check a record's conversation.

    Raises:
        ChatError: the record has no conversation, or a bad one.
    """
    fields = {key: value for key, value in record.items() if value is not None}
    context = 0  # number of messages before the completion
    if "messages" in fields:
        messages = fields["messages"]
    elif "conversations" in fields:
        messages = from_sharegpt(fields["conversations"])
    elif "prompt" in fields and "completion" in fields:
        prompt = messages_of(fields["prompt"], "user", "prompt")
        messages = [*prompt, *messages_of(fields["completion"], "assistant", "completion")]
        context = len(prompt)
    elif "instruction" in fields and "output" in fields:
        messages = [*alpaca_prompt(fields), {"role": "assistant", "content": fields["output"]}]
    else:
        raise ChatError("no messages", detail=f": it has {', '.join(map(str, fields)) or 'nothing'}")
    checked = check_messages(messages, strict=True)
    if fields.get("system"):
        messages, context = with_system(messages, checked, fields["system"]), context + 1
        checked = check_messages(messages, strict=True)
    roles = [message["role"] for message in checked]
    assistant = [i for i, role in enumerate(roles) if role == "assistant" and i >= context]
    if not assistant:
        raise ChatError("no assistant turn")
    trained = frozenset(i for i in assistant if is_trained(messages[i]))
    if not trained:
        raise ChatError("every assistant turn is marked train: false")
    answers = [i for i in assistant if "user" in roles[:i]] or assistant
    chat = Chat(checked, tools_of(fields), trained, answers[0], variables_of(fields))
    _require_written(chat)
    return chat


def without_thoughts(chat: Chat, prompt_opens: bool) -> Chat:
    """Remove the reasoning from a conversation.

    Args:
        prompt_opens: see `nb_lightning.text.thoughts.split_thought`.

    Raises:
        ChatError: nothing is left of a turn to train on.
    """
    chat = replace(chat, messages=[without_thought(message, prompt_opens) for message in chat.messages])
    _require_written(chat)
    return chat


def _require_written(chat: Chat) -> None:
    for i in chat.trained:
        if not any(chat.messages[i].get(key) for key in ("content", "reasoning_content", "tool_calls")):
            raise ChatError("an empty assistant turn", f"message {i}")


def with_system(messages: list[Any], checked: list[dict[str, Any]], system: Any) -> list[Any]:
    """Put a record's `system` before its messages, which `checked` holds as they were checked."""
    if checked[0]["role"] == "system":
        raise ChatError("two system prompts")
    return [{"role": "system", "content": system}, *messages]


def messages_of(value: Any, role: str, name: str) -> list[Any]:
    """Read the field `name`: a list of messages, or a text, which becomes one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ChatError(f"{name} is neither a text nor a list of messages")
    return value


def tools_of(fields: Mapping[str, Any]) -> list[Any] | None:
    """Read the field `tools`, or `functions`: a list, or its JSON."""
    lists = {name: tools for name in TOOLS if (tools := _objects(fields.get(name), name))}
    if len(lists) > 1:
        raise ChatError("both tools and functions")
    if "functions" in lists:
        return [f if "function" in f else {"type": "function", "function": f} for f in lists["functions"]]
    return lists.get("tools")


def _objects(value: Any, name: str) -> list[Any] | None:
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ChatError(f"{name} are not JSON") from None
    if value is None or value == "":
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise ChatError(f"{name} are not a list of objects")
    check_json(value, name)
    return value


def variables_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read the field `chat_template_kwargs`; null variables are left out, as tables fill them in."""
    value = fields.get(VARIABLES, "")
    variables = {} if value == "" else check_variables(value, VARIABLES)
    return {key: variable for key, variable in variables.items() if variable is not None}


def question_of(messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
    """Write the messages before the first answer, and the tools, as one text."""
    return json.dumps([messages, tools], ensure_ascii=False, sort_keys=True)
