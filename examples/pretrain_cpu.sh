#!/usr/bin/env bash
# A tiny mHC GPT on the CPU: two processes, tensor parallel, Megatron's mock data.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
${TORCHRUN:-torchrun} --nproc-per-node 2 "$here/pretrain_gpt.py" \
    --mhc --mhc-log-gain-interval 5 \
    --tensor-model-parallel-size 2 \
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 \
    --seq-length 64 --max-position-embeddings 64 --position-embedding-type rope \
    --normalization RMSNorm --swiglu --disable-bias-linear \
    --micro-batch-size 2 --global-batch-size 4 --train-iters 10 --lr 1e-3 \
    --mock-data --tokenizer-type NullTokenizer --vocab-size 257 \
    --no-create-attention-mask-in-dataloader \
    --log-interval 1 --eval-interval 10 --eval-iters 1 "$@"
