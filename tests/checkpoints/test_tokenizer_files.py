"""Folders of tokenizers are read as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.text.chat_tokens import ChatTokenizer, ends_of_turn
from nb_lightning.text.messages import ChatError

DEFAULT = """{% for m in messages %}
    {%- if true %}
    <|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""
TOOL_USE = """
  {% set note = "TOOLS" %}
{{ note }} {{ tools | tojson }}
{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content or "" }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}
  """  # noqa: E501
WITH_BOS = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
ASK, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}],
}


def folder_of(path: Path, config: dict[str, Any], **files: Any) -> Path:
    """A folder with the byte tokenizer; `a__b` in the name of a file stands for a folder and a dot."""
    load_tokenizer("bytes").save(path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    for name, content in {"tokenizer_config": config, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def with_templates(path: Path, place: str) -> Path:
    """DEFAULT and TOOL_USE in the config, as files, or the default in a file and the other in a folder beside it."""
    named = [{"name": "default", "template": DEFAULT}, {"name": "tool_use", "template": TOOL_USE}]
    folder = folder_of(path, {"chat_template": named} if place == "config" else {})
    if place == "files":
        (folder / "chat_template.jinja").write_text(DEFAULT)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tool_use.jinja").write_text(TOOL_USE)
    return folder


@pytest.mark.parametrize("place", ["config", "files"])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [False, True])
def test_a_conversation_with_tools_has_the_template_of_its_own(
    tmp_path: Path, place: str, tools: Any, prompt: bool
) -> None:
    folder = with_templates(tmp_path, place)
    messages = [ASK, CALL, {"role": "tool", "content": "2"}] if tools else [ASK, ANSWER, ASK]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompt, tokenize=False
    )
    ours = ChatTokenizer.of(load_tokenizer(str(folder))).template
    assert ours.render(messages, tools, prompt) == theirs
    assert ("TOOLS" in theirs) == bool(tools)


def test_turns_are_found_in_both_templates(tmp_path: Path) -> None:
    """The prompts of the two differ, and so do their ends of turn."""
    template = "{%% for m in messages %%}%s{{ m.role }}\n{{ m.content }}%s{%% endfor %%}"
    template += "{%% if add_generation_prompt %%}%sassistant\n{%% endif %%}"
    kinds = {"default": ("<|im_start|>", "<|im_end|>"), "tool_use": ("<|im_start|>TOOLS ", "<|pad|>")}
    named = [{"name": name, "template": template % (start, end, start)} for name, (start, end) in kinds.items()]
    tokenizer = load_tokenizer(str(folder_of(tmp_path, {"chat_template": named})))
    chat = ChatTokenizer.of(tokenizer)
    for tools, end in ((None, "<|im_end|>"), (TOOLS, "<|pad|>"), (None, "<|im_end|>")):
        tokens = chat.encode([ASK, ANSWER], tools)
        (turn,) = tokens.turns
        assert tokenizer.decode(tokens.ids[turn.start : turn.stop]) == f"2{end}"
        assert tokens.ids[: turn.start] == chat.prompt([ASK], tools)
        assert tokenizer.decode([chat.end_id_of(bool(tools))]) == end
        assert chat.answered([ASK], "2", tools=tools).ids == tokens.ids
    assert tokenizer.decode([*ends_of_turn(tokenizer)]) == "<|im_end|><|pad|>"  # generation stops at both


def test_a_saved_tokenizer_still_chooses(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(with_templates(tmp_path / "in", "files")))
    tokenizer.save(tmp_path / "out")
    assert load_tokenizer(str(tmp_path / "out")).chat_template == tokenizer.chat_template
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    for tools in (None, TOOLS):
        first = AutoTokenizer.from_pretrained(tmp_path / "in").apply_chat_template([ASK], tools=tools, tokenize=False)
        assert again.apply_chat_template([ASK], tools=tools, tokenize=False) == first


def test_named_templates_without_a_default_refuse_a_conversation(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"chat_template": [{"name": "rag", "template": DEFAULT}]})
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.decode(tokenizer.encode(["text"])[0][:-1]) == "text"
    with pytest.raises(ChatError, match=r"several chat templates \(rag\), but none is named default"):
        ChatTokenizer.of(tokenizer).prompt([ASK])
    folder_of(tmp_path, {"chat_template": [{"template": DEFAULT}]})
    with pytest.raises(ValueError, match="chat_template is neither a text nor a list of named ones"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("bos", ["<|im_start|>", {"content": "<|im_start|>", "lstrip": False, "special": True}])
@pytest.mark.parametrize("named", [{}, {"bos_token": "<|pad|>", "eos_token": "<|pad|>"}])
@pytest.mark.parametrize("newer", [False, True])
def test_special_tokens_map_names_the_tokens_of_an_older_config(
    tmp_path: Path, bos: Any, named: dict[str, str], newer: bool
) -> None:
    decoder = {"256": {"content": "<|endoftext|>", "special": True}}
    config = {"chat_template": WITH_BOS, **named, **({"added_tokens_decoder": decoder} if newer else {})}
    folder = folder_of(tmp_path, config, special_tokens_map={"bos_token": bos, "eos_token": "<|endoftext|>"})
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(str(folder))
    assert ours.special.get("bos_token") == theirs.bos_token
    assert ours.special.get("eos_token") == theirs.eos_token
    if not newer:
        messages = [ASK, ANSWER]
        rendered = theirs.apply_chat_template(messages, tokenize=False)
        assert ChatTokenizer.of(ours).template.render(messages) == rendered
        assert rendered.startswith("<|im_start|>user")


def test_added_tokens_get_their_ids(tmp_path: Path) -> None:
    special = {"additional_special_tokens": ["<tool>"]}
    folder = folder_of(
        tmp_path, {}, added_tokens={"<b>": 261, "<tool>": 260, "<|pad|>": 259}, special_tokens_map=special
    )
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder))
    text = "a<b>c<tool>d <b>"
    assert ours.encode([text])[0][:-1] == theirs.encode(text, add_special_tokens=False)
    assert ours.vocab_size == 262
    assert ours.tokenizer.decode(ours.encode([text])[0], skip_special_tokens=True) == "a<b>cd <b>"


def test_an_added_token_whose_id_is_not_free_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {}, added_tokens={"<b>": 300})
    with pytest.raises(ValueError, match=r"added_tokens.json gives '<b>' the id 300; the next free one is 260"):
        load_tokenizer(str(folder))
    (folder / "added_tokens.json").write_text("[]")
    with pytest.raises(ValueError, match=r"added_tokens.json holds a list, not a JSON object"):
        load_tokenizer(str(folder))


TEXTS = [
    "a<b>c",
    "a <b> c",
    "a\n<b>\nc <b>",
    " <b><b> ",
    "ab<b>cd x<b>",
    "<|pad|> <b>\t<|im_end|>\n",
    "<b",
    "x  <b>  y",
]


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized", "special"])
@pytest.mark.parametrize("in_json", [None, False, True])  # what tokenizer.json says of the flag; None: no such token
@pytest.mark.parametrize("in_config", [False, True])
def test_flags_of_added_tokens_are_those_of_the_config(
    tmp_path: Path, flag: str, in_json: bool | None, in_config: bool
) -> None:
    tokenizer = load_tokenizer("bytes")
    if in_json is not None:
        tokenizer.tokenizer.add_tokens([AddedToken("<b>", **{flag: in_json})])
    tokenizer.save(tmp_path)
    decoder = {"260": {"content": "<b>", flag: in_config}, "259": {"content": "<|pad|>", "lstrip": True}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|pad|>", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    for text in TEXTS:
        assert ours.encode([text])[0][:-1] == theirs.encode(text, add_special_tokens=False), text
    written, read = (tokenizer.get_added_tokens_decoder() for tokenizer in (theirs.backend_tokenizer, ours.tokenizer))
    assert {id: repr(token) for id, token in read.items()} == {id: repr(token) for id, token in written.items()}


def test_a_word_of_the_vocabulary_that_the_config_names_is_special(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "<t>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "additional_special_tokens": ["<t>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    assert (
        ours.encode(["a</s>a <t>a"])[0][:-1]
        == theirs.encode("a</s>a <t>a", add_special_tokens=False)
        == [2, 1, 2, 3, 2]
    )
    assert ours.special_ids == {1, 3}


def test_an_id_of_the_config_that_is_another_tokens_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"added_tokens_decoder": {"300": {"content": "<b>"}}})
    with pytest.raises(ValueError, match=r"tokenizer_config.json gives '<b>' the id 300; the next free one is 260$"):
        load_tokenizer(str(folder))
    folder_of(tmp_path, {"added_tokens_decoder": {"258": {"content": "<|pad|>", "lstrip": True}}})
    with pytest.raises(ValueError, match=r"gives '<\|pad\|>' the id 258; in tokenizer.json it has 259$"):
        load_tokenizer(str(folder))
