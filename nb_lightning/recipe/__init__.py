"""The whole recipe in one command: `python -m nb_lightning.recipe` (docs/getting_started.md)."""
