"""Runs transformers' shared test-suite against omnimoe, from a machine that has nothing but pip and an index.

    python -m tests.contract.run model              # the model, configuration and training mixins
    python -m tests.contract.run parallel           # the tensor-parallel, expert-parallel and FSDP mixins: slower
    python -m tests.contract.run model -k "Moe and rope" -n 0 -x

It fetches the source distribution of the installed transformers into the user's cache, once, and runs the mixins
against a dense model, a Mixture-of-Transformers, a MoMa and a mixture of experts. What is skipped is compared with
``tests/contract/skips.py``: a skip that is not expected there fails, and so does an expected one that ran. With ``-k``
only the tests that ran are compared.

Exit status: 0 if all is as expected, 1 if not, 2 if nothing could be run, which is no success.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.contract.sdist import NotRunError, installed_version, prepare
from tests.contract.skips import compare

SHARED = Path(__file__).parent / "shared"
ROOT = Path(__file__).parents[2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.contract.run", description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=("model", "parallel"), help="which mixins")
    parser.add_argument("-k", dest="select", default="", help="pytest's selection of tests")
    parser.add_argument("-n", dest="workers", default="2", help="processes that share the tests; 0 for none")
    parser.add_argument("-x", dest="stop", action="store_true", help="stop at the first failure")
    parser.add_argument("--report", type=Path, help="write every test's outcome to this JSON file")
    settings = parser.parse_args(argv)
    try:
        outcomes = run(settings.job, select=settings.select, workers=settings.workers, stop=settings.stop)
    except NotRunError as error:
        print(f"NOT RUN: {error}", file=sys.stderr)
        return 2
    if settings.report:
        settings.report.write_text(json.dumps(outcomes, indent=1), encoding="utf-8")
    wrong = compare(settings.job, outcomes, is_whole=not settings.select and not settings.stop)
    count = Counter(held["outcome"] for held in outcomes.values())
    print(f"\ntransformers {installed_version()}, {settings.job} mixins: {dict(count)}")
    for line in wrong:
        print(line)
    return 1 if wrong else 0


def run(job: str, *, select: str = "", workers: str = "2", stop: bool = False) -> dict[str, dict[str, str]]:
    """Runs the tests of one job in a process of their own.

    Returns:
        ``{test: {"outcome": "passed", "skipped" or "failed", "reason": text}}``.

    Raises:
        NotRunError: if there was nothing to run.
    """
    folder = prepare()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        environment = {
            **os.environ,
            # ranks are new processes, which have to find the suite too
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(
                os.pathsep
            ),
            "OMNIMOE_SUITE_REPORT": str(report),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "pytest", "-c", str(SHARED / "pytest.ini"), "--rootdir", str(SHARED)]
        command += ["--confcutdir", str(SHARED), str(SHARED / f"test_{job}.py")]
        command += ["-n", workers] if workers != "0" else []
        command += ["-k", select] if select else []
        command += ["-x"] if stop else []
        ended = subprocess.run(command, env=environment, cwd=scratch, check=False)
        outcomes = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    if not outcomes:
        raise NotRunError(f"pytest ended with status {ended.returncode} and no test ran")
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
