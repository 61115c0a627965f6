"""Runs the Gluon kernels for Hopper on a CPU, in random schedules.

Triton's interpreter does not take Gluon. Here a kernel's own code runs, each group of warps as a
task of its own (machine.py). Who goes on next, and when a copy lands, a store is seen or a matrix
product reads its operands, is drawn from a seed. Values are computed as late as the program
allows, since the compiler may do so too (values.py).

An access out of bounds, a missing fence or barrier, a wait that nothing ends are errors; memory
that is read before it is written, or overwritten while somebody still reads it, makes a result NaN
or another than in other schedules. Layouts, banks and registers are the compiler's to check, and
how long things take a GPU's.
"""

from .machine import Deadlock
from .run import Launcher

__all__ = ["Deadlock", "Launcher"]
