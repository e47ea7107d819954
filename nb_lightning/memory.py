"""Memory of a run on each device, estimated from its config.

Counted from what torch really keeps (tests/test_memory.py compares it with the tensors of a step): weights as they are
stored, gradients and optimizer state of what trains, and the activations of the largest micro-batch:

* what autograd keeps of a layer: the norms' inputs in float32; the inputs of its linears, under autocast a copy for
  each; q, k, v and the attention's output; four MLP tensors; what is between A and B of an adapter. With activation
  checkpointing that is there for one layer, and of the others only the input.
* what the backward of a layer holds beside that: a few MLP tensors, and a weight that comes back from 4 bits.
* the head: one chunk of logits, its tile in float32, and what its gradients need; with a teacher the same of its own.
* the frozen models beside it: teacher, reference, reward model.

Not counted: what passes through a frozen model (it is gone when the model that trains is at its peak), the CUDA context
(about 0.5 GiB), what the allocator rounds up, buffers of the communication library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nb_lightning.adapters import frozen_dtype, trained_parameters
from nb_lightning.config import Config
from nb_lightning.model import ModelShape
from nb_lightning.token_walk import CPU_TILE, GPU_TILE


def memory_per_device(
    cfg: Config, shape: ModelShape, micro_tokens: int, beside: Mapping[str, ModelShape] | None = None
) -> dict[str, float]:
    """Bytes on each device by use, an estimate to about 15 %, rather too much than too little.

    Args:
        micro_tokens: of the largest micro-batch, `seq_len` x `micro_batch_size`.
        beside: the frozen models that the stage holds: "teacher", "reference", "reward model", as far as it has them.
    """
    beside = beside or {}
    sizes = _Sizes(cfg, shape)
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes if sizes.sharded else 1
    trained = trained_parameters(shape, cfg.stage.adapter)
    wide = 2 if cfg.trainer.precision == "bf16-true" else 4  # what trains is stored in
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


@dataclass
class _Sizes:
    cfg: Config
    shape: ModelShape

    def __post_init__(self) -> None:
        trainer, adapter = self.cfg.trainer, self.cfg.stage.adapter
        self.adapted, self.quantised = adapter.name != "none", adapter.name == "qlora"
        self.sharded = trainer.strategy == "fsdp"
        self.autocast = trainer.precision == "bf16-mixed"
        self.compute = 4 if trainer.precision == "32-true" else 2  # bytes of an element in products
        self.stored = 2 if trainer.precision == "bf16-true" else 4  # ... of embedding, norms and head
        if self.adapted:
            self.stored = frozen_dtype(adapter, trainer.precision).itemsize
        self.embeddings, self.linears = _embeddings(self.shape), _linears(self.shape)

    def frozen(self) -> float:
        adapter = self.cfg.stage.adapter
        linears = self.shape.n_layers * self.linears
        trained = min(len(adapter.also_train) * self.shape.vocab_size * self.shape.d_model, self.embeddings)
        rest = (self.shape.parameters() - linears - trained) * self.stored
        return rest + linears * (_nf4(adapter.double_quant) if self.quantised else self.stored)

    def beside(self, name: str, shape: ModelShape, ranks: int) -> float:
        """Of a frozen model (`teacher.FrozenTeacher`, `rewards.preference.load_reward_model`)."""
        if name == "reward model":  # whole on every device
            return shape.parameters() * (4 if self.cfg.trainer.accelerator == "cpu" else 2)
        linears = shape.n_layers * _linears(shape)
        nf4 = name == "teacher" and self.cfg.stage.teacher_nf4
        size = (shape.parameters() - linears) * self.compute + linears * (_nf4(True) if nf4 else self.compute)
        # FSDP2 leaves the root's weights gathered until a backward, and here none comes.
        return size / ranks + (_embeddings(shape) * self.compute if self.sharded else 0)

    def gathered(self) -> float:
        """The layer in use and the next one; embedding and head."""
        return (2 * self.linears + self.embeddings) * self.compute

    def activations(self, tokens: int) -> dict[str, float]:
        s, adapter = self.shape, self.cfg.stage.adapter
        D, F, E, H, K = s.d_model, s.d_mlp, s.head_dim, s.n_heads, s.n_kv_heads
        norms = 4 * D * (2 if self.adapted else 4)  # input; the gradient of a norm's weight needs the output too
        inputs = D * (5 if self.autocast else 2)  # of q, k, v, gate and up
        kept = norms + self.compute * (inputs + 2 * E * (H + K) + 4 * F) + 4 * H
        if self.adapted:
            kept += self.compute * adapter.rank * len(adapter.targets)
        passing = self.compute * ((3 if self.autocast else 2) * F + 2 * D)
        # Autocast makes a narrow copy of a wide weight for each product, which the backward of that product keeps.
        # FSDP2 gathers narrow ones; weights in 4 bits come back one at a time.
        copies = 2 * self.linears if self.autocast and self.stored == 4 and not (self.quantised or self.sharded) else 0
        restored = D * F * self.compute if self.quantised else 0
        if self.cfg.trainer.activation_checkpointing:
            return {
                "layer inputs": tokens * s.n_layers * D * self.stored,
                "layer in hand": tokens * (kept + passing) + copies + restored,
            }
        return {
            "activations": s.n_layers * (tokens * kept + copies),
            "layer in hand": tokens * passing + restored,
        }

    def head(self, tokens: int, teacher: ModelShape | None) -> float:
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
    """Parameters of embedding and head."""
    return shape.vocab_size * shape.d_model * (1 if shape.tie_embeddings else 2)


def _linears(shape: ModelShape) -> int:
    """Parameters of the linears of one layer."""
    D = shape.d_model
    return (shape.parameters() - _embeddings(shape) - D) // shape.n_layers - 2 * D


def _nf4(double_quant: bool) -> float:
    """Bytes of a weight in 4 bits, with its share of the scales."""
    return 0.5 + ((1 + 4 / 256) / 64 if double_quant else 4 / 64)
