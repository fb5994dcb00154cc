"""Run the tests as other machines would: with other kernels, threads, seeds and orders, and beside other processes.

    python tools/test_matrix.py
    python tools/test_matrix.py --cells least crowded -- tests/storage/test_peft.py

A cell is one run of the whole suite, and all cells take hours. The arguments behind ``--`` are for pytest. One line per
cell says how it went, failures are shown, and the exit status is 1 if there was any.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEAST = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}
HASH = {"PYTHONHASHSEED": "random"}
GARBAGE = {"GEOLORA_TEST_GARBAGE": "30"}  # the garbage collector comes after so few new objects
AS_IT_IS: dict[
    str, str
] = {}  # environment variables of a cell; BUSY is the number of processes that keep the cores busy


def threads(number: int) -> dict[str, str]:
    """The number of torch's threads, which sleep while they wait, so that other processes can use the cores."""
    return {"GEOLORA_TEST_THREADS": str(number), "OMP_WAIT_POLICY": "PASSIVE"}


def seed(number: int) -> dict[str, str]:
    """The seed of the random numbers, for every test that does not need its own."""
    return {"GEOLORA_TEST_SEED": str(number)}


def order(number: int) -> dict[str, str]:
    """A random order of the tests with this seed."""
    return {"PYTEST_ADDOPTS": f"-p randomly --randomly-seed={number}"}


CELLS = {
    "as_it_is": AS_IT_IS,
    "aten_default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten_avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "mkl_avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "mkl_sse4": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "onednn_avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "onednn_sse4": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "threads": threads(2),
    "seed_1": seed(1),
    "seed_2": seed(2),
    "hash": HASH,
    "order_1": order(1),
    "order_2": order(2),
    "garbage": GARBAGE,
    "busy": {"BUSY": "2"},
    "least": {**LEAST, **seed(1), **order(1)},  # this and the next are what CI runs
    "crowded": {**threads(2), **seed(2), **HASH, **GARBAGE, "BUSY": "1"},
}


def run(cell: str, arguments: list[str]) -> bool:
    """Run one cell, print its line, and return whether it is green."""
    variables = dict(CELLS[cell])
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(int(variables.pop("BUSY", 0)))]
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *arguments],
            cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    finally:
        for process in busy:
            process.kill()
            process.wait()
    if done.returncode:
        print(done.stdout)
    settings = " ".join(f"{name}={value}" for name, value in CELLS[cell].items())
    last = done.stdout.strip().rpartition("\n")[2].strip("= ")
    print(
        f"{'red' if done.returncode else 'green':5}  {cell:12}  {time.monotonic() - start:5.0f} s  {last}  {settings}"
    )
    sys.stdout.flush()
    return done.returncode == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="by default all of them")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, behind --")
    args = parser.parse_args()
    results = [run(cell, args.pytest) for cell in args.cells]  # all of them, even if the first fails
    sys.exit(not all(results))
