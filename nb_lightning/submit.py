"""Run `train.py` as a Lightning job: `python -m nb_lightning.submit --machine H100_X_8 stage=pretrain key=value`.

The config is composed and checked here first, so that a typo costs no machine. `--dry-run` prints what would be sent;
it needs neither lightning_sdk nor credentials. docs/scaling_out.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from nb_lightning.checkout import CHECKOUT, check_as_train, composed
from nb_lightning.config.schema import Config
from nb_lightning.errors import one_line_errors

STUDIO_HOME = Path("/teamspace")  # what lies below has the same path on a job's machine
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
HIDDEN = "(hidden)"


def main(arguments: Sequence[str] | None = None) -> None:
    a = parser().parse_args(arguments)
    with one_line_errors():
        run(a)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m nb_lightning.submit",
        description=__doc__.partition("\n")[0],
        epilog="Everything else goes to train.py: stage=pretrain model=nanbeige4_3b trainer=fsdp ...",
    )
    add = p.add_argument
    add("overrides", nargs="+", metavar="key=value", help="what follows `python train.py`")
    add("--machine", required=True, help="a name of lightning_sdk.Machine: CPU, L4, H100, H100_X_8 ...")
    add("--machines", type=int, default=1, help="how many of them (default 1)")
    add("--studio", help="run in a copy of this Studio's environment and files; inside a Studio it is the default")
    add("--image", help="run in this container image instead; it holds the checkout and what it needs")
    add("--image-credentials", metavar="SECRET", help="name of the teamspace's secret that opens a private image")
    add("--path-mapping", action="append", default=[], metavar="PATH=CONNECTION[:PATH]",
        help="of an image: where a data connection is mounted; nothing else outlives the job")  # fmt: skip
    add("--teamspace", metavar="OWNER/NAME", help="by default the current one")
    add("--name", help="of the job; by default run_name and the time")
    add("--env", action="append", default=[], metavar="KEY[=VALUE]",
        help="an environment variable of the job; without a value it is taken from here")  # fmt: skip
    add("--interruptible", action="store_true", help="cheaper machines, which can be taken away")
    add(
        "--attempts",
        type=int,
        default=1,
        help="start again, and resume, until it has been started so often (default 1)",
    )
    add("--checkout", metavar="PATH", help="the checkout on the job's machine; by default this one where it is in a "
        "Studio, else where the job starts")  # fmt: skip
    add("--python", default="python", help="the interpreter on the job's machine (default python)")
    add("--dry-run", action="store_true", help="print what would be submitted, and stop")
    return p


def run(a: argparse.Namespace) -> None:
    """Check the config and submit, or only print.

    Raises:
        ValueError: a mistake in the config or the arguments, or lightning_sdk is not there to submit with.
    """
    for name in ("machines", "attempts"):
        if getattr(a, name) < 1:
            raise ValueError(f"--{name} is {getattr(a, name)}; it must be positive")
    if a.image and a.studio:
        raise ValueError("--image and --studio both say what the job runs in; choose one")
    env = environment(a.env)
    if "NB_ROOT" in os.environ:  # the config reads it: what is checked here is what runs there
        env.setdefault("NB_ROOT", os.environ["NB_ROOT"])
    os.environ.update(env)
    overrides = completed(a)
    cfg = checked(a, overrides)
    sdk = load_sdk(a.machine)
    if sdk is None and not a.dry_run:
        raise ValueError("submitting needs lightning_sdk: pip install 'nb_lightning[studio]' (--dry-run does without)")
    job = {
        "name": a.name or f"{cfg.run_name}-{datetime.now():%m%d-%H%M%S}",
        "machine": getattr(sdk.Machine, a.machine) if sdk else a.machine,
        "num_machines": a.machines,
        "command": command(a, cfg, overrides),
        "studio": a.studio,
        "image": a.image,
        "image_credentials": a.image_credentials,
        "path_mappings": dict(pair(item, "--path-mapping") for item in a.path_mapping) or None,
        "teamspace": a.teamspace,
        "env": env or None,
        "interruptible": a.interruptible,
        "max_run_attempts": a.attempts,
    }
    print("would submit" if a.dry_run else "submitting", "with lightning_sdk.Job.run:")
    for key, value in job.items():
        if value not in (None, False):
            print(f"  {key:<17} {shown(a.env, env) if key == 'env' else value}")
    if sdk is None:
        print("not checked: the name of the machine (lightning_sdk is not installed here)")
    if a.dry_run:
        return
    try:
        submitted = sdk.Job.run(**job)
    except Exception as error:  # the SDK, its HTTP client and the network have a class each
        raise ValueError(f"lightning_sdk could not submit the job: {error}") from error
    print(f"submitted {submitted.name}: {submitted.link}")


def environment(items: Sequence[str]) -> dict[str, str]:
    """The job's environment variables."""
    env = {}
    for item in items:
        if "=" not in item and item not in os.environ:
            raise ValueError(f"--env {item} has no value, and {item} is not set here")
        key, value = pair(item, "--env") if "=" in item else (item, os.environ[item])
        env[key] = value
    return env


def shown(items: Sequence[str], env: dict[str, str]) -> str:
    """The variables, but no value that was taken from here or has the name of a secret."""
    hidden = [key for key in env if key in items or SECRET.search(key)]
    return " ".join(f"{key}={HIDDEN if key in hidden else shlex.quote(value)}" for key, value in env.items())


def pair(item: str, option: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not (key and equals):
        raise ValueError(f"{option} {item}: it must be {'KEY=VALUE' if option == '--env' else 'PATH=CONNECTION'}")
    return key, value


def gpus(machine: str) -> int:
    """GPUs of a machine, by its name: H100 has 1, H100_X_8 has 8, CPU and DATA_PREP have none."""
    if machine.startswith(("CPU", "DATA_PREP")):
        return 0
    count = re.search(r"_X_(\d+)$", machine)
    return int(count.group(1)) if count else 1


def completed(a: argparse.Namespace) -> list[str]:
    """The overrides, after those that follow from the machines; the same job again resumes."""
    devices = [f"trainer.devices={gpus(a.machine)}"] if gpus(a.machine) else []
    return ["resume=true", *devices, f"trainer.num_nodes={a.machines}", *a.overrides]


def checked(a: argparse.Namespace, overrides: list[str]) -> Config:
    """The config of the job, composed here.

    Raises:
        ValueError: as `config_checks.check`; or it does not fit the machines.
    """
    cfg = composed(overrides)
    has, t = gpus(a.machine), cfg.trainer
    if t.num_nodes != a.machines:
        raise ValueError(f"trainer.num_nodes is {t.num_nodes}, but --machines is {a.machines}; leave it out")
    if has and t.devices > has:
        raise ValueError(f"trainer.devices is {t.devices}, but a machine {a.machine} has {has} GPU(s)")
    if t.accelerator == ("cpu" if has else "cuda"):
        raise ValueError(f"trainer.accelerator={t.accelerator} does not go with --machine {a.machine}")
    if (a.machines > 1 or a.attempts > 1) and not Path(cfg.paths.root).is_absolute():
        raise ValueError(
            f"paths.root is {cfg.paths.root!r}, a folder of one machine and one attempt; with --machines or --attempts "
            "it must be an absolute path that all of them see (paths.root=..., or --env NB_ROOT=...)"
        )
    check_as_train(cfg, overrides)
    return cfg


def load_sdk(machine: str) -> Any:
    """The module lightning_sdk, or None where it is not installed.

    Raises:
        ValueError: it has no such machine (its own `Machine.from_str` would make one up).
    """
    try:
        import lightning_sdk
    except ModuleNotFoundError as error:
        if error.name != "lightning_sdk":
            raise
        return None
    known = [name for name, value in vars(lightning_sdk.Machine).items() if isinstance(value, lightning_sdk.Machine)]
    if machine not in known:
        raise ValueError(f"--machine is {machine!r}; lightning_sdk has {', '.join(sorted(known))}")
    return lightning_sdk


def command(a: argparse.Namespace, cfg: Config, overrides: list[str]) -> str:
    """The shell command of every machine: it becomes the program itself, so that SIGTERM reaches it."""
    checkout = a.checkout or (str(CHECKOUT) if CHECKOUT.is_relative_to(STUDIO_HOME) else None)
    launcher = ""
    if a.machines > 1:  # the variables are those that Lightning sets on each machine of a job
        launcher = (
            f"-m torch.distributed.run --nnodes={a.machines} --nproc-per-node={cfg.trainer.devices} "
            '--node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --shutdown-timeout=600 '
        )
    go = f"cd {shlex.quote(checkout)} && " if checkout else ""
    return f"{go}exec {shlex.quote(a.python)} {launcher}train.py {shlex.join(overrides)}"


if __name__ == "__main__":
    main()
