"""The sampler: training keeps tokens, measurements share the prompts of all ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nb_lightning.generation.decoder import generate
from nb_lightning.generation.sampling import Sampling
from nb_lightning.rewards.registry import get_verifiers
from nb_lightning.rollouts import sampler as module
from nb_lightning.rollouts.attempts import Attempts
from nb_lightning.rollouts.sampler import RolloutSampler
from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.text.chat_tokens import ChatTokenizer
from tests.evaluate.harness import COIN, END, TOKENIZER, chain, pretrained_of, tasks_of

TASKS = tasks_of(["42", "77", "42", "x", "42"])


@pytest.fixture(scope="module")
def sampler() -> RolloutSampler:
    return RolloutSampler(pretrained_of(chain(COIN)), get_verifiers(TASKS), Sampling(5), k=3)


def test_training_gets_the_tokens_that_the_decoder_drew_from_the_seeds(sampler: RolloutSampler) -> None:
    prompts = sampler.encode(TASKS, seed=7)
    attempts, scoring_seconds = sampler.sample(prompts)
    assert scoring_seconds >= 0
    stopping = Sampling(5, stop_ids=(TOKENIZER.eos_id, END))
    for prompt, found in zip(prompts, attempts, strict=True):
        seeds = [[*prompt.seed, j] for j in range(3)]
        drawn = generate(sampler.pretrained.model, [prompt.ids] * 3, stopping, seeds)
        assert [completion.ids for completion in found.completions] == [completion.ids for completion in drawn]
        assert found.n_tokens == [len(completion.ids) for completion in drawn]
        assert [score.reward for score in found.scores] == [text == prompt.task.reference for text in found.texts]


def test_a_measurement_draws_the_same_and_drops_the_tokens(sampler: RolloutSampler) -> None:
    prompts = sampler.encode(TASKS, seed=7)
    kept, _ = sampler.sample(prompts)
    assert [replace(attempts, completions=[]) for attempts in kept] == sampler.sample_over_ranks(prompts)


def test_each_rank_samples_its_share_and_all_get_all_in_order(
    sampler: RolloutSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = sampler.encode(TASKS, seed=7)
    alone = sampler.sample_over_ranks(prompts)
    by_rank: list[list[Attempts]] = []

    def note(share: list[Attempts]) -> list[list[Attempts]]:
        by_rank.append(share)
        return [alone, alone]  # anything: the other rank's share is not known yet

    monkeypatch.setattr(module, "gather_shares", note)
    for rank in range(2):
        monkeypatch.setattr(module, "rank_and_world_size", lambda rank=rank: (rank, 2))
        sampler.sample_over_ranks(prompts)
    assert [[attempts.task.id for attempts in share] for share in by_rank] == [["t0", "t2", "t4"], ["t1", "t3"]]
    monkeypatch.setattr(module, "gather_shares", lambda share: by_rank)
    assert sampler.sample_over_ranks(prompts) == alone


def test_more_completions_begin_with_the_same_ones(sampler: RolloutSampler) -> None:
    prompts = sampler.encode(TASKS, seed=7)
    fewer, more = sampler.sample_over_ranks(prompts), replace(sampler, k=5).sample_over_ranks(prompts)
    assert [attempts.texts for attempts in fewer] == [attempts.texts[:3] for attempts in more]


def test_no_prompts_are_no_attempts(sampler: RolloutSampler) -> None:
    assert sampler.sample([])[0] == []


OPENING = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"


def test_a_text_begins_with_the_thought_that_the_prompt_opened(sampler: RolloutSampler) -> None:
    """So a completion that is cut off inside it has no answer, whatever it guessed there."""
    opening = replace(sampler, pretrained=replace(sampler.pretrained, chat=ChatTemplate(OPENING)))
    (attempts,) = opening.sample_over_ranks(opening.encode(TASKS[:1], seed=0))
    assert all(text.startswith("<think>\n") for text in attempts.texts)
    assert [score.info["status"] for score in attempts.scores] == ["no_answer"] * 3


def test_a_question_that_spells_a_special_token_is_text(sampler: RolloutSampler) -> None:
    task = replace(TASKS[0], messages=[{"role": "user", "content": "What does <|im_end|> do?"}])
    (prompt,) = sampler.encode([task], seed=0)
    chat = ChatTokenizer(TOKENIZER, ChatTemplate.chatml())
    assert prompt.ids == chat.prompt(task.messages) and list(prompt.ids).count(END) == 1
