"""CPU-seconds from the start of a process to the end of its first optimizer step, and which imports they go to.

    python benchmarks/startup.py [--rounds 5] [--python PATH]

`torch`: a bare loop. `lightning`: the same in a Lightning Trainer. `train.py`: `python train.py stage=pretrain` on a
prepared corpus, with all the callbacks and loggers of conf/. All do one step of 4 rows of 256 tokens with the demo
model. --python measures another environment: one without the test extras (transformers and so on), as `./run demo` has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder: `data` is not our data.py

from benchmarks.common import MARK, ROOT, Shape, append_jsonl, environment, table

DEMO = Shape(vocab=260, layers=4, dim=128, heads=4, kv_heads=2, head_dim=32, mlp=352)  # conf/model/demo.yaml
SETTINGS = (
    "stage=pretrain trainer=cpu trainer.threads=1 trainer.progress_bar=false data.demo_corpus=false "
    "stage.global_batch_tokens=1024 stage.micro_batch_size=4 stage.phases.decay.micro_batch_size=1"
).split()
SHOWN = 12  # packages in the table


class ImportClock:
    """A finder that only watches: CPU-seconds of running each package's modules, without those they import."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner = [0.0]  # CPU-seconds of finished imports inside each one that is under way

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                for step in ("create_module", "exec_module"):
                    if hasattr(spec.loader, "__dict__") and not isinstance(spec.loader, type):
                        setattr(spec.loader, step, self._timed(name.partition(".")[0], getattr(spec.loader, step)))
                return spec
        return None

    def _timed(self, package: str, load: Any) -> Any:
        def run(argument: Any) -> Any:
            began = time.process_time()
            self._inner.append(0.0)
            try:
                return load(argument)
            finally:
                whole = time.process_time() - began
                self.seconds[package] += whole - self._inner.pop()
                self._inner[-1] += whole

        return run

    def first_step_done(self) -> None:
        """Report and leave."""
        total = time.process_time()
        print(f"\n{MARK}{json.dumps({'total': total, 'imports': self._inner[0], **self.seconds})}", flush=True)
        os._exit(0)


def child_torch(clock: ImportClock) -> None:
    import torch

    from benchmarks.plain import Llama, adamw, update

    model = Llama(DEMO, 256)
    optimizer = adamw(model)
    rows = torch.randint(0, DEMO.vocab, (4, 257))
    model(rows[:, :-1], rows[:, 1:]).backward()
    update(model, optimizer)
    clock.first_step_done()


def child_lightning(clock: ImportClock) -> None:
    import lightning.pytorch as pl
    import torch

    from benchmarks.plain import Llama, adamw

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Llama(DEMO, 256)

        def training_step(self, rows: torch.Tensor, index: int) -> torch.Tensor:
            return self.model(rows[:, :-1], rows[:, 1:])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.model)

        def on_train_batch_end(self, *args: Any) -> None:
            clock.first_step_done()

    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randint(0, DEMO.vocab, (4, 257)), batch_size=4))


def child_train(clock: ImportClock) -> None:
    """train.py itself, stopped at the end of its first step."""
    import runpy

    stage = "nb_lightning.stages.base"
    find = clock.find_spec

    def find_spec(name: str, path: Any, target: Any = None) -> Any:
        spec = find(name, path, target)
        if name == stage:  # once it is loaded, its training step is the last thing that happens
            load = spec.loader.exec_module

            def run(module: Any) -> None:
                load(module)
                step = module.BaseStage.training_step
                module.BaseStage.training_step = lambda *args: (step(*args), clock.first_step_done())

            spec.loader.exec_module = run
        return spec

    clock.find_spec = find_spec  # type: ignore[method-assign]
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "benchmarks"))]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


CHILDREN = {"torch": child_torch, "lightning": child_lightning, "train.py": child_train}


def measure(python: str, kind: str, folder: Path, words: list[str]) -> dict[str, float]:
    command = [python, __file__, "--child", kind, *words]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise RuntimeError(f"{kind} ended:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--out", help="append one JSON line a start to this file")
    a = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = f"from benchmarks.corpus import *; write_corpus(Path({name!r}), 50_000, {DEMO.vocab})"
        subprocess.run([sys.executable, "-c", make], env=environment(), check=True)
        for number in range(a.rounds + 1):  # the first round only warms the disk cache
            for kind in CHILDREN:
                words = [*SETTINGS, f"paths.root={name}", f"run_name=run-{number}"] if kind == "train.py" else []
                found = measure(a.python, kind, folder, words)
                if number:
                    records.append({"kind": kind, "round": number, **found})
    append_jsonl(a.out, records)
    print(f"\nCPU-seconds to the end of the first step, medians of {a.rounds}\n")
    print(table(["", *CHILDREN], rows(records)))


def rows(records: list[dict]) -> list[list]:
    def median(kind: str, key: str) -> float | None:
        values = [r.get(key, 0.0) for r in records if r["kind"] == kind]
        return statistics.median(values) or None

    packages = {key for r in records for key in r} - {"kind", "round", "total", "imports"}
    order = sorted(packages, key=lambda key: -(median("train.py", key) or 0))
    shown = [[f"import {key}", *(median(kind, key) for kind in CHILDREN)] for key in order[:SHOWN]]
    total, imports = ([median(kind, key) for kind in CHILDREN] for key in ("total", "imports"))
    rest = [
        i - sum(median(kind, key) or 0 for key in order[:SHOWN]) for kind, i in zip(CHILDREN, imports) if i is not None
    ]
    return [["**total**", *total], ["all imports", *imports], *shown, ["other imports", *rest],
            ["everything else", *(t - i for t, i in zip(total, imports))]]  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _, _, chosen, *sys.argv[1:] = sys.argv
        if chosen == "train.py":
            sys.argv[0] = str(ROOT / "train.py")
        watch = ImportClock()
        sys.meta_path.insert(0, watch)  # type: ignore[arg-type]
        CHILDREN[chosen](watch)
    else:
        main()
