"""The tests that no CPU can run, and what came of each of them as a file, which is written after every test.

python benchmarks/gpu/cuda_tests.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

import argparse
from collections import Counter
from collections.abc import Sequence

import pytest

from benchmarks.shared import results
from benchmarks.shared.paths import ROOT
from benchmarks.shared.results import Record

# Other versions than those that are tested warn of what newer ones deprecate; a test that hangs is not waited for long.
OPTIONS = ("-m", "cuda", "-W", "default", "--timeout", "60", "--rootdir", str(ROOT), str(ROOT / "tests" / "cuda"))


class Outcomes:
    """A plugin of pytest that keeps the outcome of every test in a file.

    Args:
        command: The command that runs the tests.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.tests: list[Record] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        why = {} if report.passed else {"why": report.longreprtext or str(report.longrepr)}
        name = report.nodeid.partition("::")[2]
        self.tests.append({"test": name, "outcome": report.outcome, "seconds": round(report.duration, 2), **why})
        counts = Counter(test["outcome"] for test in self.tests)
        results.write("cuda_tests", self.command, {**counts, "tests": self.tests})


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", help="more for pytest, such as -- -k steps")
    args = parser.parse_args(given)
    command = " ".join(["python benchmarks/gpu/cuda_tests.py", *given])
    return int(pytest.main([*OPTIONS, *args.options], plugins=[Outcomes(command)]))


if __name__ == "__main__":
    sys.exit(main())
