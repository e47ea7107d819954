"""Estimate the memory of a run: bytes per device by use.

tests/dry_run/test_memory.py compares the estimate with what is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nb_lightning.config.schema import Config, DPDConfig, RLConfig, TrainerConfig
from nb_lightning.losses.chunks import CPU_TILE, GPU_TILE
from nb_lightning.model.adapters import count_trained_parameters, frozen_dtype
from nb_lightning.model.transformer import ModelShape


def memory_per_device(
    cfg: Config, shape: ModelShape, micro_tokens: int, beside: Mapping[str, ModelShape] | None = None
) -> dict[str, float]:
    """Estimate the bytes on each device by use, to about 15 %, rather too many than too few.

    Args:
        cfg: the whole config.
        shape: of the model that trains.
        micro_tokens: tokens of the largest micro-batch, `seq_len` x `micro_batch_size`.
        beside: shapes of the frozen models that the stage holds, under the names of `frozen_models`.
    """
    beside = beside or {}
    sizes = _Sizes(cfg, shape)
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes if sizes.sharded else 1
    trained = count_trained_parameters(shape, cfg.stage.adapter)
    wide = 2 if cfg.trainer.precision == "bf16-true" else 4  # bytes of a trained parameter
    moment = {"adamw": wide, "adamw8bit": 1 + 4 / 256, "paged_adamw8bit": 0}[cfg.stage.optim.name]
    weights = {"adapters" if sizes.adapted else "weights": trained * wide / ranks}
    if sizes.adapted:
        weights["frozen weights"] = sizes.frozen() / ranks
    return {
        **weights,
        "gradients": trained * wide / ranks,
        "optimizer": trained * 2 * moment / ranks,
        **({"gathered layers": sizes.gathered()} if sizes.sharded else {}),
        **{name: sizes.beside(name, other, ranks) for name, other in beside.items()},
        **sizes.activations(micro_tokens),
        "head": sizes.head(micro_tokens, beside.get("teacher")),
    }


def kv_cache_bytes(stage: RLConfig, trainer: TrainerConfig, shape: ModelShape) -> float:
    """Return the bytes of the KV cache with `stage.max_batch` rows of the longest phase."""
    longest = max(phase.seq_len for phase in stage.phases.values())
    width = 4 if trainer.precision == "32-true" else 2
    return 2 * width * stage.max_batch * longest * shape.depth * shape.n_kv_heads * shape.head_dim


@dataclass
class _Sizes:
    """Bytes by use, before any sharding.

    Attributes:
        compute: bytes of an element in products.
        stored: bytes of an element of embedding, norms and head.
        embeddings: parameters of embedding and head.
        linears: parameters of the linears of one layer.
    """

    cfg: Config
    shape: ModelShape

    def __post_init__(self) -> None:
        trainer, adapter = self.cfg.trainer, self.cfg.stage.adapter
        self.adapted, self.quantised = adapter.name != "none", adapter.name == "qlora"
        self.sharded = trainer.strategy == "fsdp"
        self.autocast = trainer.precision == "bf16-mixed"
        self.compute = 4 if trainer.precision == "32-true" else 2
        self.stored = 2 if trainer.precision == "bf16-true" else 4
        if self.adapted:
            self.stored = frozen_dtype(adapter, trainer.precision).itemsize
        self.embeddings, self.linears = _embeddings(self.shape), _linears(self.shape)

    def frozen(self) -> float:
        """Count the weights that adapters leave frozen."""
        adapter = self.cfg.stage.adapter
        linears = self.shape.n_layers * self.linears
        trained = min(len(adapter.also_train) * self.shape.vocab_size * self.shape.d_model, self.embeddings)
        rest = (self.shape.count_parameters() - linears - trained) * self.stored
        return rest + linears * (_nf4(adapter.double_quant) if self.quantised else self.stored)

    def beside(self, name: str, shape: ModelShape, ranks: int) -> float:
        """Count the weights of a frozen model (`stages.frozen.FrozenModel`, `rewards.preference.load_reward_model`)."""
        if name == "reward model":  # not sharded
            return shape.count_parameters() * (4 if self.cfg.trainer.accelerator == "cpu" else 2)
        linears = shape.n_layers * _linears(shape)
        nf4 = name == "teacher" and isinstance(self.cfg.stage, DPDConfig) and self.cfg.stage.teacher_nf4
        size = (shape.count_parameters() - linears) * self.compute + linears * (_nf4(True) if nf4 else self.compute)
        # FSDP2 leaves the root's weights gathered until a backward, and here none comes.
        return size / ranks + (_embeddings(shape) * self.compute if self.sharded else 0)

    def gathered(self) -> float:
        """Count what FSDP2 gathers: the layer in use and the next one, embedding and head."""
        return (2 * self.linears + self.embeddings) * self.compute

    def activations(self, tokens: int) -> dict[str, float]:
        """Count what the backward needs of each layer, and what one layer needs while it runs."""
        s, adapter = self.shape, self.cfg.stage.adapter
        D, F, E, H, K = s.d_model, s.d_mlp, s.head_dim, s.n_heads, s.n_kv_heads
        norms = 4 * D * (2 if self.adapted else 4)  # input; the gradient of a norm's weight needs the output too
        inputs = D * (5 if self.autocast else 2)  # of q, k, v, gate and up
        saved = norms + self.compute * (inputs + 2 * E * (H + K) + 4 * F) + 4 * H
        if self.adapted:
            saved += self.compute * adapter.rank * len(adapter.targets)
        temporary = self.compute * ((3 if self.autocast else 2) * F + 2 * D)
        # Autocast makes a narrow copy of a wide weight for each product, which the backward of that product keeps.
        # FSDP2 gathers narrow ones; weights in 4 bits come back one at a time.
        copies = 2 * self.linears if self.autocast and self.stored == 4 and not (self.quantised or self.sharded) else 0
        restored = D * F * self.compute if self.quantised else 0
        if self.cfg.trainer.activation_checkpointing:
            return {
                "layer inputs": tokens * s.depth * D * self.stored,
                "layer in hand": tokens * (saved + temporary) + copies + restored,
            }
        return {
            "activations": s.depth * tokens * saved + s.n_layers * copies,
            "layer in hand": tokens * temporary + restored,
        }

    def head(self, tokens: int, teacher: ModelShape | None) -> float:
        """Count logits, hidden states and gradient of the chunked head, with a teacher's beside them."""
        V, D = self.shape.vocab_size, self.shape.d_model
        logits = min(self.cfg.stage.head_chunk, tokens) * V
        tile = min(logits, CPU_TILE if self.cfg.trainer.accelerator == "cpu" else GPU_TILE)
        size = logits * self.compute + 2 * tile * 4 + tokens * D * self.compute
        if teacher is not None:
            size += logits * self.compute + 2 * tile * 4 + tokens * teacher.d_model * self.compute
        if not self.adapted or "head" in self.cfg.stage.adapter.also_train:
            size += V * D * 4  # the gradient in float32 before it joins the others
        if self.stored > self.compute:
            size += V * D * self.compute  # the weight in the dtype of the products
        return size


def _embeddings(shape: ModelShape) -> int:
    """Count the parameters of embedding and head."""
    return shape.vocab_size * shape.d_model * (1 if shape.tie_embeddings else 2)


def _linears(shape: ModelShape) -> int:
    """Count the parameters of the linears of one layer."""
    D = shape.d_model
    return (shape.count_parameters() - _embeddings(shape) - D) // shape.n_layers - 2 * D


def _nf4(double_quant: bool) -> float:
    """Return the bytes of a weight in 4 bits, with its share of the scales."""
    return 0.5 + ((1 + 4 / 256) / 64 if double_quant else 4 / 64)
