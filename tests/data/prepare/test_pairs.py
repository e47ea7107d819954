"""`data.prepare --pairs`: what becomes of a pair, in every form, and of records that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data.prepare.__main__ import main
from data.prepare.make import prepare
from data.prepare.pairs import Pairs
from data.prepare.parts import cut_inputs
from data.prepare.records import read_objects
from data.prepare.settings import ChatSettings, SourceSettings
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.messages import ChatError
from nb_lightning.token_source import TRAINED, Source

SETTINGS = SourceSettings("bytes", chat=ChatSettings(), pairs=True)
END = "<|im_end|>"
ASKED = [{"role": "user", "content": "2 + 3 = ?"}]
ANSWER = {"role": "assistant", "content": "5"}
HUMAN = "\n\nHuman: 2 + 3 = ?\n\nAssistant:"
PROMPT = "<|im_start|>user\n2 + 3 = ?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def form() -> Pairs:
    return Pairs(SETTINGS)


def shown(form: Pairs, marked: list[int]) -> tuple[str, str]:
    """Prompt and response of a sample: what comes before the first trained token, and what is trained on."""
    first = next(i for i, token in enumerate(marked) if token & TRAINED)
    assert all(token & TRAINED for token in marked[first:])
    decode = form.tokenizer.decode
    return decode(marked[:first]), decode([token & ~TRAINED for token in marked[first:]])


@pytest.mark.parametrize(
    "record, chosen, rejected",
    [
        ({"messages": ASKED, "chosen": "5", "rejected": "6"}, f"5{END}", f"6{END}"),
        ({"prompt": "2 + 3 = ?", "chosen": "5", "rejected": " 6\n", "rejected_finish": "length"}, f"5{END}", " 6\n"),
        ({"prompt": ASKED, "chosen": "", "rejected": "6", "scores": {"chosen": 1}}, "<|im_end|>", f"6{END}"),
        (
            {
                "prompt": "2 + 3 = ?",
                "chosen": [{"role": "assistant", "reasoning_content": "easy", "content": "5"}],
                "rejected": [*ASKED, {"role": "assistant", "content": "6"}],
            },
            f"<think>\neasy\n</think>\n\n5{END}",
            f"6{END}",
        ),
        (
            {side: [*ASKED, ANSWER | {"content": text}] for side, text in (("chosen", "5"), ("rejected", "x"))},
            f"5{END}",
            f"x{END}",
        ),
        ({"question": "2 + 3 = ?", "chosen": "5", "rejected": "6"}, f"5{END}", f"6{END}"),
        (
            {
                "prompt": "2 + 3 = ?",
                "messages": [*ASKED, ANSWER],
                "chosen": [*ASKED, ANSWER],
                "rejected": [*ASKED, ANSWER | {"content": "6"}],
            },
            f"5{END}",
            f"6{END}",
        ),
        (
            {
                "messages": [*ASKED, ANSWER],
                "chosen": [*ASKED, ANSWER],
                "rejected": [*ASKED, ANSWER | {"content": "6"}],
            },
            f"5{END}",
            f"6{END}",
        ),
        ({"chosen": f"{HUMAN} 5", "rejected": f"{HUMAN} 6"}, f"5{END}", f"6{END}"),
        ({"prompt": HUMAN, "chosen": " 5", "rejected": " 6\n"}, f"5{END}", f"6{END}"),
        ({"instruction": "2 + 3 = ?", "input": "", "chosen": "5", "rejected": "6"}, f"5{END}", f"6{END}"),
        (
            {
                "conversations": [{"from": "human", "value": "2 + 3 = ?"}],
                "chosen": {"from": "gpt", "value": "5"},
                "rejected": {"from": "gpt", "value": "6"},
            },
            f"5{END}",
            f"6{END}",
        ),
    ],
)  # fmt: skip
def test_forms(form: Pairs, record: dict[str, Any], chosen: str, rejected: str) -> None:
    question, samples = form.parse(record)
    assert [shown(form, marked) for marked in samples] == [(PROMPT, chosen), (PROMPT, rejected)]
    assert json.loads(question) == [ASKED, None]


def test_turns_before_the_last_are_the_prompt_of_a_transcript(form: Pairs) -> None:
    before = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nTwo\nparagraphs. \n\nHuman: Who?"
    record = {"chosen": f"{before}\n\nAssistant: A model.", "rejected": f"{before}\n\nAssistant: Nobody\n\nknows."}
    question, (chosen, rejected) = form.parse(record)
    messages = [("user", "Hi"), ("assistant", "Hello.\n\nTwo\nparagraphs."), ("user", "Who?")]
    assert json.loads(question) == [[{"role": role, "content": content} for role, content in messages], None]
    assert shown(form, chosen)[1] == f"A model.{END}" and shown(form, rejected)[1] == f"Nobody\n\nknows.{END}"


@pytest.mark.parametrize(
    "prompt, begins", [(HUMAN, ""), (HUMAN, HUMAN), (HUMAN.removesuffix("\n\nAssistant:"), "\n\nAssistant:")]
)
def test_a_prompt_of_turns_may_end_with_either_and_stand_before_the_responses(
    form: Pairs, prompt: str, begins: str
) -> None:
    earlier = "\n\nHuman: 1 + 1 = ?\n\nAssistant: 2"
    begins = f"{earlier}{begins}" if begins == HUMAN else begins
    record = {"prompt": f"{earlier}{prompt}", "chosen": f"{begins} 5", "rejected": f"{begins} 6"}
    before = [{"role": "user", "content": "1 + 1 = ?"}, {"role": "assistant", "content": "2"}, *ASKED]
    expected = form.parse({"messages": before, "chosen": "5", "rejected": "6"})
    assert form.parse(record) == expected
    assert form.parse(record | {"rejected": {"role": "assistant", "content": "6"}}) == expected


def test_a_prompt_of_turns_that_ends_with_an_answer_is_bad(form: Pairs) -> None:
    with pytest.raises(ChatError, match="the prompt ends with the assistant"):
        form.parse({"prompt": f"{HUMAN} 5", "chosen": "a", "rejected": "b"})


def test_a_transcript_that_does_not_end_with_the_assistant_is_bad(form: Pairs) -> None:
    with pytest.raises(ChatError, match="a response is not from the assistant's turn to the assistant's"):
        form.parse({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: x"})


THOUGHT = "<think>\nthree more\n</think>\n\n"


@pytest.mark.parametrize("style", ["chatml", "qwen3_style", "r1"])
@pytest.mark.parametrize(
    "response",
    [
        f"{THOUGHT}5",
        THOUGHT.removeprefix("<think>") + "5",  # the prompt of the model that wrote it opened the thought
        [{"role": "assistant", "content": f"{THOUGHT}5"}],
        [{"role": "assistant", "content": THOUGHT.removeprefix("<think>\n") + "5"}],
        [{"role": "assistant", "content": "5", "reasoning_content": "three more"}],
        [*ASKED, {"role": "assistant", "content": "5", "thinking": "three more"}],
    ],
)
def test_without_thoughts_none_is_left_on_either_side(style: str, response: Any) -> None:
    templates = {"chatml": None, "r1": R1}
    template = templates[style] if style in templates else Path(f"tests/templates/{style}.jinja").read_text()
    form = Pairs(SourceSettings("bytes", chat=ChatSettings(template, think=False), pairs=True))
    for record in ({"chosen": response, "rejected": "6"}, {"chosen": "6", "rejected": response}):
        _, samples = form.parse({"prompt": ASKED, **record})
        texts = [form.tokenizer.decode([token & ~TRAINED for token in marked]) for marked in samples]
        assert not any("three more" in text for text in texts)
        assert sorted(text.removesuffix(END)[-1] for text in texts) == ["5", "6"]


R1 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize(
    "response",
    [THOUGHT, "<think>\nthree", [{"role": "assistant", "content": "", "reasoning": "three more"}],
     [{"role": "assistant", "content": THOUGHT}]],
)  # fmt: skip
def test_without_thoughts_a_response_that_is_one_is_bad(response: Any) -> None:
    form = Pairs(SourceSettings("bytes", chat=ChatSettings(think=False), pairs=True))
    for record in ({"chosen": response, "rejected": "6"}, {"chosen": "6", "rejected": response}):
        with pytest.raises(ChatError, match=r"(chosen|rejected): an assistant turn is a thought alone"):
            form.parse({"prompt": ASKED, **record})


def test_without_thoughts_the_prompt_has_none(form: Pairs) -> None:
    record = {"messages": [*ASKED, {"role": "assistant", "content": f"{THOUGHT}5"}, {"role": "user", "content": "?"}],
              "chosen": f"{THOUGHT}yes", "rejected": f"{THOUGHT}no"}  # fmt: skip
    assert "three more" in shown(form, form.parse(record)[1][0])[0]
    without = Pairs(SourceSettings("bytes", chat=ChatSettings(think=False), pairs=True))
    (chosen, _) = without.parse(record)[1]
    assert shown(without, chosen) == (
        f"{PROMPT}5{END}\n<|im_start|>user\n?{END}\n<|im_start|>assistant\n", f"yes{END}"
    )  # fmt: skip


def test_bad_records_without_thoughts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [{"prompt": f"q{n}", "chosen": f"{THOUGHT}yes", "rejected": f"{THOUGHT}no"} for n in range(20)]
    pairs += [{"prompt": "a", "chosen": THOUGHT, "rejected": "no"}]
    pairs += [{"prompt": "b", "chosen": f"{THOUGHT}yes", "rejected": "yes"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    main(["--pairs", "--no-think", "--input", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "out"),
          "--workers", "1"])  # fmt: skip
    report = capsys.readouterr().out
    assert f"1 an assistant turn is a thought alone: {tmp_path}/pairs.jsonl:21" in report
    assert f"1 chosen equals rejected: {tmp_path}/pairs.jsonl:22" in report


def test_system_tools_and_calls(form: Pairs) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 2}}}
    tools = [{"type": "function", "function": {"name": "add"}}]
    _, (chosen, rejected) = form.parse(
        {
            "prompt": "2 + 3 = ?",
            "system": "Be brief.",
            "tools": json.dumps(tools),
            "chosen": [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "5"},
                {"role": "assistant", "content": "5"},
            ],
            "rejected": "No.",
        }
    )
    prompt, response = shown(form, rejected)
    assert "Be brief." in prompt and '"name": "add"' in prompt and response == "No.<|im_end|>"
    text = form.tokenizer.decode([token & ~TRAINED for token in chosen])
    trained = form.tokenizer.decode([token & ~TRAINED for token in chosen if token & TRAINED])
    assert text.startswith(prompt) and "<|im_start|>tool\n5<|im_end|>" in text
    assert trained == '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>5<|im_end|>'


def test_functions_are_tools_in_a_table_too(form: Pairs, tmp_path: Path) -> None:
    function = {"name": "add"}
    records = [
        {"prompt": "2 + 3 = ?", "chosen": "5", "rejected": "6", "functions": None, name: json.dumps(value)}
        for name, value in (
            ("tools", [{"type": "function", "function": function}]),  # its keys are the columns
            ("functions", [function]),
            ("functions", [{"type": "function", "function": function}]),
        )
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    (part,), _ = cut_inputs([str(tmp_path / "a.parquet")])
    parsed = form.parse_many([record.value for record in read_objects(part, form.fields)])
    assert parsed[0] == parsed[1] == parsed[2] == form.parse(records[0])


def test_a_marked_turn_of_a_response_is_not_trained_on(form: Pairs) -> None:
    marked = ANSWER | {"content": "7", "weight": 0}
    _, samples = form.parse({"messages": ASKED, "chosen": [marked, *ASKED, ANSWER], "rejected": "6"})
    trained = [token & ~TRAINED for token in samples[0] if token & TRAINED]
    assert form.tokenizer.decode(trained) == f"5{END}"


def test_a_template_that_leaves_out_the_tools_is_named() -> None:
    template = Path("tests/templates/llama3_style.jinja").read_text().replace("<|eot_id|>", END)
    record = {"prompt": "2 + 3 = ?", "rejected": "6", "tools": [{"name": "add"}]}
    llama = Pairs(SourceSettings("bytes", chat=ChatSettings(template), pairs=True))
    for chosen in ("5", [ANSWER]):
        with pytest.raises(ChatError, match="the template leaves out the tools: 'add'"):
            llama.parse({**record, "chosen": chosen})


def test_system_and_question_are_the_prompt(form: Pairs) -> None:
    question, _ = form.parse({"system": "Be brief.", "question": "2 + 3 = ?", "chosen": "5", "rejected": "6"})
    assert json.loads(question) == [[{"role": "system", "content": "Be brief."}, *ASKED], None]


def test_what_spells_a_special_token_is_text(form: Pairs) -> None:
    _, (chosen, _) = form.parse({"messages": ASKED, "chosen": "<|im_end|>5", "rejected": "6"})
    special = form.tokenizer.tokenizer.token_to_id("<|im_end|>")
    response = [token & ~TRAINED for token in chosen if token & TRAINED]
    assert response.count(special) == 1 and response[-1] == special
    assert form.tokenizer.decode(response) == "<|im_end|>5<|im_end|>"


def test_the_prompt_is_what_generation_goes_on_from() -> None:
    """In a template without generation blocks, whose prompt opens a thought, and with a tokenizer that merges."""
    template = Path("tests/templates/qwen3_style.jinja").read_text()
    encoder = ChatTokenizer.of(load_tokenizer("bytes"), template)
    answered = encoder.answered(ASKED, "5")
    prompt = encoder.prompt(ASKED)
    assert answered.ids[: len(prompt)] == prompt and answered.turns[0].start == len(prompt)
    assert encoder.tokenizer.decode(answered.ids[len(prompt) :]) == f"5{END}"


@pytest.mark.parametrize(
    "record, error",
    [
        ({"messages": ASKED, "chosen": "5"}, "no rejected: it has messages, chosen"),
        ({"messages": ASKED, "rejected": "5", "chosen": None}, "no chosen: it has messages, rejected"),
        ({"chosen": "5", "rejected": "6"}, "neither messages nor prompt"),
        ({"messages": ASKED, "chosen": "5", "rejected": "5"}, "chosen equals rejected"),
        ({"messages": ASKED, "chosen": "5", "rejected": [ANSWER]}, "chosen equals rejected"),
        ({"messages": ASKED, "chosen": "5", "rejected": "", "rejected_finish": "length"}, "rejected: an empty resp"),
        ({"messages": ASKED, "chosen": "5", "rejected": "6", "chosen_finish": "eos"}, "chosen_finish is neither"),
        ({"messages": ASKED, "chosen": 5, "rejected": "6"}, "chosen is neither a text nor a list of messages"),
        ({"messages": ASKED, "chosen": ASKED, "rejected": "6"}, "chosen: a response is not from the assistant's turn"),
        ({"messages": [], "chosen": "5", "rejected": "6"}, "no messages"),
        ({"messages": ASKED, "chosen": "5\ud83d", "rejected": "6"}, "not UTF-8"),
        ({"messages": ASKED, "chosen": [ANSWER | {"loss": False}], "rejected": "6"}, "chosen: every assistant turn is"),
        ({"messages": ASKED, "chosen": [ANSWER | {"weight": 2}], "rejected": "6"}, "weight is neither 0 nor 1"),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": "5"}], "chosen": "5", "rejected": "6"},
            "the prompt ends with the assistant",
        ),
    ],
)  # fmt: skip
def test_bad_records(form: Pairs, record: dict[str, Any], error: str) -> None:
    with pytest.raises(ChatError, match=error):
        form.parse(record)


def test_a_source_of_pairs_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [{"prompt": f"q{n}", "chosen": "yes", "rejected": f"no {n}"} for n in range(30)]
    pairs += [{"prompt": "same", "chosen": "x", "rejected": "x"}, {"prompt": "half", "chosen": "x"}]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (tmp_path / "pairs.jsonl").write_text(lines)
    main(["--pairs", "--input", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "out"),
          "--workers", "1", "--val-fraction", "0.3"])  # fmt: skip
    report = capsys.readouterr().out
    assert "2 records, each in dropped.jsonl" in report
    assert f"1 chosen equals rejected: {tmp_path}/pairs.jsonl:31" in report
    assert f"1 no rejected: {tmp_path}/pairs.jsonl:32" in report
    found = 0
    for split in ("train", "val"):
        source = Source(str(tmp_path / "out" / split))
        assert source.manifest.pairs and len(source.samples()) == source.manifest.documents
        found += len(source.samples()) // 2
        assert f"{len(source.samples()) // 2} pairs" in report
    assert found == 30


@pytest.mark.parametrize(
    "content, error", [("", "pairs.jsonl: there is no record in it"), ("{}\n", "none of the 1 rec")]
)
def test_nothing_to_prepare(tmp_path: Path, content: str, error: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(content)
    with pytest.raises(ValueError, match=error):
        prepare([tmp_path / "pairs.jsonl"], str(tmp_path / "out"), SETTINGS, progress=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.parts").exists()
