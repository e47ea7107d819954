"""A model to use: weights, tokenizer and chat template of a run, a checkpoint, a Hugging Face folder or a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nb_lightning import checkpoints, weights
from nb_lightning.model import ModelShape, Transformer
from nb_lightning.tokenizer import TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from nb_lightning.chat import ChatTemplate

END_OF_TURN = "<|im_end|>"


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


@dataclass(frozen=True)
class Origin:
    """Where weights come from, before any of them is read.

    Attributes:
        kind: "checkpoint" or "hf".
        path: the checkpoint's folder, or the Hugging Face folder.
        shape: of the model, with its own RoPE base.
        context: tokens that the model was made for; None where nothing says so.
    """

    kind: str
    path: Path
    shape: ModelShape
    context: int | None

    def open(self) -> weights.Weights:
        """The tensors, read one at a time."""
        return weights.HFWeights(self.path) if self.kind == "hf" else checkpoints.CheckpointWeights(self.path)

    def tokenizer(self) -> TextTokenizer:
        """Raises ValueError where it has none."""
        folder = self.path if self.kind == "hf" else self.path.parent.parent / "tokenizer"
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{self.path} has no tokenizer: there is no {folder / 'tokenizer.json'}")
        return load_tokenizer(str(folder))

    def stop_ids(self, tokenizer: TextTokenizer) -> tuple[int, ...]:
        """The end of a document, and all that the files call an end."""
        ids = {tokenizer.eos_id}
        for token in (END_OF_TURN, tokenizer.special.get("eos_token")):
            ids.add(tokenizer.tokenizer.token_to_id(token) if token else None)
        if self.kind == "hf":
            for file in ("generation_config.json", weights.CONFIG):
                path = self.path / file
                named = weights.read_json(path).get("eos_token_id") if path.is_file() else None
                ids.update(named if isinstance(named, list) else [named])
        return tuple(sorted(id for id in ids if isinstance(id, int)))


def find(path: str) -> Origin:
    """What is at `path`: a run, one of its checkpoints, or a Hugging Face folder.

    Raises:
        ValueError: none of them, damaged, or a model that the backbone cannot be.
    """
    folder = Path(path)
    if (folder / weights.CONFIG).is_file():
        config = weights.read_json(folder / weights.CONFIG)
        shape = weights.shape_from_config(config, folder / weights.CONFIG)
        context = config.get("max_position_embeddings")
        return Origin("hf", folder, shape, context if isinstance(context, int) else None)
    if folder.is_dir() and not (folder / checkpoints.MANIFEST).is_file() and not checkpoints.all_checkpoints(folder):
        raise ValueError(
            f"{path} is neither a run (checkpoints/), nor a checkpoint ({checkpoints.MANIFEST}), "
            f"nor a Hugging Face folder ({weights.CONFIG})"
        )
    folder = checkpoints.resolve(path)
    return Origin("checkpoint", folder, checkpoints.read_shape(folder), checkpoints.read_info(folder).get("context"))


def load_pretrained(path: str, device: str = "auto", dtype: str = "auto") -> Pretrained:
    """Load a model to generate with.

    Args:
        path: a run (its newest whole checkpoint), one of its checkpoints, or a Hugging Face folder.
        device: "auto" (the GPU where there is one), or a torch device.
        dtype: "auto" (bfloat16 on a GPU, float32 on the CPU), "float32", "bfloat16" or "float16".

    Raises:
        ValueError: nothing to load there, or it is damaged, hostile or of another architecture.
    """
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if dtype != "auto" and dtype not in weights.DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: auto, {', '.join(weights.DTYPES)}")
    wanted = torch.bfloat16 if where.type == "cuda" else torch.float32
    origin = find(path)
    tokenizer = origin.tokenizer()
    tensors = origin.open()
    tensors.require(origin.shape)  # before memory is taken for them
    with torch.device("meta"):
        model = Transformer(origin.shape).to(weights.DTYPES.get(dtype, wanted))
    model.to_empty(device=where)
    model.tie()
    weights.fill(model, tensors)
    model.eval()
    stop_ids = origin.stop_ids(tokenizer)
    return Pretrained(model, tokenizer, chat_template(tokenizer), stop_ids, Path(path).resolve().name)


def chat_template(tokenizer: TextTokenizer) -> Any:
    """The template that came with the tokenizer, or None."""
    if tokenizer.chat_template is None:
        return None
    try:
        from nb_lightning.chat import ChatTemplate
    except ImportError:
        return None
    return ChatTemplate(tokenizer.chat_template, tokenizer.special)
