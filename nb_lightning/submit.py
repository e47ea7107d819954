"""Submit a Lightning job: `python -m nb_lightning.submit --machine H100_X_8 stage=pretrain key=value`.

The job runs `train.py` with these overrides. Their config is composed and checked here first, so that a typo costs no
machine. `--dry-run` only prints the job; it needs neither lightning_sdk nor credentials. docs/scaling_out.md.
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

STUDIO_HOME = Path("/teamspace")  # paths below it are the same on the job's machines
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
HIDDEN = "(hidden)"


def main(arguments: Sequence[str] | None = None) -> None:
    a = parser().parse_args(arguments)
    with one_line_errors():
        run(a)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m nb_lightning.submit",
        description="Run train.py as a Lightning job.",
        epilog="Everything else goes to train.py: stage=pretrain model=nanbeige4_3b trainer=fsdp ...",
    )
    add = p.add_argument
    add("overrides", nargs="+", metavar="key=value", help="the arguments of train.py")
    add("--machine", required=True, help="a name of lightning_sdk.Machine: CPU, L4, H100, H100_X_8 ...")
    add("--machines", type=int, default=1, help="number of machines (default 1)")
    add("--studio", help="run in a copy of this Studio's environment and files; the default inside a Studio")
    add("--image", help="run in this container image instead; it contains the checkout and its dependencies")
    add("--image-credentials", metavar="SECRET", help="the teamspace's secret for a private image")
    add("--path-mapping", action="append", default=[], metavar="PATH=CONNECTION[:PATH]",
        help="mount a data connection in an image; all other files are lost with the job")  # fmt: skip
    add("--teamspace", metavar="OWNER/NAME", help="(default: the current one)")
    add("--name", help="the job's name; by default run_name and the time")
    add("--env", action="append", default=[], metavar="KEY[=VALUE]",
        help="an environment variable of the job; without a value, that of this shell")  # fmt: skip
    add("--interruptible", action="store_true", help="cheaper machines, which can be taken away")
    add("--attempts", type=int, default=1, help="starts at most, each resuming the one before (default 1)")
    add("--checkout", metavar="PATH", help="the checkout on the job's machine; by default this one if it is in a "
        "Studio, else the folder where the job starts")  # fmt: skip
    add("--python", default="python", help="the interpreter on the job's machine (default python)")
    add("--dry-run", action="store_true", help="print the job and stop")
    return p


def run(a: argparse.Namespace) -> None:
    """Check the config, print the job and, without --dry-run, submit it.

    Raises:
        ValueError: a mistake in the config or the arguments; lightning_sdk is not installed or refuses the job.
    """
    for name in ("machines", "attempts"):
        if getattr(a, name) < 1:
            raise ValueError(f"--{name} is {getattr(a, name)}; it must be positive")
    if a.image and a.studio:
        raise ValueError("--image and --studio both say what the job runs in; choose one")
    env = environment_of_job(a.env)
    if "NB_ROOT" in os.environ:  # the config reads it: check here what runs there
        env.setdefault("NB_ROOT", os.environ["NB_ROOT"])
    os.environ.update(env)
    overrides = complete_overrides(a)
    cfg = compose_and_check(a, overrides)
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
        "path_mappings": dict(split_pair(item, "--path-mapping") for item in a.path_mapping) or None,
        "teamspace": a.teamspace,
        "env": env or None,
        "interruptible": a.interruptible,
        "max_run_attempts": a.attempts,
    }
    print("would submit" if a.dry_run else "submitting", "with lightning_sdk.Job.run:")
    for key, value in job.items():
        if value not in (None, False):
            print(f"  {key:<17} {hide_secrets(a.env, env) if key == 'env' else value}")
    if sdk is None:
        print("not checked: the name of the machine (lightning_sdk is not installed here)")
    if sdk is None or a.dry_run:
        return
    try:
        submitted = sdk.Job.run(**job)
    except Exception as error:  # the SDK, its HTTP client and the network have a class each
        raise ValueError(f"lightning_sdk could not submit the job: {error}") from error
    print(f"submitted {submitted.name}: {submitted.link}")


def environment_of_job(items: Sequence[str]) -> dict[str, str]:
    """Parse the values of --env: KEY=VALUE, or KEY for the value that this process has."""
    env = {}
    for item in items:
        if "=" not in item and item not in os.environ:
            raise ValueError(f"--env {item} has no value, and {item} is not set here")
        key, value = split_pair(item, "--env") if "=" in item else (item, os.environ[item])
        env[key] = value
    return env


def hide_secrets(items: Sequence[str], env: dict[str, str]) -> str:
    """Format the variables, without values that are this process's or whose name is that of a secret."""
    hidden = [key for key in env if key in items or SECRET_NAME.search(key)]
    return " ".join(f"{key}={HIDDEN if key in hidden else shlex.quote(value)}" for key, value in env.items())


def split_pair(item: str, option: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not (key and equals):
        raise ValueError(f"{option} {item}: it must be {'KEY=VALUE' if option == '--env' else 'PATH=CONNECTION'}")
    return key, value


def gpus(machine: str) -> int:
    """Count the GPUs of a machine by its name: H100 has 1, H100_X_8 has 8, CPU and DATA_PREP have none."""
    if machine.startswith(("CPU", "DATA_PREP")):
        return 0
    count = re.search(r"_X_(\d+)$", machine)
    return int(count.group(1)) if count else 1


def complete_overrides(a: argparse.Namespace) -> list[str]:
    """Put the overrides that follow from the machines before the user's; the same job again resumes."""
    devices = [f"trainer.devices={gpus(a.machine)}"] if gpus(a.machine) else []
    return ["resume=true", *devices, f"trainer.num_nodes={a.machines}", *a.overrides]


def compose_and_check(a: argparse.Namespace, overrides: list[str]) -> Config:
    """Compose the job's config.

    Raises:
        ValueError: see `config.checks.check`; or the config does not fit the machines.
    """
    cfg = composed(overrides)
    gpu_count, t = gpus(a.machine), cfg.trainer
    if t.num_nodes != a.machines:
        raise ValueError(f"trainer.num_nodes is {t.num_nodes}, but --machines is {a.machines}; leave it out")
    if gpu_count and t.devices > gpu_count:
        raise ValueError(f"trainer.devices is {t.devices}, but a machine {a.machine} has {gpu_count} GPU(s)")
    if t.accelerator == ("cpu" if gpu_count else "cuda"):
        raise ValueError(f"trainer.accelerator={t.accelerator} does not go with --machine {a.machine}")
    if (a.machines > 1 or a.attempts > 1) and not Path(cfg.paths.root).is_absolute():
        raise ValueError(
            f"paths.root is {cfg.paths.root!r}, a folder of one machine and one attempt; with --machines or --attempts "
            "it must be an absolute path that all of them see (paths.root=..., or --env NB_ROOT=...)"
        )
    check_as_train(cfg, overrides)
    return cfg


def load_sdk(machine: str) -> Any:
    """Import lightning_sdk; return None where it is not installed.

    Raises:
        ValueError: it has no such machine (its `Machine.from_str` would invent one).
    """
    try:
        import lightning_sdk
    except ModuleNotFoundError as error:
        if error.name != "lightning_sdk":
            raise
        return None
    machines = [name for name, value in vars(lightning_sdk.Machine).items() if isinstance(value, lightning_sdk.Machine)]
    if machine not in machines:
        raise ValueError(f"--machine is {machine!r}; lightning_sdk has {', '.join(sorted(machines))}")
    return lightning_sdk


def command(a: argparse.Namespace, cfg: Config, overrides: list[str]) -> str:
    """Write the shell command of each machine; `exec` makes the shell the program, so that SIGTERM reaches it."""
    checkout = a.checkout or (str(CHECKOUT) if CHECKOUT.is_relative_to(STUDIO_HOME) else None)
    launcher = ""
    if a.machines > 1:  # Lightning sets these variables on each machine of a job
        launcher = (
            f"-m torch.distributed.run --nnodes={a.machines} --nproc-per-node={cfg.trainer.devices} "
            '--node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --shutdown-timeout=600 '
        )
    change_folder = f"cd {shlex.quote(checkout)} && " if checkout else ""
    return f"{change_folder}exec {shlex.quote(a.python)} {launcher}train.py {shlex.join(overrides)}"


if __name__ == "__main__":
    main()
