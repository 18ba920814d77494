#!/usr/bin/env bash
# Train on one node or several with torchrun. Run it on every node with the same arguments:
#
#   scaled_configs/launch/torchrun.sh -c scaled_configs/node_8gpu.yaml
#   NODES=8 HEAD=node-0:29500 scaled_configs/launch/torchrun.sh -c scaled_configs/sigma_moe_tiny.yaml
#
# NODES      nodes (1)
# DEVICES    processes on each, one for each GPU (8)
# HEAD       host:port of one of the nodes, reachable from all (this host, when there is one node)
# RESTARTS   how often torchrun starts all processes again after one has failed (3); they continue from the last checkpoint
#
# The data must have been prepared, on a disk that all nodes see: sigma-lite prepare -c FILE (launch/prepare.sbatch shows how
# many processes share that work)
# Not run on GPUs by us.
set -euo pipefail

if [[ $# -eq 0 ]]; then
  echo "usage: [NODES=n] [DEVICES=n] [HEAD=host:port] $0 -c FILE [-c OVERLAY] [--section.key=value]" >&2
  exit 2
fi

NODES="${NODES:-1}"
DEVICES="${DEVICES:-8}"
HEAD="${HEAD:-localhost:29500}"
RESTARTS="${RESTARTS:-3}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec torchrun \
  --nnodes="${NODES}" \
  --nproc-per-node="${DEVICES}" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="${HEAD}" \
  --max-restarts="${RESTARTS}" \
  -m sigma_lite fit "$@" \
  --trainer.num_nodes="${NODES}" \
  --trainer.devices="${DEVICES}"
