"""What ``megatron.training.pretrain`` asks of a GPT script: datasets, a forward step, a loss."""

import functools

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
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


def get_batch(data_iterator, vp_stage: int | None = None) -> dict[str, torch.Tensor | None]:
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
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
    )
    batch = {name: batch[name] for name in BATCH}
    if args.context_parallel_size > 1:
        group = mpu.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return batch


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
    report = torch.stack([loss.detach(), tokens.to(loss.dtype)])
    return loss, tokens, {"lm loss": report}


def make_forward_step():
    """The ``forward_step_func`` of ``pretrain``: a micro-batch through the model, gains logged."""
    gain_log = GainLog()

    def forward_step(data_iterator, model, return_schedule_plan: bool = False):
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
        timers("batch-generator").stop()
        run = model.build_schedule_plan if return_schedule_plan else model
        with gain_log.around_forward(model):
            losses = run(
                batch["tokens"],
                batch["position_ids"],
                batch["attention_mask"],
                labels=batch["labels"],
                loss_mask=batch["loss_mask"],
            )
        return losses, functools.partial(masked_loss, batch["loss_mask"])

    return forward_step
