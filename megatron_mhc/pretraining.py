"""What ``megatron.training.pretrain`` asks of a GPT script: datasets, a forward step, a loss."""

import functools
import json
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from megatron.training.utils import get_blend_and_blend_per_split

from .diagnostics import GainLog
from .errors import UserError

UNSUPPORTED = ("sft", "fim_data", "hybrid_context_parallel", "dataloader_inter_document_masking")
"""Megatron arguments whose data this script does not prepare, with or without mHC."""


def refuse_unsupported_data(args) -> None:
    """Raises UserError for a flag whose data :func:`get_batch` does not know."""
    for name in UNSUPPORTED:
        if getattr(args, name, False):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: this script trains on GPT data only; leave it out")


def _stage_reads_data(args) -> bool:
    """Whether this rank is of a pipeline stage that needs batches (:func:`_reads_data`); known
    before there are process groups.
    """
    stages = args.pipeline_model_parallel_size
    # Ranks in a row that are of one stage.
    if args.use_tp_pp_dp_mapping:
        together = args.tensor_model_parallel_size * args.context_parallel_size
    else:
        together = args.world_size // stages
    ends = (0, stages - 1)
    return args.create_attention_mask_in_dataloader or args.rank // together % stages in ends


def refuse_missing_data(args) -> None:
    """Raises UserError where there is no data, or a prefix of it lacks one of its two files, which
    a node that holds only inner pipeline stages need not have.
    """
    if args.mock_data:
        return
    flags = ["--data-path", "--train-data-path", "--valid-data-path", "--test-data-path"]
    # Files that list prefixes, and the flags that they stand for.
    for flag, path, instead in (
        ("--data-args-path", args.data_args_path, slice(0, 1)),
        ("--per-split-data-args-path", args.per_split_data_args_path, slice(1, 4)),
        ("--per-dataset-sequences-path", args.per_dataset_sequences_path, slice(0)),
    ):
        if path:
            if "://" not in path and not Path(path).is_file():
                raise UserError(f"{flag} {path}: there is no such file")
            flags[instead] = [f"{flag} {path}:"] * len(flags[instead])
    try:
        whole, split = get_blend_and_blend_per_split(args)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        named, expected = flags[1], "prefixes, or weights and prefixes in turn"
        if args.data_path or args.data_args_path:
            named = flags[0]
        elif args.per_split_data_args_path:
            expected = "JSON with train, valid and test, each prefixes or null"
        raise UserError(f"{named.removesuffix(':')}: expected {expected}") from None
    if not whole and not split:
        raise UserError(
            "--data-path: not given; give a prefix that tools/prepare_data.py made, or --mock-data"
        )
    if not _stage_reads_data(args):
        return
    for source, blend in zip(flags, (whole, *(split or ()))):
        for prefix in map(str, blend[0] if blend else ()):
            for ending in (".bin", ".idx"):
                # What has a scheme is not on this machine's disks.
                if "://" not in prefix and not Path(prefix + ending).is_file():
                    raise UserError(
                        f"{source} {prefix}: there is no {prefix}{ending}; "
                        "tools/prepare_data.py makes it"
                    )


def _sequences_per_dataset(path: str | None) -> dict[str, int] | None:
    return json.loads(Path(path).read_text()) if path else None


def datasets_provider(train_val_test_num_samples, vp_stage=None):
    """Train, validation and test GPTDataset of --data-path and its kin, or of --mock-data."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        object_storage_cache_path=args.object_storage_cache_path,
        sequences_per_dataset=_sequences_per_dataset(args.per_dataset_sequences_path),
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(
        kind,
        train_val_test_num_samples,
        is_built_on_rank=lambda: (
            mpu.get_tensor_model_parallel_rank() == 0 and _reads_data(vp_stage)
        ),
        config=config,
    ).build()


BATCH = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
"""What a model's forward pass takes."""


def _reads_data(vp_stage: int | None) -> bool:
    """Whether a pipeline stage needs the batch: for the embedding, the loss or a mask."""
    return (
        get_args().create_attention_mask_in_dataloader
        or mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        or mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    )


def get_batch(
    data_iterator, vp_stage: int | None = None, evaluates: bool = False
) -> dict[str, torch.Tensor | None]:
    """This rank's part of the next micro-batch; all None on a stage that needs none of it.

    Tensor-parallel rank 0 reads and broadcasts; context-parallel ranks each keep their tokens.
    """
    args = get_args()
    if not _reads_data(vp_stage):
        return dict.fromkeys(BATCH)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
        batch.setdefault("attention_mask", None)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.eval_micro_batch_size if evaluates else args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
    )
    batch = {name: batch[name] for name in BATCH}
    if args.context_parallel_size > 1:
        group = mpu.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return batch


SPIKE = 10
"""Times the largest of earlier losses from which --check-for-spiky-loss looks again."""


def masked_loss(loss_mask: torch.Tensor, losses: torch.Tensor):
    """Sum of the unmasked token losses, their count, and both for Megatron's report.

    Args:
        loss_mask: [b, s], 0 where a token does not count. losses: [b, s] float32, nats per token.
    """
    mask = loss_mask.flatten().float()
    loss = (losses.flatten().float() * mask).sum()
    tokens = mask.sum().int()
    if get_args().check_for_nan_in_loss_and_grad:
        for broken, what in ((torch.isnan, "NaN"), (torch.isinf, "infinite")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=broken,
                message=f"the loss is {what}",
                tolerance=0.0,
                fatal=True,
            )
    if get_args().check_for_spiky_loss:
        rerun = get_rerun_state_machine()
        rerun.validate_result(
            result=loss,
            rejection_func=functools.partial(
                rerun.is_unexpectedly_large, threshold=SPIKE, context="loss"
            ),
            message="the loss is unexpectedly large",
            tolerance=0.0,
            fatal=False,
        )
    report = torch.stack([loss.detach(), tokens.to(loss.dtype)])
    return loss, tokens, {"lm loss": report}


def make_forward_step():
    """The ``forward_step_func`` of ``pretrain``: a micro-batch through the model, gains logged."""
    gain_log = GainLog()
    straggler_timer = StragglerDetector()  # one object, whoever makes it

    def forward_step(data_iterator, model, return_schedule_plan: bool = False):
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        with straggler_timer(bdata=True):
            vp_stage = get_attr_wrapped_model(model, "vp_stage")
            batch = get_batch(data_iterator, vp_stage, evaluates=not model.training)
        timers("batch-generator").stop()
        run = model.build_schedule_plan if return_schedule_plan else model
        with straggler_timer, gain_log.around_forward(model):
            losses = run(
                batch["tokens"],
                batch["position_ids"],
                batch["attention_mask"],
                labels=batch["labels"],
                loss_mask=batch["loss_mask"],
            )
        return losses, functools.partial(masked_loss, batch["loss_mask"])

    return forward_step
