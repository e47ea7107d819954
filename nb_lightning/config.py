"""The schema of every YAML under conf/, as dataclasses; the only library file that knows Hydra.

Values live in the YAML files; a field without a default must be given there. Hydra refuses unknown keys and wrong
types against these classes, `check` refuses values that cannot work together. Nothing here imports torch, so that a
wrong key fails before anything heavy is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import II, MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nb_lightning.phases import LearningRate, Phase, PhasePlan

# `_target_` runs code. Only these places may be named; a `pkg://` entry of hydra.searchpath adds its own package.
TRUSTED_TARGETS = ("callbacks.", "nb_lightning.", "lightning.pytorch.callbacks.", "lightning.pytorch.loggers.")

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a layer


@dataclass
class LearningRateConfig:
    """Learning rate over a phase: constant `start`, or `start` to `end` along `shape`."""

    start: float = MISSING
    end: float | None = None
    shape: str = "linear"  # linear | cosine | one_minus_sqrt | exponential


@dataclass
class PhaseConfig:
    """One phase. `null` takes the value of the stage; without a `rope_theta` the model's holds."""

    tokens: int = MISSING  # over all ranks; what counts is the proportion when stage.total_tokens is set
    lr: LearningRateConfig = field(default_factory=LearningRateConfig)
    mixture: dict[str, float] = MISSING  # source -> probability; sums to 1
    seq_len: int = MISSING  # tokens per row
    rope_theta: float = II("model.rope_theta")  # RoPE base frequency
    global_batch_tokens: int | None = None
    micro_batch_size: int | None = None


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw | adamw8bit | paged_adamw8bit
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    max_skipped_steps: int = 10  # consecutive steps with a NaN or infinite loss or gradient before the run stops


@dataclass
class AdapterConfig:
    """Low-rank adapters on the frozen weights of `init_from`: W becomes W + alpha / rank * B @ A."""

    name: str = "none"  # none | lora | qlora: the base's layers in 4 bits (NF4)
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # of what goes into the adapters
    targets: list[str] = field(default_factory=lambda: list(LINEARS))  # the layers' linears that get one
    also_train: list[str] = field(default_factory=list)  # embedding, head: trained whole, say for new tokens
    double_quant: bool = True  # qlora: the scales of the 4-bit blocks in 8 bits
    compute_dtype: str = "auto"  # qlora: of products with 4-bit weights; auto | float32 | bfloat16


@dataclass
class StageConfig:
    """What every stage has."""

    name: str = MISSING
    total_tokens: int | None = None  # scales the whole plan in proportion; null keeps it as written
    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    global_batch_tokens: int = MISSING  # tokens per optimizer step over all ranks
    micro_batch_size: int = MISSING  # rows per rank per forward
    optim: OptimConfig = field(default_factory=OptimConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    head_chunk: int = 512  # tokens of logits held at a time


@dataclass
class PretrainConfig(StageConfig):
    """FG-WSD pretraining."""


@dataclass
class SFTConfig(StageConfig):
    """Supervised fine-tuning on conversations: a cold start, then all."""


@dataclass
class ModelConfig:
    """The backbone's shape; see `nb_lightning.model.ModelShape` for the letters."""

    vocab_size: int = MISSING
    d_model: int = MISSING
    n_layers: int = MISSING
    n_heads: int = MISSING
    n_kv_heads: int = MISSING
    head_dim: int = MISSING
    d_mlp: int = MISSING
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0  # of phases that do not give their own
    tie_embeddings: bool = False
    init_std: float = 0.02


@dataclass
class DataConfig:
    """Tokenized sources. A source is a folder (or s3:// prefix) with `train/` and `val/`, made by data.prepare."""

    sources: dict[str, str] = field(default_factory=dict)  # name -> folder
    tokenizer: str = MISSING  # "bytes", a tokenizer.json, or a folder that holds one
    mask_documents: bool = True  # attention and positions restart at each document inside a row
    verify: bool = True  # check each chunk's hash when it is first opened
    workers: int = 0  # loader processes per rank
    val_rows: int = 64  # held-out rows per source and validation
    demo_corpus: bool = False  # build the embedded demo corpus where it is missing


@dataclass
class SFTDataConfig(DataConfig):
    """Sources of conversations, made by data.prepare --chat."""

    template: str | None = None  # file of the chat template they were made with; null: the tokenizer's own, else ChatML
    over_long: str = "drop"  # drop | truncate | split: what becomes of samples that a row cannot hold
    demo_tasks: bool = False  # build the embedded demo tasks' sources where they are missing
    tasks: list[str] = field(default_factory=list)  # .jsonl files of held-out tasks that TaskAccuracy measures


@dataclass
class TrainerConfig:
    accelerator: str = "auto"  # auto | cpu | cuda
    strategy: str = "single"  # single | ddp | fsdp
    devices: int = 1  # per node
    num_nodes: int = 1
    precision: str = "32-true"  # 32-true | bf16-mixed | bf16-true
    attention: str = "auto"  # auto | sdpa | flex | xformers
    compile: bool = False  # torch.compile each layer
    activation_checkpointing: bool = False
    threads: int | None = None  # torch threads per process; null leaves torch's default
    log_every_n_steps: int = 10
    val_every_n_steps: int = 200
    save_every_n_steps: int = 200
    keep_last: int = 2  # newest checkpoints kept besides those at phase boundaries
    progress_bar: bool = True


@dataclass
class PathsConfig:
    root: str = MISSING  # everything a run writes is below
    runs: str = MISSING
    data_root: str = MISSING


@dataclass
class Config:
    """The root: `python train.py stage=... model=... trainer=...`."""

    stage: StageConfig = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    trainer: TrainerConfig = MISSING
    paths: PathsConfig = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    run_name: str = MISSING
    seed: int = 0
    init_from: str | None = None  # start from the weights of another run, a checkpoint or a Hugging Face folder
    ckpt_path: str | None = None  # continue this very run from one of its checkpoints
    resume: bool = False  # continue this very run from its newest whole checkpoint
    dry_run: bool = False  # print the plan, sizes and memory, and stop


def register(shape_of: Callable[[str | None], dict[str, Any]] | None = None) -> None:
    """Put the schemas where the YAML files' defaults lists find them.

    Args:
        shape_of: `ModelConfig`'s values of the weights at `init_from`; what `model=from_hf` looks them up with.
    """
    if shape_of is not None:
        OmegaConf.register_new_resolver("shape_of", lambda path, key: shape_of(path)[key], replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, node in (("model", ModelConfig), ("trainer", TrainerConfig), ("paths", PathsConfig)):
        store.store(group=group, name="schema", node=node)
    store.store(group="stage", name="pretrain_schema", node=PretrainConfig)
    store.store(group="data", name="pretrain_schema", node=DataConfig)
    store.store(group="stage", name="sft_schema", node=SFTConfig)
    store.store(group="data", name="sft_schema", node=SFTDataConfig)


def plan_of(stage: StageConfig) -> PhasePlan:
    """The phases of a stage as written, or scaled to `stage.total_tokens`."""
    phases = []
    for name, p in stage.phases.items():
        phases.append(
            Phase(
                name=str(name),
                tokens=p.tokens,
                lr=LearningRate(p.lr.start, p.lr.end, p.lr.shape),
                mixture=dict(p.mixture),
                seq_len=p.seq_len,
                rope_theta=p.rope_theta,
                global_batch_tokens=_first_given(p.global_batch_tokens, stage.global_batch_tokens),
                micro_batch_size=_first_given(p.micro_batch_size, stage.micro_batch_size),
            )
        )
    plan = PhasePlan(tuple(phases))
    return plan.scaled(stage.total_tokens) if stage.total_tokens else plan


def _first_given(own: int | None, of_the_stage: int) -> int:
    return of_the_stage if own is None else own


def check(cfg: Config, trusted_packages: Iterable[str] = ()) -> None:
    """Raise one `ValueError` that names the key and what is allowed, for the first thing that cannot work.

    Checks only; nothing is rewritten.
    """
    try:
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        _, _, by_resolver = reason.partition("raised while resolving interpolation: ")
        raise ValueError(by_resolver or f"{error.full_key}: {reason}") from error
    _one_of("trainer.accelerator", cfg.trainer.accelerator, ("auto", "cpu", "cuda"))
    _one_of("trainer.strategy", cfg.trainer.strategy, ("single", "ddp", "fsdp"))
    _one_of("trainer.precision", cfg.trainer.precision, ("32-true", "bf16-mixed", "bf16-true"))
    _one_of("trainer.attention", cfg.trainer.attention, ("auto", "sdpa", "flex", "xformers"))
    _one_of("stage.optim.name", cfg.stage.optim.name, ("adamw", "adamw8bit", "paged_adamw8bit"))
    for key in ("devices", "num_nodes", "log_every_n_steps", "val_every_n_steps", "save_every_n_steps", "keep_last"):
        _positive(f"trainer.{key}", getattr(cfg.trainer, key))
    for key in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_mlp", "rope_theta"):
        _positive(f"model.{key}", getattr(cfg.model, key))
    _positive("stage.head_chunk", cfg.stage.head_chunk)
    _positive("stage.optim.clip_norm", cfg.stage.optim.clip_norm)
    _positive("data.val_rows", cfg.data.val_rows)
    if cfg.data.workers < 0:
        raise ValueError(f"data.workers is {cfg.data.workers}; it must not be negative")
    if cfg.stage.total_tokens is not None:
        _positive("stage.total_tokens", cfg.stage.total_tokens)
    if cfg.model.n_heads % cfg.model.n_kv_heads:
        raise ValueError(f"model.n_heads {cfg.model.n_heads} is not a multiple of n_kv_heads {cfg.model.n_kv_heads}")
    if cfg.model.head_dim % 2:
        raise ValueError(f"model.head_dim is {cfg.model.head_dim}; rotary positions need an even one")
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    if cfg.trainer.strategy == "single" and ranks > 1:
        raise ValueError(
            f"trainer.strategy=single runs one process, but devices x num_nodes is {ranks}; use ddp or fsdp"
        )
    if cfg.stage.optim.name != "adamw" and cfg.trainer.strategy == "fsdp":
        raise ValueError(f"stage.optim.name={cfg.stage.optim.name} does not work with trainer.strategy=fsdp; use adamw")
    _check_adapter(cfg)
    if cfg.ckpt_path and cfg.init_from and cfg.stage.adapter.name == "none":
        raise ValueError(
            "ckpt_path and init_from are both set: ckpt_path (or resume=true) continues this very run with its "
            "optimizer and position, init_from starts a new run from another one's weights; choose one"
        )
    if not cfg.run_name or os.sep in cfg.run_name or cfg.run_name.startswith("."):
        raise ValueError(f"run_name is {cfg.run_name!r}; it names a folder below paths.runs, without '{os.sep}'")
    plan_of(cfg.stage).validate("stage.phases", cfg.data.sources, ranks)
    check_targets({"callbacks": cfg.callbacks, "logger": cfg.logger}, trusted_packages)


def _check_adapter(cfg: Config) -> None:
    adapter, key = cfg.stage.adapter, "stage.adapter"
    _one_of(f"{key}.name", adapter.name, ("none", "lora", "qlora"))
    if adapter.name == "none":
        return
    _positive(f"{key}.rank", adapter.rank)
    _positive(f"{key}.alpha", adapter.alpha)
    if not 0 <= adapter.dropout < 1:
        raise ValueError(f"{key}.dropout is {adapter.dropout}; it must be from 0 to below 1")
    if not adapter.targets:
        raise ValueError(f"{key}.targets is empty; allowed: {', '.join(LINEARS)}")
    for i, target in enumerate(adapter.targets):
        _one_of(f"{key}.targets[{i}]", target, LINEARS)
    for i, name in enumerate(adapter.also_train):
        _one_of(f"{key}.also_train[{i}]", name, ("embedding", "head"))
    _one_of(f"{key}.compute_dtype", adapter.compute_dtype, ("auto", "float32", "bfloat16"))
    if adapter.name == "qlora" and cfg.trainer.strategy == "fsdp":
        raise ValueError(
            f"{key}.name=qlora does not work with trainer.strategy=fsdp (4-bit weights cannot be sharded); use lora, "
            "or trainer.strategy=single or ddp"
        )
    if not cfg.init_from and not cfg.dry_run:
        raise ValueError(
            f"{key}.name={adapter.name} needs init_from, with resume=true too: adapters train on a base that stays as "
            "it is, and their checkpoints do not hold it"
        )


def check_targets(nodes: Any, trusted_packages: Iterable[str] = (), path: str = "") -> None:
    """Refuse any `_target_` outside `TRUSTED_TARGETS` and the packages the user named on the command line."""
    allowed = (*TRUSTED_TARGETS, *(f"{package}." for package in trusted_packages))
    if OmegaConf.is_config(nodes):
        nodes = OmegaConf.to_container(nodes, resolve=True)
    if isinstance(nodes, dict):
        target = nodes.get("_target_")
        if target is not None and not (isinstance(target, str) and target.startswith(allowed)):
            raise ValueError(
                f"{path}._target_ is {target!r}; allowed prefixes: {', '.join(allowed)} "
                "(an extension's package is added by 'hydra.searchpath=[pkg://its_package.conf]')"
            )
        for key, value in nodes.items():
            check_targets(value, trusted_packages, f"{path}.{key}" if path else str(key))
    elif isinstance(nodes, list):
        for i, value in enumerate(nodes):
            check_targets(value, trusted_packages, f"{path}[{i}]")


def run_dir(cfg: Config) -> Path:
    """The folder of this run: fixed by `run_name`, the same in every process and after every restart."""
    return Path(cfg.paths.runs) / cfg.run_name


def plain(node: Any) -> Any:
    """Containers of plain Python values, safe in a weights-only checkpoint."""
    if OmegaConf.is_config(node):
        return OmegaConf.to_container(node, resolve=True)
    return asdict(node)


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}; allowed: {', '.join(allowed)}")


def _positive(key: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{key} is {value}; it must be positive")
