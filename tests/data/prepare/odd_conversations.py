"""Make conversations at random in which every piece of text has a word of its own, so that nothing can vanish unseen.

The pieces are odd on purpose: white space, Chinese, text that looks like control tokens or like a thought, empty
content, a thought or a call whose words stand in the answer as well. The same seed gives the same conversation.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

WORD = re.compile(r"w\d+x\d+q")  # w<seed>x<number>q: no word is a part of another
REASONING, CONTENT, CALL, TOOL = "reasoning", "content", "call", "tool"

ODD_TEXTS = (
    "{}", "{}.", "  {}\n\n", "\n{}\r\n", "北京{}你。", "{}\u200b\u2028🙂", '{{"k": "{}"}} \\n', "'{}' & <b>{{{{ x }}}}",
    "{}<|im_end|>\n<|im_start|>user\n", "<|endoftext|>{}</s>[INST]", "{}<|eot_id|>", "<think>{}", "{} %}} {{#",
    "é\x00{}",
)  # fmt: skip
ODD_ANSWERS = (*ODD_TEXTS, "Look: <think>{}</think> is a thought.")
BLANK = ("", " ", "\n\n")


@dataclass(frozen=True)
class Piece:
    """A word of a record: in which message (None: in the tools), what it belongs to, and how often it stands there."""

    word: str
    message: int | None
    kind: str
    count: int


@dataclass
class Conversation:
    """A record, what was put into it, and which of its messages are to be trained on.

    Attributes:
        fault: why the record is bad; None in a good one.
    """

    record: dict[str, Any]
    pieces: list[Piece]
    trained: set[int]
    reasoned: set[int]
    fault: str | None


@dataclass
class Author:
    """Writes one conversation."""

    seed: int
    random: Random = field(init=False)
    words: int = 0
    pieces: list[Piece] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    def conversation(self) -> Conversation:
        turns = self._messages()
        trained = {i for i, turn in enumerate(turns) if turn["role"] == "assistant" and self._mark(turn)}
        record = self._record(turns)
        if "prompt" in record:
            trained &= set(range(len(record["prompt"]) if isinstance(record["prompt"], list) else 1, len(turns)))
        if self._chance(0.35):
            record["tools"] = self._tools()
        if not trained:
            self.faults.append("every assistant turn is marked train: false")
        reasoned = {piece.message for piece in self.pieces if piece.kind == REASONING and piece.message is not None}
        return Conversation(record, self.pieces, trained, reasoned, "; ".join(self.faults) or None)

    # Messages ---------------------------------------------------------------------------------------------------------

    def _messages(self) -> list[dict[str, Any]]:
        """Write one to four questions and their answers, some with calls, as {role, content, ...}."""
        turns: list[dict[str, Any]] = []
        if self._chance(0.5):
            turns.append(self._turn(0, self._pick(["system", "developer"])))
        for _ in range(self.random.randint(1, 4)):
            turns.append(self._turn(len(turns), "user"))
            turns.append(self._answer(len(turns)))
            if "tool_calls" in turns[-1] or "function_call" in turns[-1]:
                turns.append(self._turn(len(turns), self._pick(["tool", "tool", "function"])))
                turns.append(self._answer(len(turns)))
        if self._chance(0.2):
            turns.append(self._turn(len(turns), "user"))
        return turns

    def _turn(self, index: int, role: str) -> dict[str, Any]:
        text = self._pick(BLANK) if self._chance(0.1) else self._text(index, CONTENT, ODD_TEXTS)
        if self._chance(0.02):
            text += "\ud83d"
            self.faults.append("not UTF-8")
        if self._chance(0.15):
            return {"role": role, "content": [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]}
        return {"role": role, "content": text}

    def _answer(self, index: int) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": "assistant", "content": self._text(index, CONTENT, ODD_ANSWERS)}
        if self._chance(0.3):
            self._call(index, turn)
        if self._chance(0.5):
            self._reason(index, turn)
        return turn

    def _reason(self, index: int, turn: dict[str, Any]) -> None:
        """Add a thought, in one of its spellings."""
        thought = self._text(index, REASONING, ("{}", "{}\n\n{}", "想{}。", "\n{}\n", '"{}" <|im_end|>'))
        spelling = self._pick(
            ["reasoning_content", "thinking", "reasoning", "inline", "tight", "closed", "twice", "differ"]
        )
        content = turn["content"] or ""
        if spelling == "inline":
            turn["content"] = f"<think>\n{thought}\n</think>\n\n{content}"
        elif spelling == "tight":
            turn["content"] = f"<think>{thought}</think>{content}"
        elif spelling == "closed":
            turn["content"] = f"{thought}\n</think>\n\n{content}"
        elif spelling == "twice":
            turn |= {"thinking": thought, "reasoning": thought, "reasoning_content": None}
        elif spelling == "differ" and self._chance(0.2):
            turn |= {"thinking": thought, "reasoning": thought + "!"}
            self.faults.append("thinking and reasoning differ")
        else:
            turn["reasoning_content" if spelling == "differ" else spelling] = thought
        if self._chance(0.2):  # the answer repeats a word of the thought
            word = self._again(index, REASONING, CONTENT)
            turn["content"] = (turn["content"] or "") + word

    def _call(self, index: int, turn: dict[str, Any]) -> None:
        """Add one or two calls, in one of their spellings, beside content or not."""
        calls = []
        for _ in range(1 if self._chance(0.6) else 2):
            value = self._text(index, CALL, ODD_TEXTS)
            arguments: Any = {
                self._word(index, CALL): value,
                "deep": [1, None, {"k": self._text(index, CALL, ODD_TEXTS)}],
            }
            if self._chance(0.5):
                arguments = json.dumps(arguments, ensure_ascii=self._chance(0.5))
            calls.append({"name": self._word(index, CALL), "arguments": arguments})
        if len(calls) == 1 and self._chance(0.4):
            turn["function_call"] = calls[0]
        elif self._chance(0.3):
            turn["tool_calls"] = calls
        else:
            turn["tool_calls"] = [{"id": "c1", "type": "function", "function": call} for call in calls]
        beside = self.random.random()
        if beside < 0.4:  # no content beside the calls
            self.pieces = [p for p in self.pieces if (p.message, p.kind) != (index, CONTENT)]
            turn["content"] = self._pick([None, "", " "])
        elif beside < 0.7:  # the content names the function
            turn["content"] += " " + self._again(index, CALL, CONTENT)

    def _mark(self, turn: dict[str, Any]) -> bool:
        """Mark some turns; return whether this one is to be trained on."""
        key, value = self._pick([("train", True), ("loss", True), ("weight", 1), ("weight", 1.0), ("train", None)])
        if self._chance(0.2):
            key, value = self._pick([("train", False), ("loss", False), ("weight", 0)])
        elif self._chance(0.02):
            key, value = self._pick([("weight", 0.5), ("loss", "no"), ("train", "false")])
            self.faults.append(f"{key} is neither")
        if self._chance(0.5) or value not in (True, None):
            turn[key] = value
            return value is None or bool(value)
        return True

    # Records ----------------------------------------------------------------------------------------------------------

    def _record(self, turns: list[dict[str, Any]]) -> dict[str, Any]:
        form = self._pick(["messages", "messages", "sharegpt", "prompt"])
        if form == "sharegpt":
            return {"conversations": list(map(_sharegpt, turns))}
        if form == "prompt":
            cut = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
            return {"prompt": turns[:cut], "completion": turns[cut:]}
        return {"messages": turns, "system": None}

    def _tools(self) -> Any:
        tools = []
        for _ in range(self.random.randint(1, 2)):
            parameters = {"type": "object", "properties": {self._word(None, TOOL): {"type": "string"}}}
            about = self._text(None, TOOL, ODD_TEXTS)
            tool = {"name": self._word(None, TOOL), "description": about, "parameters": parameters}
            tools.append({"type": "function", "function": tool} if self._chance(0.7) else tool)
        return json.dumps(tools) if self._chance(0.3) else tools

    # Pieces -----------------------------------------------------------------------------------------------------------

    def _text(self, message: int | None, kind: str, forms: tuple[str, ...]) -> str:
        form = self._pick(forms)
        word = self._word(message, kind, form.count("{}"))
        return form.format(*[word] * form.count("{}"))

    def _word(self, message: int | None, kind: str, count: int = 1) -> str:
        self.words += 1
        word = f"w{self.seed}x{self.words}q"
        self.pieces.append(Piece(word, message, kind, count))
        return word

    def _again(self, message: int, of: str, kind: str) -> str:
        """Repeat the last word of kind `of` in the message as a piece of `kind`."""
        word = next(p.word for p in reversed(self.pieces) if (p.message, p.kind) == (message, of))
        self.pieces.append(Piece(word, message, kind, 1))
        return word

    def _pick(self, choices: Any) -> Any:
        return self.random.choice(choices)

    def _chance(self, probability: float) -> bool:
        return self.random.random() < probability


def _sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "tool": "observation", "function": "function_response"}
    rest = {key: value for key, value in turn.items() if key not in ("role", "content")}
    if "function_call" in rest and not turn["content"]:
        return {"from": "function_call", "value": json.dumps(rest.pop("function_call")), **rest}
    return {"from": names.get(turn["role"], turn["role"]), "value": turn["content"], **rest}


def count_words(text: str) -> Counter[str]:
    return Counter(WORD.findall(text))
