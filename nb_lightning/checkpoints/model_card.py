"""The README.md of an export: what the model is, what it was trained on, how to use it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nb_lightning import __version__, run_folder
from nb_lightning.checkpoints import folders
from nb_lightning.checkpoints.pretrained import CheckpointOrigin, Origin
from nb_lightning.files import read_json

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- nb_lightning
- llama
---
"""
_CHAT = """messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
"""
_TEXT = """inputs = tokenizer("Once upon a time", return_tensors="pt")
"""
_JUDGE = """from nb_lightning.rewards.preference import load_reward_model

model = load_reward_model("{name}")
asked = [{{"role": "user", "content": "..."}}]
model.compare(asked, [("one response", "another")])  # how likely the first is the better one"""


def model_card(name: str, origin: Origin, dtype: str, chat: bool) -> str:
    """Write the card in Markdown, with the front matter that model hubs read.

    Args:
        dtype: of the exported weights.
        chat: the model has a chat template.
    """
    s = origin.shape
    embeddings = s.vocab_size * s.d_model * (1 if s.tie_embeddings else 2)
    facts = [
        ("parameters", f"{s.count_parameters():,} ({s.count_parameters() - embeddings:,} without embeddings)"),
        ("architecture", "Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU"),
        ("layers, width, MLP", f"{s.n_layers}, {s.d_model:,}, {s.d_mlp:,}"),
        *([("passes through the layers", str(s.n_loops))] if s.n_loops > 1 else []),
        ("heads, key-value heads, size", f"{s.n_heads}, {s.n_kv_heads}, {s.head_dim}"),
        ("vocabulary", f"{s.vocab_size:,}{', tied' if s.tie_embeddings else ''}"),
        ("context, RoPE base", f"{origin.context or 'unknown'}, {s.rope_theta:g}"),
        ("weights", f"{dtype}"),
    ]
    sections = [_FRONT, f"# {name}", _table(("", ""), facts)]
    if isinstance(origin, CheckpointOrigin):
        sections += _training(origin.path)
    else:
        sections.append(f"Converted from `{origin.path.name}` by nb_lightning {__version__}.")
    sections += ["## Use", f"```python\n{_use(name, chat, judge=origin.comparison() is not None)}\n```"]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def _use(name: str, chat: bool, judge: bool) -> str:
    if judge:
        return _JUDGE.format(name=name)
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f"{_CHAT if chat else _TEXT}"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0]))"
    )


def _training(checkpoint: Path) -> list[str]:
    """Describe the training in sections, from the manifests of the checkpoint and of its run."""
    info = folders.read_info(checkpoint)
    seen, start = info["tokens_seen"], 0
    rows = []
    for phase in info["plan"]:
        if start < seen:
            lr = phase["lr"]
            rate = f"{lr['start']:g}" if lr["end"] is None else f"{lr['start']:g} to {lr['end']:g}, {lr['shape']}"
            mixture = ", ".join(f"{name} {weight:g}" for name, weight in phase["mixture"].items())
            tokens = min(phase["tokens"], seen - start)
            rows.append((phase["name"], f"{tokens:,}", rate, mixture, phase["seq_len"], f"{phase['rope_theta']:g}"))
        start += phase["tokens"]
    sections = [
        "## Training",
        f"nb_lightning {__version__}, {seen:,} tokens, checkpoint `{checkpoint.name}`, seed {info['seed']}.",
        _table(("phase", "tokens", "learning rate", "mixture", "context", "RoPE base"), rows),
    ]
    manifest = read_json(checkpoint.parent.parent / run_folder.MANIFEST, {})
    if not manifest:
        return sections
    if manifest.get("init_from"):
        sections.append(f"It began with the weights of `{Path(manifest['init_from']).name}`.")
    data = manifest.get("data", {})
    if data:
        facts = list(next(iter(data.values())))  # text has tokens and documents, RL's prompts have tasks
        heads = ["data", *("SHA-256" if fact == "sha256" else fact for fact in facts)]
        sections.append(_table(heads, [(name, *(value[fact] for fact in facts)) for name, value in data.items()]))
    metrics = manifest.get("metrics", {})
    if metrics and manifest.get("tokens_seen") == seen:
        sections.append(_table(("at the end", ""), [(key, f"{value:.4g}") for key, value in sorted(metrics.items())]))
    start_of_run = manifest["starts"][-1]
    git = start_of_run.get("git")
    commit = f", commit {git['commit']}{' with changes' if git['modified'] else ''}" if git else ""
    versions = ", ".join(f"{name} {version}" for name, version in start_of_run["versions"].items())
    sections.append(f"Software: {versions}{commit}.")
    return sections


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
