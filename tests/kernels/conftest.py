"""Where there is a GPU, tests/gpu runs the kernels themselves, and Triton is not interpreted."""

import torch

if torch.cuda.is_available():
    collect_ignore_glob = ["test_*_kernel.py", "test_ops.py"]
