"""What a run would be, without running it: plan, parameters, FLOPs, memory per device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nb_lightning.checkpoints.pretrained import Origin, find_origin
from nb_lightning.config.compose import phases_of, plan_of
from nb_lightning.config.schema import Config
from nb_lightning.losses.chunks import CPU_TILE, GPU_TILE
from nb_lightning.model.adapters import count_trained_parameters, frozen_dtype
from nb_lightning.model.transformer import ModelShape, Transformer

GIB = 2**30


def describe(cfg: Config) -> str:
    """A readable report. The model is built on `meta`: its parameters are counted, not computed."""
    planned, plan = plan_of(cfg.stage), plan_of(cfg.stage).in_whole_steps()
    shape = ModelShape(**asdict(cfg.model))
    with torch.device("meta"):
        number = sum(p.numel() for p in Transformer(shape).parameters())
    embeddings = shape.vocab_size * shape.d_model * (1 if shape.tie_embeddings else 2)
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    adapted, trained = cfg.stage.adapter.name != "none", count_trained_parameters(shape, cfg.stage.adapter)
    lines = [
        f"stage {cfg.stage.name}, {ranks} device(s), {cfg.trainer.strategy}, {cfg.trainer.precision}",
        f"model       {number:,} parameters ({number - embeddings:,} without embeddings)",
        *([f"adapters    {trained:,} parameters train ({100 * trained / number:.2g} %)"] if adapted else []),
        "",
        f"{'phase':<28}{'tokens planned':>20}{'as run':>22}{'steps':>12}{'seq_len':>9}{'RoPE base':>12}{'lr':>22}",
    ]
    frozen = beside(cfg, shape)
    flops = 0.0
    for before, phase in zip(planned.phases, plan.phases):
        flops += phase.tokens * shape.flops_per_token(phase.seq_len, frozen=adapted)
        if "teacher" in frozen:  # its forward
            flops += phase.tokens * frozen["teacher"].flops_per_token(phase.seq_len) / 3
        rate = f"{phase.lr.start:g}" if phase.lr.end is None else f"{phase.lr.start:g} to {phase.lr.end:g}"
        lines.append(
            f"{phase.name:<28}{before.tokens:>20,}{phase.tokens:>22,}{phase.steps:>12,}{phase.seq_len:>9}"
            f"{phase.rope_theta:>12g}{rate:>22}"
        )
        lines.append("  " + ", ".join(f"{name} {weight:.4g}" for name, weight in phase.mixture.items()))
    samples = cfg.stage.name == "rl"
    lines += [
        f"{'all':<28}{planned.total_tokens:>20,}{plan.total_tokens:>22,}{plan.total_steps:>12,}",
        "",
        f"compute     {flops:.3g} FLOP forward and backward{', the teacher forward' if 'teacher' in frozen else ''} "
        "(causal attention, nothing recomputed)",
        *(["            at most: completions as long as they may be; sampling them comes on top"] if samples else []),
        "memory per device, estimated, at the largest micro-batch:",
    ]
    micro_tokens = max(phase.seq_len * phase.micro_batch_size for phase in plan.phases)
    memory = memory_per_device(cfg, shape, micro_tokens, frozen)
    lines += [f"  {name:<18}{size / GIB:>10.2f} GiB" for name, size in memory.items()]
    lines.append(f"  {'all':<18}{sum(memory.values()) / GIB:>10.2f} GiB")
    if cfg.stage.optim.name.startswith("paged"):
        lines.append(f"  and the optimizer's state, {2 * trained / GIB:.2f} GiB, in the host's memory (paged)")
    if samples:
        lines.append(
            f"  and keys and values of the completions being sampled, at most {_cache(cfg, shape) / GIB:.2f} GiB"
        )
    absent = missing(cfg)
    if absent:
        lines.append("not there yet:")
    width = max(map(len, absent), default=0)
    for key, path in absent.items():
        counted = ", counted as large as the model" if key in ("stage.teacher", "stage.reward_model") else ""
        lines.append(f"  {key:<{width}}  {path}{counted}")
    return "\n".join(lines)


def beside(cfg: Config, shape: ModelShape) -> dict[str, ModelShape]:
    """The frozen models that a stage holds, by their names in the table.

    Args:
        shape: of the model that trains, and of what is not there yet.
    """
    found = {}
    for key, name in (("teacher", "teacher"), ("reward_model", "reward model")):
        path = getattr(cfg.stage, key, None)
        if path:
            origin = _model_at(path)
            found[name] = origin.shape if origin else shape
    if getattr(cfg.stage, "kl_weight", 0):
        found["reference"] = shape
    return found


def missing(cfg: Config) -> dict[str, str]:
    """What the run reads and is not there yet: YAML key -> path. Not what it makes by itself; no s3:// is asked."""
    stage, data = cfg.stage, cfg.data
    models = {"init_from": cfg.init_from}
    models |= {f"stage.{key}": getattr(stage, key, None) for key in ("teacher", "reward_model")}
    files = {"data.template": getattr(data, "template", None)}
    if data.tokenizer != "bytes":
        files["data.tokenizer"] = data.tokenizer
    if not (getattr(data, "demo_corpus", False) or getattr(data, "demo_tasks", False)):
        drawn = {name for phase in phases_of(stage).values() for name, weight in phase.mixture.items() if weight}
        files |= {f"data.sources.{name}": path for name, path in data.sources.items() if name in drawn}
        files |= {f"data.tasks[{i}]": path for i, path in enumerate(getattr(data, "tasks", []))}
    return {
        **{key: path for key, path in models.items() if path and not _model_at(path)},
        **{key: path for key, path in files.items() if path and "://" not in path and not Path(path).exists()},
    }


def _model_at(path: str) -> Origin | None:
    try:
        return find_origin(path, verify=False)
    except ValueError:
        return None


def _cache(cfg: Config, shape: ModelShape) -> float:
    """Bytes of the KV cache with `stage.max_batch` rows of the longest phase."""
    longest = max(phase.seq_len for phase in cfg.stage.phases.values())
    width = 4 if cfg.trainer.precision == "32-true" else 2
    return 2 * width * cfg.stage.max_batch * longest * shape.n_layers * shape.n_kv_heads * shape.head_dim


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
    trained = count_trained_parameters(shape, cfg.stage.adapter)
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
        rest = (self.shape.count_parameters() - linears - trained) * self.stored
        return rest + linears * (_nf4(adapter.double_quant) if self.quantised else self.stored)

    def beside(self, name: str, shape: ModelShape, ranks: int) -> float:
        """Of a frozen model (`stages.frozen.FrozenModel`, `rewards.preference.load_reward_model`)."""
        if name == "reward model":  # whole on every device
            return shape.count_parameters() * (4 if self.cfg.trainer.accelerator == "cpu" else 2)
        linears = shape.n_layers * _linears(shape)
        nf4 = name == "teacher" and self.cfg.stage.teacher_nf4
        size = (shape.count_parameters() - linears) * self.compute + linears * (_nf4(True) if nf4 else self.compute)
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
    return (shape.count_parameters() - _embeddings(shape) - D) // shape.n_layers - 2 * D


def _nf4(double_quant: bool) -> float:
    """Bytes of a weight in 4 bits, with its share of the scales."""
    return 0.5 + ((1 + 4 / 256) / 64 if double_quant else 4 / 64)
