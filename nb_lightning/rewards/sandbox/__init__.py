"""Where model-written code runs: a pool of workers, each a locked-down interpreter (jail/)."""

from nb_lightning.rewards.sandbox.pool import Limits, Outcome, Sandbox, SandboxError, Setup, shared

__all__ = ["Limits", "Outcome", "Sandbox", "SandboxError", "Setup", "shared"]
