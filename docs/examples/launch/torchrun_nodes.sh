#!/usr/bin/env bash
# Several machines, the same command on each, with its own NODE_RANK:
#
#   NODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 docs/examples/launch/torchrun_nodes.sh stage=pretrain trainer=fsdp ...
#
# Every machine needs this checkout at the same commit and paths.root on a file system that all of them see: each process
# writes its shard of one checkpoint there. The same command again, on every machine, continues the run.
#   NODES, NODE_RANK          how many machines, and which one this is: 0 ... NODES-1
#   MASTER_ADDR, MASTER_PORT  where machine 0 listens (default port 29500)
#   GPUS, PYTHON              as in torchrun.sh; GPUS must be the same on all machines
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

# No --max-restarts: these launchers do not tell each other of a death. Whoever started them starts all of them again.
exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
  --nnodes="$NODES" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
  --nproc-per-node="$GPUS" --shutdown-timeout=600 \
  train.py resume=true trainer.devices="$GPUS" trainer.num_nodes="$NODES" "$@"
