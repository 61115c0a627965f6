"""A Hopper GPU, as far as Triton asks a driver for one: kernels compile for it, and do nothing."""

from threading import current_thread
from types import SimpleNamespace

from triton.backends.compiler import GPUTarget


class Launcher:
    """What launches a compiled kernel. made_by: the names of the threads that made one."""

    made_by: list[str] = []
    launch_cooperative_grid = launch_pdl = False
    global_scratch_size = profile_scratch_size = 0

    def __init__(self, src, metadata) -> None:
        self.made_by.append(current_thread().name)

    def __call__(self, *arguments) -> None:
        pass

    launch = __call__


class Hopper:
    launcher_cls = Launcher
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        load_binary=lambda *arguments: (True, None, 0, 0, 1024),
    )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0
