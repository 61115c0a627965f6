"""Kernels compiled by other threads, before the launch that needs them asks for it.

The compiler lets Python go on during its passes, and ptxas is another process, so that several
kernels compile at once. Triton itself would wait for all of them at the end of its
``AsyncCompileMode``; here every launch waits for its own kernel alone.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

from triton.runtime import driver

# As many as the kernels of a backward pass. A process that exits waits for what they compile: a
# thread that loses Python while it compiles would take the process down.
_threads = ThreadPoolExecutor(3, "mhc-compile")

_begun: dict[str, Future] = {}
"""By what Triton's cache on disk calls it: what was begun and no launch has asked for."""


def begin(kernel, grid: tuple[int, ...], arguments: tuple, options: dict) -> None:
    """Begins what ``kernel[grid](*arguments, **options)`` would have to compile, if anything.

    What of the arguments is a tensor may be on the meta device, and stands for one whose address is
    a multiple of 16. Errors of the compiler are the launch's.
    """

    def submit(key: str, compile: Callable, finish: Callable) -> None:
        if key not in _begun:
            _begun[key] = _threads.submit(_compile, compile)

    with _asked_by_triton(submit):
        kernel.warmup(*arguments, grid=grid, **options)


def launch(kernel, grid: tuple[int, ...], arguments: tuple, options: dict):
    """``kernel[grid](*arguments, **options)``, by Triton, with what was begun for it."""
    if not _begun:
        return kernel[grid](*arguments, **options)

    def submit(key: str, compile: Callable, finish: Callable):
        begun = _begun.pop(key, None)
        compiled = begun.result() if begun else compile()
        finish(compiled)
        return compiled

    with _asked_by_triton(submit):
        return kernel[grid](*arguments, **options)


def _compile(compile: Callable):
    """What the kernel's first launch does before anything is asked of CUDA, whose current device is
    another one in this thread.
    """
    compiled = compile()
    # In C, which takes a compiler too; launches find it in Triton's cache on disk.
    driver.active.launcher_cls(compiled.src, compiled.metadata)
    return compiled


@contextmanager
def _asked_by_triton(submit: Callable):
    """Triton hands to ``submit`` what it would compile: its key, what compiles it, and what then
    puts it into the kernel's cache.
    """
    # Not public, and not in every Triton: nothing is begun with one that is not tested.
    from triton.runtime._async_compile import active_mode

    before = active_mode.set(SimpleNamespace(submit=submit))
    try:
        yield
    finally:
        active_mode.reset(before)
