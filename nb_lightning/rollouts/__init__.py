"""Rollouts: completions of prompts with their rewards. RL, evaluation and the pair maker sample through here."""
