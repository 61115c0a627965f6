#!/usr/bin/env bash
# An mHC GPT on one node of 8 GPUs (GPUS=n for fewer). Needs DATA and OUT: see gpt_1b.sh.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/gpt_1b.sh"

${TORCHRUN:-torchrun} --standalone --nproc-per-node "${GPUS:-8}" "$here/pretrain_gpt.py" \
    "${FLAGS[@]}" "$@"
