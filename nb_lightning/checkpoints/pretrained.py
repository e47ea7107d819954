"""A model to use: weights, tokenizer and chat template of a run, a checkpoint, a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nb_lightning.checkpoints import folders, hf_config, hf_weights
from nb_lightning.checkpoints.gguf import GGUFWeights
from nb_lightning.checkpoints.gguf_tokenizer import tokenizer_from_gguf
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.files import read_json
from nb_lightning.model import adapters, weights
from nb_lightning.model.transformer import ModelShape, Transformer
from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.tokenizer import END_OF_TURN, TextTokenizer

EXPORT = "nb_lightning.json"  # in a Hugging Face folder of ours: its files, and what is known of the model
_DECODING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass
class Pretrained:
    """A model that generates.

    Attributes:
        model: in eval mode, on its device.
        stop_ids: what ends a generated row: the end of a document and the end of a turn.
        name: for humans: the folder's or file's name.
    """

    model: Transformer
    tokenizer: TextTokenizer
    chat: ChatTemplate | None
    stop_ids: tuple[int, ...]
    name: str


def in_training(model: Transformer, tokenizer: TextTokenizer, chat: ChatTemplate, name: str) -> Pretrained:
    """A model that a run is training, to generate with between two steps."""
    stop_ids = (tokenizer.eos_id, ChatTokenizer(tokenizer, chat).end_id)
    return Pretrained(model, tokenizer, chat, stop_ids, name)


@dataclass(frozen=True)
class Origin:
    """Where weights come from, before any of them is read.

    Attributes:
        path: the checkpoint's folder, the Hugging Face folder or the GGUF file.
        shape: of the model, with its own RoPE base.
        context: tokens a row that the model was made for; None where nothing says so.
    """

    path: Path
    shape: ModelShape
    context: int | None

    def open(self) -> weights.Weights:
        """The tensors, read one at a time."""
        raise NotImplementedError

    def digest(self) -> str:
        """SHA-256 over names and contents of all tensors; reads every one of them."""
        tensors = self.open()
        digests = {name: tensors.digest(name) for name in weights.parameter_shapes(self.shape)}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

    def tokenizer(self) -> TextTokenizer:
        """Raises ValueError where there is none, or one with more tokens than the model."""
        found = self._tokenizer()
        if found.vocab_size > self.shape.vocab_size:
            raise ValueError(
                f"{self.path}: the tokenizer's ids go up to {found.vocab_size - 1}, the model's to "
                f"{self.shape.vocab_size - 1}"
            )
        return found

    def _tokenizer(self) -> TextTokenizer:
        return load_tokenizer(str(self.path))

    def stop_ids(self, tokenizer: TextTokenizer) -> tuple[int, ...]:
        """The end of a document, and all that the files call an end."""
        named = [END_OF_TURN, tokenizer.special.get("eos_token", END_OF_TURN)]
        ids = {tokenizer.eos_id, *map(tokenizer.tokenizer.token_to_id, named), *self._named_ends()}
        return tuple(sorted(id for id in ids if isinstance(id, int)))

    def _named_ends(self) -> list[Any]:
        return []

    def decoding(self) -> dict[str, Any]:
        """How its makers sample from it, in transformers' words; empty where nothing says so."""
        return {}

    def comparison(self) -> str | None:
        """Of a reward model the digest of how its comparisons are written (`pairwise.ComparisonForm`)."""
        return None


class CheckpointOrigin(Origin):
    def comparison(self) -> str | None:
        return _comparison(folders.read_info(self.path))

    def open(self) -> weights.Weights:
        return folders.CheckpointWeights(self.path)


class AdapterOrigin(CheckpointOrigin):
    """A checkpoint of adapters: they come merged into their base."""

    def open(self) -> weights.Weights:
        saved = folders.read_info(self.path)["adapter"]
        try:
            base = find_origin(saved["base"]["path"])
        except ValueError as error:
            raise ValueError(f"{self.path} holds adapters only, and their base is gone: {error}") from error
        return adapters.Merged(base.open(), folders.CheckpointWeights(self.path), saved)


class HFOrigin(Origin):
    def open(self) -> weights.Weights:
        return hf_weights.HFWeights(self.path)

    def _named_ends(self) -> list[Any]:
        config = read_json(self.path / hf_config.CONFIG)
        named = [content.get("eos_token_id") for content in (config, self._generation)]
        return [id for ids in named for id in (ids if isinstance(ids, list) else [ids])]

    def comparison(self) -> str | None:
        return _comparison(folders.read_info(self.path, EXPORT)) if (self.path / EXPORT).is_file() else None

    def decoding(self) -> dict[str, Any]:
        return {key: self._generation[key] for key in _DECODING if key in self._generation}

    @property
    def _generation(self) -> dict[str, Any]:
        return hf_config.read_generation_config(self.path)


@dataclass(frozen=True)
class GGUFOrigin(Origin):
    content: GGUFWeights

    def open(self) -> weights.Weights:
        return self.content

    def _tokenizer(self) -> TextTokenizer:
        return tokenizer_from_gguf(self.content.metadata, self.path)

    def _named_ends(self) -> list[Any]:
        return [self.content.metadata.get("tokenizer.ggml.eot_token_id")]


def _comparison(info: dict[str, Any]) -> str | None:
    found = info.get("comparison")
    return found.get("digest") if isinstance(found, dict) else None


def find_origin(path: str, verify: bool = True) -> Origin:
    """What is at `path`: a run, one of its checkpoints, a Hugging Face folder, or a .gguf file.

    Args:
        verify: compare a checkpoint's files with their hashes, which reads all of them.

    Raises:
        ValueError: none of them, damaged, or a model that the backbone cannot be.
    """
    where = Path(path)
    if not where.exists():
        raise ValueError(
            f"no checkpoint at {path!r}: name a run, one of its checkpoints, a Hugging Face folder or a .gguf file"
        )
    if where.suffix == ".gguf":
        gguf = GGUFWeights(where)
        return GGUFOrigin(where, gguf.shape, gguf.metadata.get("llama.context_length"), gguf)
    if (where / hf_config.CONFIG).is_file():
        config = read_json(where / hf_config.CONFIG)
        context = config.get("max_position_embeddings")
        shape = hf_config.shape_from_config(config, where / hf_config.CONFIG)
        return HFOrigin(where, shape, context if isinstance(context, int) else None)
    if where.is_dir() and not folders.is_checkpoint(where) and not folders.all_checkpoints(where):
        raise ValueError(
            f"{path} is neither a run (checkpoints/), nor a checkpoint ({folders.MANIFEST}), "
            f"nor a Hugging Face folder ({hf_config.CONFIG})"
        )
    folder = folders.resolve(path, verify)
    info = folders.read_info(folder)
    kind = AdapterOrigin if info.get("adapter") else CheckpointOrigin
    return kind(folder, folders.read_shape(folder), info.get("context"))


@functools.cache
def shape_at(init_from: str | None) -> dict[str, Any]:
    """`ModelConfig`'s values for the model whose weights a run begins with.

    Raises:
        ValueError: see `find_origin`.
    """
    if not init_from:
        raise ValueError(
            "model=from_hf takes the shape from init_from=: name a Hugging Face folder, a .gguf file, a run or one of "
            "its checkpoints"
        )
    try:
        return asdict(find_origin(init_from, verify=False).shape)
    except ValueError as error:
        raise ValueError(f"init_from={init_from}: {error}") from error


def load_pretrained(path: str, device: str = "auto", dtype: str = "auto") -> Pretrained:
    """Load a model to generate with.

    Args:
        path: a run (its newest whole checkpoint), one of its checkpoints, a Hugging Face folder, or a .gguf file.
        device: "auto" (the GPU where there is one), or a torch device.
        dtype: "auto" (bfloat16 on a GPU, float32 on the CPU), "float32", "bfloat16" or "float16".

    Raises:
        ValueError: nothing to load there, or it is damaged, hostile or of another architecture.
    """
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if dtype != "auto" and dtype not in hf_config.DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: auto, {', '.join(hf_config.DTYPES)}")
    wanted = torch.bfloat16 if where.type == "cuda" else torch.float32
    origin = find_origin(path)
    tokenizer = origin.tokenizer()
    tensors = origin.open()
    tensors.require(origin.shape)  # before memory is taken for them
    with torch.device("meta"):
        model = Transformer(origin.shape).to(hf_config.DTYPES.get(dtype, wanted))
    model.to_empty(device=where)
    model.tie()
    weights.fill(model, tensors)
    model.eval()
    template = tokenizer.chat_template
    chat = None if template is None else ChatTemplate(template, tokenizer.special)
    return Pretrained(model, tokenizer, chat, origin.stop_ids(tokenizer), Path(path).resolve().name)


KEY = "stage.teacher"


def require_same_vocabulary(teacher: Origin, tokenizer: TextTokenizer, vocab_size: int) -> None:
    """Refuse a teacher whose distributions are over other tokens than the student's.

    Args:
        tokenizer: the student's.
        vocab_size: of the student's head.

    Raises:
        ValueError: its tokenizer has other tokens, or its head another number of them.
    """
    try:
        theirs = teacher.tokenizer().tokenizer.get_vocab(with_added_tokens=True)
    except ValueError as error:
        raise ValueError(f"{KEY}={teacher.path}: {error}") from error
    ours = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    problem = None
    if theirs != ours:
        token = min(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
        ids = [f"token {id}" if id is not None else "no token" for id in (theirs.get(token), ours.get(token))]
        problem = f"{token!r} is {ids[0]} of the teacher's tokenizer and {ids[1]} of data.tokenizer"
    elif teacher.shape.vocab_size != vocab_size:
        problem = f"the teacher's head has {teacher.shape.vocab_size:,} tokens, model.vocab_size is {vocab_size:,}"
    if problem:
        raise ValueError(
            f"{KEY}={teacher.path} has another vocabulary: {problem}; distributions are compared token by token"
        )
