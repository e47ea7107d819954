#!/usr/bin/env bash
# One machine, one process per GPU:      docs/examples/launch/torchrun.sh stage=pretrain trainer=fsdp
#
# The same command again continues the run: with resume=true a run that has no checkpoint yet begins.
#   GPUS          processes, one per GPU (default: all that nvidia-smi lists)
#   MAX_RESTARTS  times that all processes start again, from the newest checkpoint, when one dies (default 0)
#   PYTHON        the interpreter (default .venv/bin/python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

# Else processes that start again read the addresses of the dead ones, and wait for them for ever (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# SIGTERM goes on to every process: they end the step in hand, save and leave. torchrun kills those that are still
# saving after --shutdown-timeout seconds; its own default of 30 is short for a big model on a network disk.
exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
  --standalone --nproc-per-node="$GPUS" --max-restarts="${MAX_RESTARTS:-0}" --shutdown-timeout=600 \
  train.py resume=true trainer.devices="$GPUS" "$@"
