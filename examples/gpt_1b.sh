# Flags of a mHC GPT in bf16, shared by the launch scripts; sourced, not run. 1.1B parameters with the
# byte-level vocabulary, 1.3B with one of 50000.
# DATA: prefix given to tools/prepare_data.py. OUT: folder for checkpoints and logs.
# FP8: tensorwise or blockwise, for fp8 compute. TOKENIZER: flags for other than byte-level data.
: "${DATA:?set DATA to the prefix given to tools/prepare_data.py}"
: "${OUT:?set OUT to a folder for checkpoints and logs}"

asked_for() { [[ " ${words[*]} " =~ \ --$1-parallel-size[=\ ]([2-9]|[1-9][0-9]) ]]; }
words=("$@")

# Streams of compute and communication overlap only with more hardware queues than one, but before
# Blackwell Megatron takes no more with tensor or context parallelism.
connections=32
if asked_for tensor-model || asked_for context; then connections=1; fi
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-$connections}

# A pipeline stage sees the gains of its own layers only.
gains=(--mhc-log-gain-interval 100)
if asked_for pipeline-model; then gains=(); fi

FLAGS=(
    --mhc "${gains[@]}"
    --transformer-impl transformer_engine --bf16
    --num-layers 24 --hidden-size 2048 --ffn-hidden-size 5632
    --num-attention-heads 16 --group-query-attention --num-query-groups 8
    --seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights
    --micro-batch-size 2 --global-batch-size 128 --train-iters 20000
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 500
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
    --hidden-dropout 0 --attention-dropout 0
    --no-gradient-accumulation-fusion # needs Apex: leave this out where it is installed
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --train-data-path "${DATA}_train" --valid-data-path "${DATA}_valid"
    --no-create-attention-mask-in-dataloader
    --save "$OUT/checkpoints" --load "$OUT/checkpoints" --save-interval 1000
    --tensorboard-dir "$OUT/tensorboard"
    --log-interval 10 --log-throughput --eval-interval 1000 --eval-iters 20
)
read -ra TOKENIZER <<<"${TOKENIZER:---tokenizer-type NullTokenizer --vocab-size 257}"
FLAGS+=("${TOKENIZER[@]}")
case "${FP8:-}" in
"") ;;
tensorwise) FLAGS+=(--fp8-format hybrid --fp8-recipe tensorwise) ;;
blockwise) FLAGS+=(--fp8-format e4m3 --fp8-recipe blockwise) ;;
*)
    echo "FP8=$FP8: expected tensorwise, blockwise or nothing" >&2
    exit 2
    ;;
esac
