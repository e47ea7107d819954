"""nb_lightning: FG-WSD pretraining, SFT, DPD and GRPO on one Llama-style backbone, as a PyTorch Lightning app."""

import sys
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def _hide_mismatched_torchvision() -> None:
    """Make a torchvision wheel built for another torch invisible.

    litdata asks for torchvision although nothing here uses it. Its PyPI wheel is a CUDA build; beside a CPU build of
    torch its import raises `operator torchvision::nms does not exist` out of `import lightning`. A `None` entry in
    `sys.modules` turns that into the ImportError that torchmetrics and lightning already handle.
    """
    try:
        vision, core = version("torchvision"), version("torch")
    except PackageNotFoundError:
        return
    if vision.partition("+")[2] != core.partition("+")[2] and "torchvision" not in sys.modules:
        sys.modules["torchvision"] = None  # type: ignore[assignment]


_hide_mismatched_torchvision()
