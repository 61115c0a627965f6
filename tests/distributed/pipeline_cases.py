"""What the pipeline worker runs and the pipeline test compares; plain data, nothing to import."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Pipeline:
    """One way to train a model in stages.

    Attributes:
        pp, vpp, tp, cp: stages, chunks per stage (1: no interleaving), tensor-parallel and
            context-parallel size.
        ep: expert-parallel size, and data-parallel size; all run the same micro-batches.
        experts, combined: mixtures of experts for MLPs; combined 1F1B.
        micro_batches, group: their count, and how many run one chunk in a row (0: pp of them).
        overlap: "none" or "post".
        tied: the output layer shares the embedding; then also LayerNorm, biases and learned
            positions.
        sequence_parallel: tokens divided over the tensor-parallel ranks.
        recompute: full recomputation. replay: mHC's own.
        overlap_p2p, ahead: overlap_p2p_comm and overlap_p2p_comm_warmup_flush, for more than one
            chunk; the second needs the first.
        layers, hidden: the model's.
        bf16: wrapped in Megatron's Float16Module.
        copies: boundaries travel by the copy transport, which the host stands in for.
        layout: pipeline_model_parallel_layout as Megatron spells it, "" for equal stages.
    """

    pp: int
    vpp: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1
    experts: bool = False
    combined: bool = False
    micro_batches: int = 4
    group: int = 0
    overlap: str = "post"
    tied: bool = False
    sequence_parallel: bool = False
    recompute: bool = False
    replay: bool = False
    overlap_p2p: bool = True
    ahead: bool = True
    layers: int = 12
    hidden: int = 32
    bf16: bool = False
    copies: bool = False
    layout: str = ""

    @property
    def stage_ranks(self) -> int:
        """How many processes share a stage."""
        return self.tp * self.cp * self.ep

    @property
    def world(self) -> int:
        return self.pp * self.stage_ranks

    @property
    def name(self) -> str:
        """What the files of its results are called."""
        values = [f"{name}-{value}" for name, value in vars(self).items() if name != "layout"]
        return ".".join([*values, "layout"] if self.layout else values)

    @property
    def one_stage(self) -> "Pipeline":
        """The same training in one stage: without the pipeline."""
        plain = Pipeline(pp=1, micro_batches=self.micro_batches, tied=self.tied, layers=self.layers)
        plain = replace(plain, experts=self.experts, sequence_parallel=self.sequence_parallel)
        return replace(plain, tp=self.tp, cp=self.cp, ep=self.ep)

    @property
    def single(self) -> "Pipeline":
        """The same training in one process."""
        return replace(self.one_stage, tp=1, cp=1, ep=1, sequence_parallel=False)


PIPELINES = (
    Pipeline(pp=2, micro_batches=5, overlap="none"),
    Pipeline(pp=2, micro_batches=5, tied=True),
    Pipeline(pp=4, micro_batches=7),
    Pipeline(pp=4, micro_batches=3, overlap="none", tied=True),
    Pipeline(pp=2, tp=2, micro_batches=3, sequence_parallel=True),
    Pipeline(pp=4, tp=2, micro_batches=5, tied=True),
    Pipeline(pp=2, micro_batches=3, recompute=True),
    Pipeline(pp=2, vpp=2, replay=True),
    Pipeline(pp=2, vpp=2, micro_batches=5, group=3, ahead=False, replay=True),
    Pipeline(pp=4, vpp=2, layers=8, micro_batches=9, group=5, replay=True),
    Pipeline(pp=4, vpp=3, overlap="none", replay=True),
    Pipeline(pp=2, tp=2, micro_batches=3, sequence_parallel=True, replay=True),
    Pipeline(pp=2, vpp=2, overlap="none", ahead=False),
    Pipeline(pp=2, vpp=2, ahead=False),
    Pipeline(pp=2, vpp=2, micro_batches=5, group=3, tied=True),
    Pipeline(pp=2, vpp=3, micro_batches=7, group=7),
    Pipeline(pp=2, vpp=2, overlap_p2p=False),
    Pipeline(pp=2, vpp=3, tp=2, micro_batches=4, sequence_parallel=True, tied=True),
    Pipeline(pp=4, vpp=3, micro_batches=5, group=5, ahead=False),
    Pipeline(pp=4, vpp=2, layers=8, micro_batches=9, group=5),
    Pipeline(pp=4, vpp=3, micro_batches=4, overlap="none", overlap_p2p=False),
    Pipeline(pp=4, vpp=3, tp=2, micro_batches=4, tied=True, recompute=True),
    Pipeline(pp=4, micro_batches=4, layout="E|t*6|t*6|L"),
    Pipeline(pp=2, micro_batches=5, copies=True, tied=True),
    Pipeline(pp=4, vpp=2, layers=8, micro_batches=9, group=5, copies=True, replay=True),
    Pipeline(pp=2, vpp=3, micro_batches=7, group=7, copies=True),
    Pipeline(pp=4, vpp=2, layers=8, micro_batches=4, overlap_p2p=False, copies=True),
    Pipeline(pp=1, cp=2, layers=8),
    Pipeline(pp=1, cp=4, layers=8),
    Pipeline(pp=1, tp=2, cp=2, layers=8, sequence_parallel=True),
    Pipeline(pp=2, cp=2, micro_batches=3, tied=True, recompute=True),
    Pipeline(pp=2, vpp=2, cp=2, layers=8, replay=True),
    Pipeline(pp=2, vpp=2, ep=2, experts=True, layers=4, combined=True),
    Pipeline(pp=2, vpp=2, ep=2, experts=True, layers=4, combined=True, copies=True),
    Pipeline(pp=2, vpp=2, ep=2, experts=True, layers=4, combined=True, overlap="none"),
)
RANDOM_PIPELINES = 10


@dataclass(frozen=True)
class Start:
    """Communicators that are built, and refused or not.

    Attributes:
        stages: their number.
        everywhere: settings of all ranks; of TransformerConfig, "num_streams", "overlap" or
            "transport".
        of_rank: settings of single ranks.
    """

    stages: int = 3
    everywhere: dict = field(default_factory=dict)
    of_rank: dict[int, dict] = field(default_factory=dict)


STARTS = {
    "equal": Start(),
    "other-streams": Start(of_rank={1: {"num_streams": 2}, 2: {"num_streams": 2}}),
    "other-width": Start(of_rank={2: {"hidden_size": 64}}),
    "batched": Start(everywhere={"batch_p2p_comm": True}),
    "crossing": Start(
        stages=2,
        everywhere={
            "batch_p2p_comm": True,
            "virtual_pipeline_model_parallel_size": 2,
            "overlap": "none",
        },
    ),
    "variable": Start(everywhere={"variable_seq_lengths": True}),
    "transport": Start(everywhere={"transport": "pigeon"}),
    "ring": Start(everywhere={"use_ring_exchange_p2p": True}),
}
