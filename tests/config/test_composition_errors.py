"""A config that does not compose ends with one line: the key, what is wrong, and what is allowed."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.config.harness import composed
from tests.harness import Train

ROOT_KEYS = "stage, model, data, trainer, paths, callbacks, logger, run_name, seed, init_from, ckpt_path, resume"
MISTAKES = [
    ("data.sources.web=/a/b=c/d", """the value holds a =; quote it: 'data.sources.web="/a/b=c/d"'"""),
    ("run_name=a(b)", """the value holds a character that has a meaning in Hydra's grammar; quote it: """
     """'run_name="a(b)"'"""),
    ('run_name="a', """the value opens a " and does not close it; quote it: 'run_name="\\"a"'"""),
    ("data.tasks=[a,b", """the value opens a [ and does not close it; quote it: 'data.tasks="[a,b"'"""),
    ("data.tasks=a]", """the value closes a ] that was not opened; quote it: 'data.tasks="a]"'"""),
]  # fmt: skip


@pytest.mark.parametrize("override, fault", MISTAKES)
def test_a_value_that_the_grammar_does_not_take_is_named_with_its_right_spelling(override: str, fault: str) -> None:
    with pytest.raises(ValueError) as error:
        composed("stage=pretrain", override)
    assert str(error.value) == f"{override}: {fault}"


@pytest.mark.parametrize("value", ["/a=b", "a'b", 'a"b', r"C:\a=b", r"a=\"b", "a=b\\", "[a", "a)b", "${a=b"])
def test_the_spelling_that_an_error_gives_is_the_value_itself(value: str) -> None:
    with pytest.raises(ValueError, match="quote it: ") as error:
        composed(f"run_name={value}")
    (argument,) = shlex.split(str(error.value).partition("quote it: ")[2])  # as a shell hands it over
    assert OverridesParser.create().parse_override(argument).value() == value


@pytest.mark.parametrize(
    "override, line",
    [
        ("stage.total_tokens=1e5", "stage.total_tokens is 1e5; it must be an integer: write 100000"),
        ("trainer.devices=1.5", "trainer.devices is 1.5; it must be an integer"),
        ("trainer.devices=two", "trainer.devices is two; it must be an integer"),
        ("model.norm_eps=small", "model.norm_eps is small; it must be a number"),
        ("trainer.compile=maybe", "trainer.compile is maybe; it must be true or false"),
        ("run_name=null", "run_name is null; it needs a value"),
        ("run_name=a,b", "run_name=a,b has a comma: write 'run_name=[a,b]' for a list, 'run_name=\"a,b\"' for a text"),
        ("run_name", "'run_name' is no override: write key=value"),
        ("foo=1", f"foo is not a key; allowed: {ROOT_KEYS}, dry_run"),
        ("+foo=1", f"foo is not a key; allowed: {ROOT_KEYS}, dry_run"),
        ("stage.phases.warmup.lr.strat=1", "stage.phases.warmup.lr.strat is not a key; did you mean "
         "stage.phases.warmup.lr.start?"),
        ("stage.total_token=1", "stage.total_token is not a key; did you mean stage.total_tokens?"),
        ("+stage.optim.beta=1", "stage.optim.beta is not a key; did you mean stage.optim.betas?"),
        ("++stage.phases.decay.token=1", "stage.phases.decay.token is not a key; did you mean "
         "stage.phases.decay.tokens?"),
        ("data.sources.web=/x", "data.sources has no web; it has docs, code, tests, arithmetic; a new one begins with "
         "+: '+data.sources.web=...'"),
        ("stage.phases.x.tokens=1", "stage.phases has no x; it has warmup, diversity_enriched_stable, "
         "high_quality_stable, decay; a new one begins with +: '+stage.phases.x=...'"),
        ("stage=pretrian", "stage=pretrian: there is no such config; allowed: dpd, pretrain, reward_model, rl, sft"),
        ("model=nope", "model=nope: there is no such config; allowed: demo, from_hf, nanbeige4_1_3b, nanbeige4_2_3b, "
         "nanbeige4_3b"),
        ("experiment=nope", "experiment=nope: there is no such config; allowed: qlora_3b, quick"),
        ("callbacks=[pretrain,nope]", "callbacks=nope: there is no such config; allowed: base, dpd, pretrain, "
         "reward_model, rl, sft"),
    ],
)  # fmt: skip
def test_a_wrong_key_value_or_option_is_one_line(override: str, line: str) -> None:
    with pytest.raises(ValueError) as error:
        composed(override)
    assert str(error.value) == line


def test_integers_may_have_underscores_and_open_mappings_any_key() -> None:
    cfg = composed("stage.total_tokens=1_000_000", "+data.sources.mine=a", "+callbacks.mine={_target_: callbacks.x.Y}")
    assert cfg.stage.total_tokens == 1_000_000 and cfg.data.sources["mine"] == "a" and "mine" in cfg.callbacks


@pytest.mark.runs
def test_train_ends_with_the_line_and_no_traceback(train: Train) -> None:
    for override, line in [
        ("init_from=/a=b", """error: init_from=/a=b: the value holds a =; quote it: 'init_from="/a=b"'"""),
        ("stage.total_tokens=1e5", "error: stage.total_tokens is 1e5; it must be an integer: write 100000"),
    ]:
        done = train(override, check=False)
        assert done.returncode == 1 and done.stderr.strip() == line
