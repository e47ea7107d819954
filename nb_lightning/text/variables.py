"""Variables of a chat template beside the messages: `enable_thinking`, `tool_call_format` and what else it reads.

They are JSON values by name, as transformers' `apply_chat_template` takes them by keyword. They come from a command
(`--template-kwargs`), from the config (`data.template_kwargs`), or from a record or request (`chat_template_kwargs`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nb_lightning.text.messages import ChatError, check_json

# What every conversation has, and the special tokens, which are the tokenizer's.
RESERVED = (
    *("messages", "tools", "add_generation_prompt"),
    *("bos_token", "eos_token", "pad_token", "unk_token"),
)
Variables = Mapping[str, Any]


def check_variables(value: Any, name: str = "chat_template_kwargs") -> dict[str, Any]:
    """Check variables, which may be given as the JSON of an object.

    Args:
        name: how an error names them.

    Raises:
        ChatError: they are no object, cannot be written as JSON, or have a reserved name.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ChatError(f"{name} is not JSON", detail='; write it as {"enable_thinking": false}') from None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ChatError(f"{name} is not a JSON object", detail='; write it as {"enable_thinking": false}')
    check_json(value, name)
    for key in value:
        if key in RESERVED:
            raise ChatError(f"{name} sets {key}", detail=f"; reserved are {', '.join(RESERVED)}")
    return dict(value)
