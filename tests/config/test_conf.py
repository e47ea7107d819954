"""Every shipped YAML composes, every `_target_` resolves and is trusted, and every mistake has one clear error."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import OmegaConf

from nb_lightning.config.checks import check, check_targets
from nb_lightning.config.compose import STAGES, register
from tests.config.harness import CONF, composed
from tests.harness import Train


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


NAMED = [model for model in options("model") if model != "from_hf"]  # which takes its shape from a file


@pytest.mark.parametrize("model, trainer", list(itertools.product(NAMED, ["auto", *options("trainer")])))
def test_every_model_and_trainer_composes_and_passes(model: str, trainer: str) -> None:
    check(composed(f"model={model}", f"trainer={trainer}", *(["trainer.devices=1"] if model == "demo" else [])))


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_composes_is_short_and_passes(experiment: str) -> None:
    cfg = composed(f"experiment={experiment}")
    check(cfg)
    assert cfg.run_name != composed().run_name  # it has the last word, the primary config's own keys included
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert len([line for line in lines if line.strip() and not line.lstrip().startswith("#")]) <= 20


def test_an_rl_run_is_composed_of_six_files() -> None:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        defaults = loader.compute_defaults_list("train", ["stage=rl"], RunMode.RUN).defaults
    paths = [f"{default.config_path}.yaml" for default in defaults]
    files = [path for path in paths if (CONF / path).is_file()]
    assert sorted(files) == [
        "callbacks/base.yaml",
        "callbacks/rl.yaml",
        "logger/default.yaml",
        "model/demo.yaml",
        "plan/rl/demo.yaml",
        "train.yaml",
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_names_each_callback_of_the_base_or_leaves_it_at_the_end(stage: str) -> None:
    callbacks = composed(f"stage={stage}").callbacks
    assert all("_target_" in callback for callback in callbacks.values())
    assert list(callbacks)[-3:] == ["plots", "run_manifest", "phase_checkpoint"]


def test_every_yaml_is_reached_by_a_group() -> None:
    groups = {"model", "plan", "callbacks", "trainer", "logger", "experiment"}
    groups |= {"ablation", "recipe", "refine"}  # of commands, whose tests read them
    for path in CONF.rglob("*.yaml"):
        assert path.name == "train.yaml" or path.relative_to(CONF).parts[0] in groups


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_target_resolves_inside_the_trusted_places(path: Path) -> None:
    node = OmegaConf.to_container(OmegaConf.load(path))
    targets = [value for key, value in _items(node) if key == "_target_"]
    for target in targets:
        get_class(target)
    if targets:
        assert path.parent.name in ("callbacks", "logger"), "only the open sets name targets"
        check_targets(node)


def _items(node: object) -> list[tuple[str, object]]:
    if isinstance(node, dict):
        return [pair for key, value in node.items() for pair in [(key, value), *_items(value)]]
    return [pair for value in node for pair in _items(value)] if isinstance(node, list) else []


@pytest.mark.parametrize(
    "override, message",
    [
        ("stage.phases.warmup.mixture.docs=0.5", "stage.phases.warmup.mixture sums to 1.2, not 1"),
        (
            "+stage.phases.decay.mixture.webb=0.5",
            "stage.phases.decay.mixture names 'webb'; known sources (data.sources) are: docs, code, tests, arithmetic",
        ),
        ("stage.phases.decay.lr.shape=wsd", "stage.phases.decay.lr.shape is 'wsd'; allowed: linear, cosine"),
        ("stage.global_batch_tokens=8000", "stage.phases.warmup.global_batch_tokens 8000 is not a multiple of 2048"),
        ("trainer.accelerator=tpu", "trainer.accelerator is 'tpu'; allowed: auto, cpu, cuda"),
        ("trainer.precision=fp16", "trainer.precision is 'fp16'; allowed: 32-true, bf16-mixed, bf16-true"),
        ("trainer.devices=2", "trainer.strategy=single runs one process, but devices x num_nodes is 2"),
        ("stage.optim.name=lion", "stage.optim.name is 'lion'; allowed: adamw, adamw8bit, paged_adamw8bit"),
        ("model.n_kv_heads=3", "model.n_heads 4 is not a multiple of n_kv_heads 3"),
        ("model.n_layers=0", "model.n_layers is 0; it must be positive"),
        ("data.workers=-1", "data.workers is -1; it must not be negative"),
        ("run_name=../x", "run_name is '../x'; it names a folder below paths.runs"),
        (["init_from=a", "ckpt_path=b"], "ckpt_path and init_from are both set"),
        (
            ["trainer=fsdp", "stage.optim.name=adamw8bit", "stage.micro_batch_size=1"],
            "stage.optim.name=adamw8bit does not work with trainer.strategy=fsdp",
        ),
        ("data.tokenizer=???", "data.tokenizer: Missing mandatory value"),
        (
            "+callbacks.evil={_target_: shutil.copy, src: a, dst: b}",
            "callbacks.evil._target_ is 'shutil.copy'; allowed prefixes: callbacks., nb_lightning.",
        ),
        (
            "+callbacks.nested={_target_: callbacks.x.Y, inner: [{_target_: os.system}]}",
            "callbacks.nested.inner[0]._target_",
        ),
    ],
)
def test_a_value_that_cannot_work_is_named_with_what_is_allowed(override: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
        check(composed(*([override] if isinstance(override, str) else override)))
    assert "\n" not in str(caught.value)


def test_an_extension_is_trusted_only_when_the_user_names_its_package(train: Train) -> None:
    done = train("+callbacks.trace={_target_: nb_trace.StepTrace}", check=False)
    assert done.returncode == 1 and "callbacks.trace._target_ is 'nb_trace.StepTrace'" in done.stderr


@pytest.mark.parametrize("model", ["nanbeige4_1_3b", "nanbeige4_2_3b"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_the_family_composes_and_passes(stage: str, model: str) -> None:
    cfg = composed(f"stage={stage}", f"model={model}", "trainer=fsdp", "dry_run=true")
    check(cfg)
    assert cfg.model.rope_theta == 7e7 and {phase.rope_theta for phase in cfg.stage.phases.values()} <= {1e4, 7e7}
