"""The condition of the patches that only a machine without a GPU needs."""

import torch


def why_not() -> str | None:
    return "a GPU is here" if torch.cuda.is_available() else None
