"""The command, as a user runs it, on a Hugging Face folder whose probabilities are known."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.prepare.source_writer import SourceWriter
from nb_lightning.checkpoints.hf_config import config_from_shape
from nb_lightning.checkpoints.hf_weights import to_hf
from nb_lightning.checkpoints.pretrained import load_pretrained
from nb_lightning.evaluate import __main__ as evaluate
from nb_lightning.evaluate.accuracy import evaluate_tasks
from nb_lightning.generation.sampling import Sampling
from nb_lightning.model.transformer import Transformer
from nb_lightning.rewards.tasks import read_tasks, write_tasks
from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.token_source import SourceManifest
from tests.evaluate.harness import COIN, TOKENIZER, chain, tasks_of
from tests.harness import ROOT, environment

GREEDY = Sampling(20, temperature=0)
QUICK = "--k 4 --temperature 1 --top-p 1 --max-new-tokens 9 --device cpu".split()


def write_folder(folder: Path, model: Transformer) -> None:
    """A Hugging Face folder."""
    TOKENIZER.save(folder, ChatTemplate.chatml().source)
    (folder / "config.json").write_text(json.dumps(config_from_shape(model.shape, torch.float32)))
    tensors = {to_hf(name): p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, tasks.jsonl, web/ (a source) and text.jsonl."""
    root = tmp_path_factory.mktemp("evaluate")
    write_folder(root / "model", chain(COIN))
    tasks = [*tasks_of(["42"] * 12), *(replace(task, id=f"h{task.id}") for task in tasks_of(["x"] * 2, "hard"))]
    write_tasks(root / "tasks.jsonl", tasks)
    writer = SourceWriter(root / "web/val", SourceManifest(TOKENIZER.digest, TOKENIZER.vocab_size, TOKENIZER.eos_id))
    for ids in TOKENIZER.encode(["42", "77 7"]):
        writer.add(ids)
    writer.close()
    (root / "text.jsonl").write_text('{"text": "42"}\n{"text": "77 7"}\n')
    return root


def test_the_command_measures_prints_and_writes_everything(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", f"{folder}/model", "--tasks", f"{folder}/tasks.jsonl", "--source", f"web={folder}/web"]
    given += ["--text", f"plain={folder}/text.jsonl", "--out", f"{tmp_path}/r.json", "--samples", f"{tmp_path}/s.jsonl"]
    evaluate.main([*given, *QUICK])
    result = json.loads((tmp_path / "r.json").read_text())
    tasks = read_tasks(folder / "tasks.jsonl")
    want = evaluate_tasks(load_pretrained(f"{folder}/model", "cpu"), tasks, Sampling(9), k=4)
    assert result["tasks"]["sampled"] == json.loads(json.dumps(want.summary()))
    assert result["tasks"]["greedy"]["s"]["mean"] == 1 and result["tasks"]["greedy"]["hard"]["mean"] == 0
    assert result["perplexity"]["web"] == result["perplexity"]["plain"]
    assert result["model"]["parameters"] == chain(COIN).shape.count_parameters() and result["settings"]["k"] == 4
    assert result["versions"]["torch"] == torch.__version__
    shown = capsys.readouterr().out.split("\n\n")
    assert [part.split()[:3] for part in shown[1:]] == [
        ["source", "tasks", "avg@4"], ["source", "tasks", "greedy"], ["text", "tokens", "nats/token"],
    ]  # fmt: skip
    row = shown[1].splitlines()[-1].split()
    assert row[:3] == ["all", "14", f"{want.summary()['all']['mean']:.3f}"]
    samples = [json.loads(line) for line in (tmp_path / "s.jsonl").open()]
    assert len(samples) == 14 * 5
    sampled = [s for s in samples if s["way"] == "sampled"]
    assert [s["completion"] for s in sampled] == [text for a in want.attempts for text in a.texts]
    assert sum(s["reward"] for s in sampled) == pytest.approx(56 * want.summary()["all"]["mean"])


def test_greedy_only_and_sampled_only_are_possible(folder: Path) -> None:
    given = ["--model", f"{folder}/model", "--tasks", f"{folder}/tasks.jsonl", *QUICK, "--limit", "2"]
    for extra, ways in ((["--k", "0"], ["greedy"]), (["--no-greedy"], ["sampled"])):
        result = evaluate.run(evaluate.parser().parse_args([*given, *extra]))
        assert list(result["tasks"]) == ways and result["tasks"][ways[0]]["all"]["tasks"] == 2


def test_another_chat_template_is_used(folder: Path, tmp_path: Path) -> None:
    """What the model sees ends in "7" now: it never answers."""
    (tmp_path / "seven.jinja").write_text("{{ messages[0].content }} 7")
    given = ["--model", f"{folder}/model", "--tasks", f"{folder}/tasks.jsonl", *QUICK, "--k", "0"]
    for template, mean in ((f"{tmp_path}/seven.jinja", 0), ("chatml", 1)):
        result = evaluate.run(evaluate.parser().parse_args([*given, "--chat-template", template, "--limit", "3"]))
        assert result["tasks"]["greedy"]["all"]["mean"] == mean


def test_variables_of_the_template_reach_the_prompts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "seven.jinja").write_text(ChatTemplate.chatml().source + "{{ '7' if spoilt }}")
    given = ["--model", f"{folder}/model", "--tasks", f"{folder}/tasks.jsonl", *QUICK, "--k", "0", "--limit", "3"]
    for variables, mean in (('{"spoilt": true, "other": 1}', 0), ('{"spoilt": false}', 1)):
        words = ["--chat-template", f"{tmp_path}/seven.jinja", "--template-kwargs", variables]
        result = evaluate.run(evaluate.parser().parse_args([*given, *words]))
        assert result["tasks"]["greedy"]["all"]["mean"] == mean
        assert ("the chat template does not read other" in capsys.readouterr().err) == (mean == 0)


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "nothing to evaluate: give --tasks, --source or --text"),
        (["--tasks", "none.jsonl"], "tasks file none.jsonl cannot be read"),
        (["--text", "none.txt"], "--text none.txt: write it as NAME=PATH"),
        (["--text", "a=none.txt"], "none.txt cannot be read"),
        (["--source", "a=none"], "no tokenized data at none/val"),
        (["--text", "a=b", "--k", "-1"], "--k is -1"),
        (["--text", "a=b", "--k", "0", "--no-greedy"], "--k is 0"),
        (["--text", "a=b", "--top-p", "0"], "top_p is 0.0; it must be above 0 and at most 1"),
        (["--text", "a=b", "--seq-len", "0"], "--seq-len is 0; it must be at least 1"),
        (["--text", "a=b", "--out", "no/such/folder/r.json"], "no/such/folder/r.json cannot be written"),
        (["--text", "a=b", "--chat-template", "none.jinja"], "--chat-template none.jinja cannot be read"),
        (["--text", "a=b", "--template-kwargs", "no"], "--template-kwargs is not JSON; write it as "),
        (["--text", "a=b", "--model", "nowhere"], "no checkpoint at 'nowhere'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(folder: Path, given: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--model", f"{folder}/model", "--device", "cpu", *given])
    assert str(stopped.value).startswith(f"error: {message}") and "\n" not in str(stopped.value)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    given = ["-m", "nb_lightning.evaluate", "--model", f"{folder}/model", "--tasks", f"{folder}/tasks.jsonl", *QUICK]
    given += ["--text", f"plain={folder}/text.jsonl", "--out"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    for name, words in (("one", []), ("two", launcher)):
        command = [sys.executable, *words, *given, f"{tmp_path}/{name}.json"]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("avg@4") == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["tasks"] == two["tasks"] and one["perplexity"] == two["perplexity"]


@pytest.mark.slow
def test_lm_eval_gives_the_same_number_on_a_local_task(tmp_path: Path) -> None:
    """The example of docs/evaluation.md, offline, on a folder that transformers loads."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed: pip install 'nb_lightning[lm_eval]'")
    answer = "Answer: 42"
    steps = list(zip("\n" + answer, [*answer, "<|im_end|>"]))
    write_folder(tmp_path / "model", chain({last: {following: 1.0} for last, following in steps}))
    write_tasks(tmp_path / "tasks.jsonl", tasks_of(["42", "43", "42", "44", "42"]))
    example = (ROOT / "docs/examples/lm_eval/maths_sort.yaml").read_text()
    place = "outputs/data/demo_tasks/tasks/val/maths_sort.jsonl"
    assert place in example
    (tmp_path / "task.yaml").write_text(example.replace(place, f"{tmp_path}/tasks.jsonl"))
    words = ["--model", "hf", "--model_args", f"pretrained={tmp_path}/model,dtype=float32", "--tasks", "maths_sort"]
    words += ["--include_path", str(tmp_path), "--apply_chat_template", "--device", "cpu", "--batch_size", "4"]
    command = [sys.executable, "-m", "lm_eval", "run", *words, "--output_path", f"{tmp_path}/out"]
    env = environment(HF_HUB_OFFLINE="1", HF_HOME=f"{tmp_path}/cache")
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]["maths_sort"]["exact_match,answer"]
    ours = evaluate_tasks(load_pretrained(f"{tmp_path}/model", "cpu"), read_tasks(tmp_path / "tasks.jsonl"), GREEDY)
    assert theirs == ours.summary()["all"]["mean"] == 0.6
