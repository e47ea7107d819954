"""Rollouts: completions of prompts with their rewards, grouped by prompt. RL and evaluation sample through here."""
