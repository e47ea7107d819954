"""nb_lightning: FG-WSD pretraining, SFT, DPD and GRPO on one Llama-style backbone, as a PyTorch Lightning app."""

import sys
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def _hide_mismatched_torchvision() -> None:
    """Hide a torchvision wheel that was built for another torch.

    litdata depends on torchvision, which nothing here uses. Its PyPI wheel is a CUDA build: with a CPU build of torch,
    `import lightning` raises `operator torchvision::nms does not exist`. A `None` entry in `sys.modules` makes that the
    ImportError that torchmetrics and lightning handle.
    """
    try:
        torchvision_version, torch_version = version("torchvision"), version("torch")
    except PackageNotFoundError:
        return
    is_mismatched = torchvision_version.partition("+")[2] != torch_version.partition("+")[2]  # cpu, cu128 ...
    if is_mismatched and "torchvision" not in sys.modules:
        sys.modules["torchvision"] = None  # type: ignore[assignment]


_hide_mismatched_torchvision()
