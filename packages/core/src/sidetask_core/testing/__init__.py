"""The checks that every method must pass, for the author of one.

In a pytest file of your package, one line:

    from sidetask_core.testing import conformance
    from my_package import my_method

    TestMyMethod = conformance(my_method)

`problem` gives the tiny networks these checks run on, and `brute_force` the gradients they compare with.
"""

from sidetask_core.testing.conformance import conformance
from sidetask_core.testing.problems import (
    NAMES,
    SPLITS,
    backward,
    batches,
    brute_force,
    close,
    gradients,
    labelled,
    problem,
    squared,
    tiny_tasks,
    train,
)
from sidetask_core.testing.processes import in_two_processes

__all__ = [
    "NAMES",
    "SPLITS",
    "backward",
    "batches",
    "brute_force",
    "close",
    "conformance",
    "gradients",
    "in_two_processes",
    "labelled",
    "problem",
    "squared",
    "tiny_tasks",
    "train",
]
