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
# The processes first sum a tensor together: a link that does not work ends them in two minutes, with one sentence. The data
# must have been prepared, on a disk that all nodes see: sigma-lite prepare -c FILE (launch/prepare.sbatch shows how many
# processes share that work). Not run on GPUs by us.
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
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# What is kept of a collective that hangs: a file for each rank, read by `torchfrtrace`. Older versions of torch know the
# second name of each pair.
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_BUFFER_SIZE=2000 TORCH_NCCL_TRACE_BUFFER_SIZE=2000
export TORCH_FR_DUMP_TEMP_FILE="${PWD}/flight-" TORCH_NCCL_DEBUG_INFO_TEMP_FILE="${PWD}/flight-"
# If ranks do not find each other, or only slowly, name the network by hand (`ip addr`, `ibv_devices`):
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

together=(--nnodes="${NODES}" --nproc-per-node="${DEVICES}" --rdzv-backend=c10d --rdzv-endpoint="${HEAD}")
torchrun "${together[@]}" --rdzv-id=preflight --max-restarts=0 -m sigma_lite.scale.preflight

exec torchrun "${together[@]}" --rdzv-id=fit --max-restarts="${RESTARTS}" \
  -m sigma_lite fit "$@" \
  --trainer.num_nodes="${NODES}" \
  --trainer.devices="${DEVICES}"
