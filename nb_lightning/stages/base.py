"""`BaseStage`, which every stage extends: one `training_step` is one optimizer step.

A batch holds all the rows this rank contributes to the step, as micro-batches. The step runs them forward and
backward, divides every sum by its *global* count (trained tokens, pairs ...), clips, and steps. So the loss is right
under any accumulation, packing or world size, and no checkpoint falls inside an accumulation.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from nb_lightning.batch import PackedBatch, StepBatch
from nb_lightning.checkpoints.pretrained import Origin
from nb_lightning.config.schema import Config, StageConfig
from nb_lightning.errors import RunStopped
from nb_lightning.model import adapters
from nb_lightning.model.attention import resolve_backend
from nb_lightning.model.layout import build_model
from nb_lightning.model.transformer import ModelShape
from nb_lightning.model.weights import load_weights
from nb_lightning.phase_callback import StageModule
from nb_lightning.phases import PhasePlan
from nb_lightning.stages.frozen import FrozenModel
from nb_lightning.stages.metrics import Means
from nb_lightning.stages.optim import build_optimizer, clip_grad_norm

StageSettings = TypeVar("StageSettings", bound=StageConfig)


class BaseStage(StageModule, Generic[StageSettings]):
    """A plan, a backbone, and the clock.

    Attributes:
        settings: `cfg.stage`, as the class of the stage's schema.
        plan: the phases, in whole steps.
        model: the backbone; set by `configure_model`.
        tokens_seen: the clock: tokens over all ranks whose step is done. Schedules read nothing else.
        origin: where the starting weights are; None for fresh ones. Set by `begin_from`.
        context: tokens per row that the starting weights were trained for.
        adapted: whether adapters train on a frozen base.
        base: the digests of the frozen base's tensors.
        skipped_steps: steps whose update was left out because the loss or gradient was not finite.
    """

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.cfg, self.plan = cfg, plan
        self.settings = cast(StageSettings, cfg.stage)  # train.build_stage chooses the class by the type of cfg.stage
        self.shape = replace(ModelShape(**asdict(cfg.model)), rope_theta=plan.phases[0].rope_theta)
        self.origin: Origin | None = None
        self.context = 0
        self.adapted = cfg.stage.adapter.name != "none"
        self.base: dict[str, str] = {}
        self.strict_loading = not self.adapted  # a checkpoint of adapters has less than the model
        self.tokens_seen = 0
        self.skipped_steps = 0
        self._skipped_in_a_row = 0

    # What a stage defines -------------------------------------------------------------------------------------------

    # Each statistic of `loss` -> the one of the batch's `counts` that it is a mean over; logged as `train/<name>`.
    per: ClassVar[Mapping[str, str]] = {}

    def loss(self, batch: Any, counts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute one micro-batch's share of the step's loss.

        Args:
            batch: a micro-batch.
            counts: the step's `batch.counts`, summed over all micro-batches and ranks, at least 1 each.

        Returns:
            The share, 0-d and already divided by the counts: the shares of all micro-batches and ranks add up to the
            loss. And the sums, 0-d, of the statistics that `per` names.
        """
        raise NotImplementedError

    def check_data(self, data: Any) -> None:
        """Raise `ValueError` unless the stage can train on this data; called before anything is built."""

    # Building -------------------------------------------------------------------------------------------------------

    def begin_from(self, origin: Origin) -> None:
        """Start from these weights instead of fresh ones.

        Raises:
            ValueError: the model has another shape; names the key.
        """
        for key, value in asdict(origin.shape).items():
            if key not in ("rope_theta", "init_std") and getattr(self.shape, key) != value:
                raise ValueError(
                    f"model.{key} is {getattr(self.shape, key)}, but init_from={self.cfg.init_from} has {value} "
                    "(model=from_hf takes the shape from there)"
                )
        self.origin, self.context = origin, origin.context or 0

    def configure_model(self) -> None:
        if hasattr(self, "model"):  # Lightning calls the hook once for each loop
            return
        trainer, (backend, device, mesh) = self.cfg.trainer, self._layout()
        adapter, seed = self.settings.adapter, self.cfg.seed
        attach = partial(adapters.attach, cfg=adapter, precision=trainer.precision) if self.adapted else None
        self.model = build_model(self.shape, trainer, backend, device, mesh, None if self.origin else seed, attach)
        if self.origin is not None:
            if self.adapted:
                self.base = adapters.load_base(self.model, self.origin.open(), seed)
            else:
                load_weights(self.model, self.origin.open())
            if self.origin.shape.rope_theta != self.shape.rope_theta:
                self.print(
                    f"RoPE base {self.shape.rope_theta:g} from the first phase on; the weights of {self.origin.path} "
                    f"were made with {self.origin.shape.rope_theta:g}"
                )

    def frozen(self, origin: Origin, nf4: bool = False) -> FrozenModel:
        """Load a frozen model beside the one that trains, laid out like it."""
        return FrozenModel(origin, self.cfg.trainer, *self._layout(), nf4)

    def _layout(self) -> tuple[str, torch.device, DeviceMesh | None]:
        """Return the attention backend, the device, and the mesh that parameters are sharded over, if they are."""
        strategy = self.trainer.strategy
        mesh = strategy.device_mesh if isinstance(strategy, ModelParallelStrategy) else None
        backend = resolve_backend(self.cfg.trainer.attention, strategy.root_device, self.cfg.data.mask_documents)
        return backend, strategy.root_device, mesh

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optim = self.settings.optim
        beta1, beta2 = optim.betas
        return build_optimizer(self.model, optim.name, (beta1, beta2), optim.eps, optim.weight_decay)

    # Training -------------------------------------------------------------------------------------------------------

    def flops_per_token(self, seq_len: int, causal: bool) -> float:
        """Return the floating-point operations per trained token, see `ModelShape.flops_per_token`."""
        return self.shape.flops_per_token(seq_len, causal, frozen=self.adapted)

    def training_step(self, batch: StepBatch, batch_idx: int) -> dict[str, Tensor]:
        metrics = self.update(batch.micro_batches)
        self.tokens_seen += batch.tokens
        self.log_dict({**metrics, "tokens_seen": self._clock()}, batch_size=1)
        return metrics

    def update(self, micro_batches: Sequence[PackedBatch]) -> dict[str, Tensor]:
        """Take one optimizer step on the micro-batches of all ranks; every rank has equally many.

        Returns:
            The metrics to log, 0-d tensors, the same on every rank.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # `configure_optimizers` returns one
        if self.model.is_stochastic:  # seeded by the clock, so that a resumed run draws the same
            torch.manual_seed(zlib.crc32(f"{self.cfg.seed} {self.tokens_seen} {self.global_rank}".encode()))
        counts = self._global_counts(micro_batches)
        totals = dict.fromkeys(("loss", *self.per), torch.zeros((), device=self.device))
        for micro in micro_batches:
            with self._synchronise(micro is micro_batches[-1]):
                loss, sums = self.loss(micro, counts)
                # DDP and FSDP2 average gradients over ranks; times the world size, the average is the sum.
                self.manual_backward(loss * self.trainer.world_size)
            totals = {name: total + {**sums, "loss": loss}[name].detach() for name, total in totals.items()}
        totals = self._sum_over_ranks(totals)
        loss = totals.pop("loss")
        grad_norm = clip_grad_norm(self.model.parameters(), self.settings.optim.clip_norm)
        if bool(torch.isfinite(loss + grad_norm)):  # the same number on every rank, so all decide alike
            optimizer.step()
            self._skipped_in_a_row = 0
        else:
            self._skip_step(float(loss), float(grad_norm))
        optimizer.zero_grad()
        metrics = {"train/loss": loss, "optim/grad_norm": grad_norm}
        metrics |= {f"train/{name}": total / counts[self.per[name]] for name, total in totals.items()}
        return metrics | {f"train/{name}": count.float() for name, count in counts.items()}

    def _global_counts(self, micro_batches: Sequence[PackedBatch]) -> dict[str, Tensor]:
        """Sum the counts of a step over all micro-batches and ranks; each is at least 1, as sums are divided by it."""
        counts_by_batch = [micro.counts for micro in micro_batches]
        totals = {name: torch.stack([counts[name] for counts in counts_by_batch]).sum() for name in counts_by_batch[0]}
        return {name: total.clamp(min=1) for name, total in self._sum_over_ranks(totals).items()}

    def _clock(self) -> Tensor:
        """Return `tokens_seen` for the loggers, 0-d float64: exact up to 9e15, float32 only up to 16.7 M."""
        return torch.tensor(self.tokens_seen, dtype=torch.float64)

    def _skip_step(self, loss: float, grad_norm: float) -> None:
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        where = f"at {self.tokens_seen} tokens (phase {self.phase.name}): loss {loss}, gradient norm {grad_norm}"
        if self._skipped_in_a_row >= self.settings.optim.max_skipped_steps:
            raise RunStopped(
                f"{self._skipped_in_a_row} optimizer steps in a row were not finite, the last one {where}. The weights "
                "are as before them. Lower the phase's lr, or look at the data of these steps; then resume=true"
            )
        self.print(f"skipped an optimizer step {where} ({self.skipped_steps} in all)")

    @contextmanager
    def _synchronise(self, is_last: bool) -> Iterator[None]:
        """Exchange gradients between ranks in the backward of the last micro-batch only."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            cast(FSDPModule, self.model).set_requires_gradient_sync(is_last)
        elif isinstance(strategy, DDPStrategy) and not is_last:
            with strategy.block_backward_sync():
                yield
            return
        yield

    def _sum_over_ranks(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.trainer.world_size == 1:
            return terms
        totals = self.trainer.strategy.reduce(torch.stack(list(terms.values())), reduce_op="sum")
        assert isinstance(totals, Tensor)
        return dict(zip(terms, totals))

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint says about the run, as plain values; `checkpoint.json` holds them too."""
        return {
            "tokens_seen": self.tokens_seen,
            "step": self.plan.step_at(self.tokens_seen),
            "phase": self.plan.phase_at(self.tokens_seen - 1).name,
            "skipped_steps": self.skipped_steps,
            "seed": self.cfg.seed,
            "model": {**asdict(self.shape), "rope_theta": self.model.rope.theta},
            "context": max([self.context, *(phase.seq_len for phase in self.plan.begun(self.tokens_seen))]),
            "plan": [asdict(phase) for phase in self.plan.phases],
            "sources": self.data.digests,
            "adapter": self._adapter(),
        }

    def _adapter(self) -> dict[str, Any] | None:
        if not self.adapted:
            return None
        assert self.origin is not None  # adapters need a base: config/checks.py
        return {
            **asdict(self.settings.adapter),
            "base": {"path": str(self.origin.path.resolve()), "tensors": self.base},
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the weights to save; of an adapter run only those that train."""
        state = super().state_dict(*args, **kwargs)
        if self.adapted:
            trained = {name for name, p in self.named_parameters() if p.requires_grad}
            for name in state.keys() - trained:
                del state[name]
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["nb_lightning"] = self.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["nb_lightning"]
        if self.adapted:
            base = saved["adapter"]["base"]
            adapters.require_same_base(base["tensors"], self.base, f"init_from={self.cfg.init_from}", base["path"])
        self.tokens_seen = saved["tokens_seen"]
        self.skipped_steps = saved["skipped_steps"]
        self.context = saved["context"]


class ValidatedByMeans(BaseStage[StageSettings]):
    """A stage that logs `val/<statistic>/<source>` over the held-out rows of each source."""

    # Each statistic of `held_out` -> the one of the batch's `counts` that it is a mean over.
    validated: ClassVar[Mapping[str, str]] = {}

    def held_out(self, batch: PackedBatch, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the sums of the statistics that `validated` names; by default those of the loss."""
        _, sums = self.loss(batch, counts)
        return sums

    def on_validation_epoch_start(self) -> None:
        names = self.data.val_names
        self._means = {name: Means(self.validated).to(self.device) for name in names}

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        counts = batch.counts
        self._means[self.data.val_names[dataloader_idx]].update(self.held_out(batch, counts), counts)

    def on_validation_epoch_end(self) -> None:
        metrics = {
            f"val/{statistic}/{source}": mean.float()
            for source, means in self._means.items()
            for statistic, mean in means.compute().items()
        }
        self.log_dict({**metrics, "tokens_seen": self._clock()}, batch_size=1)
