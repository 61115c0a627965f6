#!/usr/bin/env bash
#SBATCH --job-name=mhc
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# An mHC GPT on the nodes that Slurm gives; submit from the repository's root.
# Needs DATA and OUT on a file system that all nodes see: see gpt_1b.sh.
set -euo pipefail
here=${SLURM_SUBMIT_DIR:-.}/examples
source "$here/gpt_1b.sh"

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun ${TORCHRUN:-torchrun} --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:29500" \
    "$here/pretrain_gpt.py" "${FLAGS[@]}" "$@"
