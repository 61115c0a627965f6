"""Megatron's own recomputation as settings of a model; CPU and GPU tests try the same."""

UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform"}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block"}


def selective(*modules: str) -> dict:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def settings_id(settings: dict) -> str:
    return " ".join(str(value) for value in settings.values())


DENSE = [
    {**UNIFORM, "recompute_num_layers": 1},
    {**UNIFORM, "recompute_num_layers": 2},
    {**BLOCK, "recompute_num_layers": 2},
    selective("core_attn"),
    selective("mlp"),
]
"""Those of a model without experts."""
