"""The schema of every YAML under conf/, as dataclasses

Values live in the YAML files; a field without a default must be given there. Hydra refuses unknown keys and wrong
types against these classes, `checks.check` refuses values that cannot work together. Nothing here imports torch,
so that a wrong key fails before anything heavy is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import II, MISSING

from nb_lightning.config.bounds import (
    BETWEEN_0_AND_1,
    FINITE_NOT_NEGATIVE,
    FROM_0_BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_NUMBER,
    bounded,
    one_of,
)

# As in nb_lightning/losses/, which imports torch.
DPO_VARIANTS = ("sigmoid", "hinge", "ipo")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
NORMALISATIONS = ("token", "sequence", "constant")
REWARD_LOSSES = ("bradley_terry", "cross_entropy")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a layer


@dataclass
class LearningRateConfig:
    """Learning rate over a phase: constant `start`, or `start` to `end` along `shape`."""

    start: float = MISSING
    end: float | None = None
    shape: str = "linear"  # linear | cosine | one_minus_sqrt | exponential


@dataclass
class AnyPhaseConfig:
    """What every phase has. `null` takes the value of the stage; without a `rope_theta` the model's holds."""

    lr: LearningRateConfig = field(default_factory=LearningRateConfig)
    mixture: dict[str, float] = MISSING  # source -> probability; sums to 1
    seq_len: int = MISSING  # tokens per row
    rope_theta: float = II("model.rope_theta")  # RoPE base frequency
    micro_batch_size: int | None = None


@dataclass
class PhaseConfig(AnyPhaseConfig):
    """A phase of a stage that trains on tokens of its sources."""

    tokens: int = MISSING  # over all ranks; what counts is the proportion when stage.total_tokens is set
    global_batch_tokens: int | None = None


@dataclass
class RLPhaseConfig(AnyPhaseConfig):
    """A phase of RL. On the clock a step counts as many tokens as it can hold: prompts x group_size x seq_len."""

    steps: int = bounded(MISSING, POSITIVE)  # rollouts
    prompts: int = bounded(MISSING, POSITIVE)  # of a step, over all ranks


@dataclass
class OptimConfig:
    name: str = bounded("adamw", one_of("adamw", "adamw8bit", "paged_adamw8bit"))
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = bounded(1.0, POSITIVE)  # largest norm of all gradients together
    max_skipped_steps: int = 10  # consecutive steps with a NaN or infinite loss or gradient before the run stops


@dataclass
class AdapterConfig:
    """Low-rank adapters on the frozen weights of `init_from`: W becomes W + alpha / rank * B @ A."""

    name: str = bounded("none", one_of("none", "lora", "qlora"))  # qlora: the base's layers in 4 bits (NF4)
    rank: int = bounded(16, POSITIVE)
    alpha: float = bounded(32.0, POSITIVE)
    dropout: float = bounded(0.0, FROM_0_BELOW_1)  # of the adapters' inputs
    targets: list[str] = field(default_factory=lambda: list(LINEARS))  # the layers' linears that get one
    also_train: list[str] = field(default_factory=list)  # embedding, head: trained whole, say for new tokens
    double_quant: bool = True  # qlora: the scales of the 4-bit blocks in 8 bits
    compute_dtype: str = bounded("auto", one_of("auto", "float32", "bfloat16"))  # qlora: of products with 4-bit weights


@dataclass
class StageConfig:
    """What every stage has."""

    name: str = MISSING
    total_tokens: int | None = bounded(None, POSITIVE)  # scales the whole plan in proportion; null keeps it as written
    micro_batch_size: int = MISSING  # rows per rank per forward
    optim: OptimConfig = field(default_factory=OptimConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    head_chunk: int = bounded(512, POSITIVE)  # tokens of logits held at a time


@dataclass
class TokensConfig(StageConfig):
    """A stage that trains on tokens of its sources."""

    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    global_batch_tokens: int = MISSING  # tokens per optimizer step over all ranks


@dataclass
class PretrainConfig(TokensConfig):
    """FG-WSD pretraining. The paper leaves the optimizer open; its numbers are ours (docs/recipe.md)."""

    name: str = bounded("pretrain", one_of("pretrain"))


@dataclass
class SFTConfig(TokensConfig):
    """Supervised fine-tuning on conversations: a cold start, then all of them."""

    name: str = bounded("sft", one_of("sft"))


@dataclass
class DPDConfig(TokensConfig):
    """Dual-level preference distillation; `nb_lightning.losses.dpd.dpd_loss` says what the numbers do.

    The paper gives the loss and leaves its numbers open; these are ours (docs/recipe.md).
    """

    name: str = bounded("dpd", one_of("dpd"))
    teacher: str | None = None  # frozen, same tokenizer: a run, a checkpoint, a Hugging Face folder or a .gguf file
    teacher_nf4: bool = False  # its layers' linears in 4 bits (NF4)
    beta: float = bounded(0.1, POSITIVE)
    variant: str = bounded("sigmoid", one_of(*DPO_VARIANTS))
    label_smoothing: float = 0.0  # of sigmoid: the share of pairs thought to be the wrong way round
    dpo_weight: float = bounded(1.0, FINITE_NOT_NEGATIVE)
    lambda_plus: float = bounded(1.0, FINITE_NOT_NEGATIVE)  # weight of the divergence from the teacher on chosen tokens
    lambda_minus: float = bounded(1.0, FINITE_NOT_NEGATIVE)  # and on rejected ones
    divergence: str = bounded("forward_kl", one_of(*DIVERGENCES))
    jsd_beta: float = bounded(0.5, BETWEEN_0_AND_1)  # of jsd: the teacher's share in the mixture
    temperature: float = bounded(1.0, POSITIVE_NUMBER)  # divides both logits in the divergence


@dataclass
class RLConfig(StageConfig):
    """On-policy GRPO; `nb_lightning.losses.grpo.grpo_loss` says what the numbers do.

    From the paper: on-policy, no KL, truncated completions masked. The rest is ours (docs/recipe.md).
    """

    name: str = bounded("rl", one_of("rl"))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.0))
    phases: dict[str, RLPhaseConfig] = field(default_factory=dict)
    group_size: int = bounded(8, POSITIVE)  # completions of each prompt; at least 2
    max_new_tokens: int = bounded(MISSING, POSITIVE)  # of a completion; one that has not ended by then is truncated
    max_batch: int = bounded(64, POSITIVE)  # completions that are sampled at the same time
    clip_low: float = bounded(0.2, FINITE_NOT_NEGATIVE)  # the importance ratio is clipped to 1 - clip_low ...
    clip_high: float = bounded(0.2, FINITE_NOT_NEGATIVE)  # ... and 1 + clip_high
    normalisation: str = bounded("token", one_of(*NORMALISATIONS))  # DAPO, GRPO, Dr.GRPO
    scale_advantages: bool = True  # by the standard deviation of the group's rewards; Dr.GRPO does not
    mask_truncated: bool = True  # truncated completions are not trained; their rewards count in the group
    updates_per_rollout: int = bounded(1, POSITIVE)  # optimizer steps on the same completions, with importance ratios
    extra_rounds: int = bounded(
        0, FINITE_NOT_NEGATIVE
    )  # of new prompts for groups without signal, as often as needed up to this
    kl_weight: float = bounded(0.0, FINITE_NOT_NEGATIVE)  # of KL(policy || the weights at init_from)
    reward_model: str | None = None  # judge of tasks with the verifier "preference": a run of stage=reward_model


@dataclass
class RewardModelConfig(TokensConfig):
    """A model that says which of two responses is better.

    The paper says that there is one and that it answers in a few tokens; the rest is ours (docs/recipe.md).
    """

    name: str = bounded("reward_model", one_of("reward_model"))
    # Which loss; see `nb_lightning.losses.pairwise.pairwise_reward_loss`.
    loss: str = bounded("bradley_terry", one_of(*REWARD_LOSSES))


@dataclass
class ModelConfig:
    """The backbone's shape; see `nb_lightning.model.transformer.ModelShape` for the letters."""

    vocab_size: int = bounded(MISSING, POSITIVE)
    d_model: int = bounded(MISSING, POSITIVE)
    n_layers: int = bounded(MISSING, POSITIVE)
    n_heads: int = bounded(MISSING, POSITIVE)
    n_kv_heads: int = bounded(MISSING, POSITIVE)
    head_dim: int = bounded(MISSING, POSITIVE)
    d_mlp: int = bounded(MISSING, POSITIVE)
    norm_eps: float = 1e-5
    rope_theta: float = bounded(10_000.0, POSITIVE)  # of phases that do not give their own
    tie_embeddings: bool = False
    init_std: float = 0.02
    n_loops: int = bounded(1, POSITIVE)  # passes through the stack of layers, with the same weights (Nanbeige4.2: 2)
    norm_every_loop: bool = True  # the final norm follows every pass, not the last one only


@dataclass
class DataConfig:
    """Tokenized sources. A source is a folder (or s3:// prefix) with `train/` and `val/`, made by data.prepare."""

    sources: dict[str, str] = field(default_factory=dict)  # name -> folder
    tokenizer: str = MISSING  # "bytes", a tokenizer.json, or a folder that holds one
    mask_documents: bool = True  # attention and positions restart at each document inside a row
    verify: bool = True  # check each chunk's hash when it is first opened
    workers: int = bounded(0, NOT_NEGATIVE)  # loader processes per rank
    val_rows: int = bounded(64, POSITIVE)  # held-out rows per source and validation
    demo_corpus: bool = False  # build the embedded demo corpus where it is missing


@dataclass
class ChatDataConfig(DataConfig):
    """Sources that a chat template wrote."""

    template: str | None = None  # file of the chat template they were made with; null: the tokenizer's own, else ChatML
    # Variables of the template in prompts (RL's, and those of TaskAccuracy), such as enable_thinking: false.
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)  # .jsonl files of held-out tasks that TaskAccuracy measures
    task_limit: int | None = None  # only the first so many tasks of each file
    task_tokens: int = 1024  # longest answer, in tokens


@dataclass
class SFTDataConfig(ChatDataConfig):
    """Sources of conversations, made by data.prepare --chat."""

    over_long: str = "drop"  # drop | truncate | split: what becomes of samples that a row cannot hold
    demo_tasks: bool = False  # build the embedded demo tasks' sources where they are missing


@dataclass
class PreferenceDataConfig(ChatDataConfig):
    """Sources of pairs, made by data.prepare --pairs. Pairs that a row cannot hold are left out."""

    cached_teacher: bool = False  # the teacher's most likely tokens are beside the samples (data.teacher_logprobs)


@dataclass
class PromptDataConfig(ChatDataConfig):
    """Sources of prompts: .jsonl files of tasks (`nb_lightning.rewards.tasks.Task`)."""

    demo_tasks: bool = False  # build the embedded demo tasks where they are missing


@dataclass
class TrainerConfig:
    accelerator: str = bounded("auto", one_of("auto", "cpu", "cuda"))
    strategy: str = bounded("single", one_of("single", "ddp", "fsdp"))
    devices: int = bounded(1, POSITIVE)  # per node
    num_nodes: int = bounded(1, POSITIVE)
    precision: str = bounded("32-true", one_of("32-true", "bf16-mixed", "bf16-true"))
    attention: str = bounded("auto", one_of("auto", "sdpa", "flex", "xformers"))
    compile: bool = False  # torch.compile each layer
    activation_checkpointing: bool = False
    threads: int | None = None  # torch threads per process; null leaves torch's default
    log_every_n_steps: int = bounded(10, POSITIVE)
    val_every_n_steps: int = bounded(200, POSITIVE)
    save_every_n_steps: int = bounded(200, POSITIVE)
    keep_last: int = bounded(2, POSITIVE)  # newest checkpoints kept besides those at phase boundaries
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
