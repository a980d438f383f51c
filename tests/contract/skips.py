"""What transformers' shared suite skips of omnimoe, and why that is right."""

from __future__ import annotations

EXPECTED: dict[str, dict[str, tuple[str, ...]]] = {"model": {}, "parallel": {}}
"""Job to reason to names of tests, ``test_name`` in every kind or ``DenseTest::test_name`` in one."""


def compare(job: str, outcomes: dict[str, dict[str, str]], *, is_whole: bool = True) -> list[str]:
    """What is not as expected.

    Args:
        job: ``"model"`` or ``"parallel"``.
        outcomes: of :func:`tests.contract.run.run`.
        is_whole: every test of the job ran, so an expected one that is not there is missing.

    Returns:
        One line for each failure, each skip that nobody expected and each expected one that was not skipped.
    """
    expected = {name for names in EXPECTED[job].values() for name in names}
    kinds = sorted({name.partition("::")[0] for name in outcomes})
    expected = {
        full for name in expected for full in ([name] if "::" in name else [f"{kind}::{name}" for kind in kinds])
    }
    wrong = [f"FAILED {name}: {held['reason']}" for name, held in outcomes.items() if held["outcome"] == "failed"]
    skipped = {name for name, held in outcomes.items() if held["outcome"] == "skipped"}
    wrong += [f"UNEXPECTED SKIP {name}: {outcomes[name]['reason']}" for name in sorted(skipped - expected)]
    ran = expected - skipped if is_whole else (expected - skipped) & set(outcomes)
    wrong += [f"EXPECTED A SKIP, but {name} ran or is gone: {outcomes.get(name, {})}" for name in sorted(ran)]
    return wrong
