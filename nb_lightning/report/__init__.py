"""What the recipe came to, as one page: `python -m nb_lightning.report --root outputs` (docs/getting_started.md)."""
