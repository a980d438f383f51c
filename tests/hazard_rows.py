"""What can go wrong with a model, a file or a run, by row, and how many cases each row has at least.

A test belongs to a row by ``@pytest.mark.hazard(row)``; each of its parameters is a case. What the rows are, and where
their tests lie, stands in docs/checkpoints.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

CASES = {
    1: 45,  # malformed safetensors file
    3: 10,  # pickle
    4: 4,  # pickle by another name
    5: 16,  # path in an index out of the folder
    6: 10,  # malformed index
    7: 8,  # missing, empty or cut shard
    8: 14,  # missing or unexpected key
    9: 12,  # wrong shape or number of experts
    10: 8,  # wrong dtype
    11: 4,  # weights that are not finite
    12: 20,  # config that is broken, absent or absurd
    13: 12,  # interrupted save
    14: 5,  # disk full
    15: 5,  # bit rot
    16: 10,  # router that is not finite
    17: 28,  # modality that is absent from a batch
    18: 9,  # all tokens to one expert
    19: 12,  # no tokens
    20: 8,  # ties of a router, and permutations
    21: 8,  # ids that are huge or negative
    22: 10,  # wrong modality ids
    23: 3,  # every label ignored
    24: 5,  # out of memory
    25: 4,  # stuck or lost worker
    26: 6,  # killed worker, and a restart
    27: 10,  # corrupt checkpoint of a run
    28: 3,  # distributed checkpoint, which can run code
    29: 8,  # code in a checkpoint
    30: 12,  # names that are taken, malformed or of a broken plugin
    31: 12,  # names on the Hub, and no network
    32: 8,  # tied weights and shared storage
    33: 6,  # packages that do not fit each other
}
"""Cases of each row, 335 in all."""

IN_OTHER_WORDS = {
    "checkpoint/test_disk_full.py": {"mount": "makes the disk; what is refused in it is the disk itself"},
    "checkpoint/test_killed.py": {"killed": "who calls it loads what is left, which is one of two models, whole"},
    "parallel/ranks.py": {"run": "starts processes, and hands on what they raise"},
    "parallel/test_processes.py": {"test_two_processes": "each process compares its model with that of one process"},
    "routers/test_faults.py": {
        "test_counting_reads_nothing_back_to_the_host": "on tensors without data, of which a read would raise",
    },
    "tools/test_plugins.py": {
        "test_a_broken_plugin_is_reported_and_not_fatal": "in a process of its own, where built-in parts must be left",
    },
    "train/test_memory.py": {
        "test_a_process_with_little_memory_trains_a_smaller_batch_after_one_that_did_not_fit": "looks at "
        "gradients and weights itself",
    },
    "train/test_processes.py": {
        "test_a_run_that_torchrun_restarts_is_bitwise_the_unbroken_one": "weights, state and log are compared",
        "test_a_killed_process_and_the_one_after_it_make_the_run_of_one": "weights, state and log are compared",
        "test_a_lost_or_stuck_process_ends_all_of_them": "no process is left, the step before is saved",
        "test_processes_whose_launcher_is_killed_save_and_end": "no process is left, the last step is saved",
    },
    "train/test_step.py": {"test_looking_at_routers_adds_no_read": "counts what is read while nothing is wrong"},
}
"""Cases, and functions that they call, which say by other means than tests/refusals.py that nothing was harmed.

All others hand what could be harmed to ``refused`` or ``unchanged``.
"""

EXAMPLES = {1: 300, 2: 500}
"""Generated examples beside them: headers by hypothesis, and mutations of a saved model by seed."""


@dataclass(frozen=True)
class Collected:
    """What a run of pytest collected: cases by row and file, rows by file and name of a test, and the files."""

    cases: dict[int, Counter[Path]]
    tests: dict[tuple[Path, str], frozenset[int]]
    files: frozenset[Path]


COLLECTED = pytest.StashKey[Collected]()


def collected(items: Iterable[pytest.Item]) -> Collected:
    """Counts the cases of each row; a case with several markers counts in each of their rows."""
    cases: dict[int, Counter[Path]] = {row: Counter() for row in (*CASES, *EXAMPLES)}
    tests: dict[tuple[Path, str], frozenset[int]] = {}
    files = set()
    for item in items:
        rows = frozenset(row for marker in item.iter_markers("hazard") for row in marker.args)
        for row in rows:
            cases[row][item.path] += 1
        if rows:
            place = (item.path, getattr(item, "originalname", item.name))
            tests[place] = tests.get(place, frozenset()) | rows
        files.add(item.path)
    return Collected(cases=cases, tests=tests, files=frozenset(files))
