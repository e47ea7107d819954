"""Load a model to use from a run, a checkpoint, a Hugging Face folder or a GGUF file.

`find_origin` says what is at a path and reads its shape; `load_pretrained` reads weights, tokenizer and chat template.
"""

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
from nb_lightning.text.chat_tokens import ChatTokenizer, ends_of_turn
from nb_lightning.text.tokenizer import END_OF_TURN, TextTokenizer

EXPORT = "nb_lightning.json"  # in a Hugging Face folder that we exported: its files, and where the model is from
_DECODING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass
class Pretrained:
    """A model to generate with, and what it takes to write its prompts and read its text.

    Attributes:
        model: on its device; in eval mode, unless a run is training it.
        chat: None for a model without a chat template.
        stop_ids: tokens that end a generated row: the end of a document and the end of a turn.
        name: of the folder or file, for reports.
    """

    model: Transformer
    tokenizer: TextTokenizer
    chat: ChatTemplate | None
    stop_ids: tuple[int, ...]
    name: str


def in_training(model: Transformer, tokenizer: TextTokenizer, chat: ChatTemplate, name: str) -> Pretrained:
    """Wrap a model that a run is training, to generate with it between two steps."""
    stop_ids = (tokenizer.eos_id, *ChatTokenizer(tokenizer, chat).end_ids)
    return Pretrained(model, tokenizer, chat, stop_ids, name)


@dataclass(frozen=True)
class Origin:
    """A place that holds a model. Its shape is read, its weights are not.

    Attributes:
        path: the checkpoint's folder, the Hugging Face folder or the GGUF file.
        shape: of the model, with the RoPE base it was last trained with.
        context: tokens a row that the model was made for; None if the files do not say.
    """

    path: Path
    shape: ModelShape
    context: int | None

    def open(self) -> weights.Weights:
        """Open the weights; tensors are read one at a time."""
        raise NotImplementedError

    def digest(self) -> str:
        """Hash the names and contents of all tensors (SHA-256), which reads every one of them."""
        tensors = self.open()
        digests = {name: tensors.digest(name) for name in weights.parameter_shapes(self.shape)}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

    def tokenizer(self) -> TextTokenizer:
        """Load the tokenizer.

        Raises:
            ValueError: there is none, or it has ids that the model does not have.
        """
        tokenizer = self._load_tokenizer()
        if tokenizer.vocab_size > self.shape.vocab_size:
            raise ValueError(
                f"{self.path}: the tokenizer's ids go up to {tokenizer.vocab_size - 1}, the model's to "
                f"{self.shape.vocab_size - 1}"
            )
        return tokenizer

    def _load_tokenizer(self) -> TextTokenizer:
        return load_tokenizer(str(self.path))

    def stop_ids(self, tokenizer: TextTokenizer, chat: ChatTemplate | None = None) -> tuple[int, ...]:
        """List the ids that end a generated row.

        These are the end of a document, every end that the files name, and the end of a turn that the chat template
        writes: a base model's files do not know the token that its chats are trained to end with.

        Args:
            chat: the template that prompts are written with; by default the tokenizer's own.
        """
        names = [END_OF_TURN, tokenizer.special.get("eos_token", END_OF_TURN)]
        ids = {tokenizer.eos_id, *ends_of_turn(tokenizer, chat), *map(tokenizer.tokenizer.token_to_id, names)}
        ids.update(self._end_ids())
        return tuple(sorted(id for id in ids if isinstance(id, int)))

    def _end_ids(self) -> list[Any]:
        """Return the ends that the model's config names; an entry may be None."""
        return []

    def decoding(self) -> dict[str, Any]:
        """Return how the model's makers sample from it, in transformers' words; {} if the files do not say."""
        return {}

    def comparison(self) -> str | None:
        """Return the digest of a reward model's `ComparisonForm`; None for other models."""
        return None


class CheckpointOrigin(Origin):
    """A checkpoint of a run."""

    def comparison(self) -> str | None:
        return _comparison(folders.read_info(self.path))

    def open(self) -> weights.Weights:
        return folders.CheckpointWeights(self.path)


class AdapterOrigin(CheckpointOrigin):
    """A checkpoint of adapters. `open` gives the weights of the base with the adapters merged into them."""

    def open(self) -> weights.Weights:
        saved = folders.read_info(self.path)["adapter"]
        try:
            base = find_origin(saved["base"]["path"])
        except ValueError as error:
            raise ValueError(f"{self.path} holds adapters only, and their base is gone: {error}") from error
        return adapters.MergedWeights(base.open(), folders.CheckpointWeights(self.path), saved)


class HFOrigin(Origin):
    """A Hugging Face folder."""

    def open(self) -> weights.Weights:
        return hf_weights.HFWeights(self.path)

    def _end_ids(self) -> list[Any]:
        config = read_json(self.path / hf_config.CONFIG)
        entries = [content.get("eos_token_id") for content in (config, self._generation_config)]
        return [id for ids in entries for id in (ids if isinstance(ids, list) else [ids])]

    def comparison(self) -> str | None:
        return _comparison(folders.read_info(self.path, EXPORT)) if (self.path / EXPORT).is_file() else None

    def decoding(self) -> dict[str, Any]:
        return {key: self._generation_config[key] for key in _DECODING if key in self._generation_config}

    @property
    def _generation_config(self) -> dict[str, Any]:
        return hf_config.read_generation_config(self.path)


@dataclass(frozen=True)
class GGUFOrigin(Origin):
    """A .gguf file."""

    tensors: GGUFWeights

    def open(self) -> weights.Weights:
        return self.tensors

    def _load_tokenizer(self) -> TextTokenizer:
        return tokenizer_from_gguf(self.tensors.metadata, self.path)

    def _end_ids(self) -> list[Any]:
        return [self.tensors.metadata.get("tokenizer.ggml.eot_token_id")]


def _comparison(info: dict[str, Any]) -> str | None:
    comparison = info.get("comparison")
    return comparison.get("digest") if isinstance(comparison, dict) else None


def find_origin(path: str, verify: bool = True) -> Origin:
    """Find out what is at `path`: a run, one of its checkpoints, a Hugging Face folder, or a .gguf file.

    Args:
        verify: compare a checkpoint's files with their hashes, which reads all of them.

    Raises:
        ValueError: nothing of this kind is there, it is damaged, or the backbone cannot compute the model.
    """
    where = Path(path)
    if not where.exists():
        raise ValueError(
            f"no checkpoint at {path!r}: name a run, one of its checkpoints, a Hugging Face folder or a .gguf file"
        )
    if where.suffix == ".gguf":
        gguf = GGUFWeights(where)
        return GGUFOrigin(where, gguf.shape, gguf.context, gguf)
    if (where / hf_config.CONFIG).is_file():
        config = read_json(where / hf_config.CONFIG)
        context = config.get("max_position_embeddings")
        shape = hf_config.shape_from_config(config, where / hf_config.CONFIG)
        return HFOrigin(where, shape, context if isinstance(context, int) else None)
    if (where / hf_weights.PEFT_CONFIG).is_file():
        raise ValueError(_explain_peft(where))
    if where.is_dir() and not folders.is_checkpoint(where) and not folders.all_checkpoints(where):
        raise ValueError(
            f"{path} is neither a run (checkpoints/), nor a checkpoint ({folders.MANIFEST}), "
            f"nor a Hugging Face folder ({hf_config.CONFIG})"
        )
    folder = folders.resolve(path, verify)
    info = folders.read_info(folder)
    kind = AdapterOrigin if info.get("adapter") else CheckpointOrigin
    return kind(folder, folders.read_shape(folder), info.get("context"))


def _explain_peft(folder: Path) -> str:
    """Say what a folder of adapters is, and how its model is used."""
    config = read_json(folder / hf_weights.PEFT_CONFIG)
    base = config.get("base_model_name_or_path")
    of_base = f"for {base}" if isinstance(base, str) and base else "whose base is not named"
    if (folder / EXPORT).is_file():
        return (
            f"{folder} holds adapters in peft's format ({of_base}), exported from a run, and no model; name that "
            "run, or export it whole with python -m nb_lightning.export --to"
        )
    return (
        f"{folder} holds adapters in peft's format ({of_base}), and no model; merge them into their base with peft "
        "(PeftModel.from_pretrained, merge_and_unload, save_pretrained) and name the folder that this writes"
    )


@functools.cache
def shape_at(init_from: str | None) -> dict[str, Any]:
    """Return the fields of `ModelConfig` for the model whose weights a run begins with.

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
        ValueError: see `find_origin`; or the tensors do not fit the shape.
    """
    target = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if dtype != "auto" and dtype not in hf_config.DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: auto, {', '.join(hf_config.DTYPES)}")
    default_dtype = torch.bfloat16 if target.type == "cuda" else torch.float32
    origin = find_origin(path)
    tokenizer = origin.tokenizer()
    tensors = origin.open()
    tensors.require(origin.shape)  # before memory is allocated
    with torch.device("meta"):
        model = Transformer(origin.shape).to(hf_config.DTYPES.get(dtype, default_dtype))
    model.to_empty(device=target)
    model.tie()
    weights.load_weights(model, tensors)
    model.eval()
    template = tokenizer.chat_template
    chat = None if template is None else ChatTemplate(template, tokenizer.special)
    return Pretrained(model, tokenizer, chat, origin.stop_ids(tokenizer), Path(path).resolve().name)


TEACHER_KEY = "stage.teacher"


def require_same_vocabulary(teacher: Origin, tokenizer: TextTokenizer, vocab_size: int) -> None:
    """Refuse a teacher with another vocabulary than the student's.

    Args:
        tokenizer: the student's.
        vocab_size: of the student's head.

    Raises:
        ValueError: names the first token that differs, or the two sizes.
    """
    try:
        theirs = teacher.tokenizer().tokenizer.get_vocab(with_added_tokens=True)
    except ValueError as error:
        raise ValueError(f"{TEACHER_KEY}={teacher.path}: {error}") from error
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
            f"{TEACHER_KEY}={teacher.path} has another vocabulary: {problem}; distributions are compared token by token"
        )
