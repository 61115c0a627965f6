"""Flags whose effect on activations the memory estimate knows; any other that is given is named.

So that a new flag of Megatron's is never passed over in silence.
"""

import argparse

from .command_line import as_given

# Groups of Megatron's parser without a flag that changes what layers keep.
GROUPS_WITHOUT_EFFECT = {
    "regularization",
    "profiling",
    "RNG and initialization",
    "learning rate and weight decay",
    "checkpointing",
    "mixed precision",
    "validation",
    "tokenizer",
    "autoresume",
    "logging",
    "straggler",
    "workload inspector",
    "one logger",
    "In-process restart",
    "ft_package",
    "rerun engine",
    "msc",
    "fault injector",
}

_COUNTED = """
    --num-layers --hidden-size --ffn-hidden-size --num-attention-heads --kv-channels
    --group-query-attention --num-query-groups --swiglu --seq-length --micro-batch-size
    --global-batch-size --data-parallel-size --tensor-model-parallel-size --sequence-parallel
    --pipeline-model-parallel-size --context-parallel-size
    --num-layers-per-virtual-pipeline-stage --num-virtual-stages-per-pipeline-rank
    --microbatch-group-size-per-virtual-pipeline-stage --hidden-dropout --fp16 --bf16
    --fp8-format --mhc --mhc-num-residual-streams --mhc-recompute --mhc-recompute-layer-num
"""

# Attention's dropout keeps a random state, no mask; adding a bias keeps nothing.
_WITHOUT_EFFECT = """
    --mhc-residual-mixing --mhc-sinkhorn-iterations --mhc-init-gating-factor --mhc-eps
    --mhc-backend --mhc-pipeline-overlap --mhc-pipeline-transport --mhc-log-gain-interval
    --mhc-force-patches

    --transformer-impl --attention-backend --use-flash-attn --flash-attention-version
    --attention-dropout --normalization --norm-epsilon --apply-layernorm-1p
    --disable-bias-linear --add-qkv-bias --no-bias-dropout-fusion --no-persist-layer-norm
    --position-embedding-type --max-position-embeddings --use-rotary-position-embeddings
    --rotary-base --rotary-percent --rotary-interleaved --rotary-seq-len-interpolation-factor
    --use-rope-scaling --rope-scaling-factor --no-position-embedding --window-size
    --untie-embeddings-and-output-weights --make-vocab-size-divisible-by
    --cross-entropy-loss-fusion --cross-entropy-fusion-impl --calculate-per-token-loss
    --init-method-std --embedding-init-method-std --no-initialization --use-cpu-initialization
    --deterministic-mode --config-logger-dir --use-mcore-models

    --fp8-recipe --fp8-margin --fp8-interval --fp8-amax-history-len --fp8-amax-compute-algo
    --fp8-param-gather --no-gradient-accumulation-fusion

    --train-iters --train-samples --rampup-batch-size --exit-interval --exit-duration-in-mins
    --exit-signal-handler --exit-signal --exit-signal-handler-for-dataloader
    --exit-signal-handler-for-training --manual-gc --manual-gc-interval --no-manual-gc-eval
    --train-sync-interval --iterations-to-skip --no-check-for-nan-in-loss-and-grad
    --check-for-large-grads --check-weight-hash-across-dp-replicas-interval
    --empty-unused-memory-level

    --optimizer --optimizer-cpu-offload --optimizer-offload-fraction
    --use-torch-optimizer-for-cpu-offload --overlap-cpu-optimizer-d2h-h2d --no-pin-cpu-grads
    --no-pin-cpu-params --use-distributed-optimizer --num-distributed-optimizer-instances
    --use-precision-aware-optimizer --main-grads-dtype --main-params-dtype --exp-avg-dtype
    --exp-avg-sq-dtype

    --overlap-grad-reduce --overlap-param-gather --overlap-param-gather-with-optimizer-step
    --no-align-grad-reduce --no-align-param-gather --no-gradient-reduce-div-fusion
    --ddp-num-buckets --ddp-bucket-size --ddp-average-in-collective
    --ddp-pad-buckets-for-high-nccl-busbw --distributed-backend --distributed-timeout-minutes
    --distributed-timeout-seconds-after-init --disable-gloo-process-groups
    --use-tp-pp-dp-mapping --nccl-communicator-config-path --use-sharp --sharp-enabled-group
    --high-priority-stream-groups --local-rank --flight-recorder-dump-path
    --flight-recorder-trace-buffer-size --no-flight-recorder-dump-on-timeout
    --flight-recorder-include-stack-trace --no-flight-recorder-include-only-active
    --no-flight-recorder-extra-dump-on-exec

    --data-path --split --train-data-path --valid-data-path --test-data-path --data-args-path
    --per-split-data-args-path --per-dataset-sequences-path --data-cache-path --mock-data
    --no-mmap-bin-files --num-workers --num-dataset-builder-threads --dataloader-type
    --dataloader-fast-cache-load --dataloader-defer-npy-index-mmap --object-storage-cache-path
    --mid-level-dataset-surplus --allow-ambiguous-pad-tokens --eod-mask-loss
    --reset-position-ids --no-create-attention-mask-in-dataloader
"""

KNOWN = {*_COUNTED.split(), *_WITHOUT_EFFECT.split()}


def unknown_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """What is not as by default, as it is typed, and may change activations or may not."""
    defaults = parser.parse_args([])
    found = []
    for group in parser._action_groups:
        for action in group._group_actions:
            value = getattr(args, action.dest, None)
            known = group.title in GROUPS_WITHOUT_EFFECT or KNOWN & {*action.option_strings}
            if not known and value != getattr(defaults, action.dest, None):
                found.append(as_given(action.option_strings[0], value))
    return found
