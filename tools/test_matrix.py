"""Run the tests as other machines would: with other kernels, threads, seeds and orders, and beside other processes.

    python tools/test_matrix.py
    python tools/test_matrix.py --cells least crowded -- tests/test_peft.py

A cell is one run of the whole suite and takes as long as one; all of them take hours. What stands behind ``--`` is for
pytest. A line a cell says how it went, what failed is shown, and the exit status is 1 if anything did.
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
AS_IT_IS: dict[str, str] = {}  # the variables of a cell; BUSY is how many processes keep the cores busy beside it


def threads(number: int) -> dict[str, str]:
    """So many threads of torch, which sleep while they wait: others take the cores in the meantime."""
    return {"GEOLORA_TEST_THREADS": str(number), "OMP_WAIT_POLICY": "PASSIVE"}


def seed(number: int) -> dict[str, str]:
    """Other random numbers in every test that does not need its own."""
    return {"GEOLORA_TEST_SEED": str(number)}


def order(number: int) -> dict[str, str]:
    """The tests in an order of this seed."""
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
    "busy": {"BUSY": "2"},
    "least": {**LEAST, **seed(1), **order(1)},  # this and the next are what CI runs
    "crowded": {**threads(2), **seed(2), **HASH, "BUSY": "1"},
}


def run(cell: str, arguments: list[str]) -> bool:
    """Run one cell, print its line, and say whether it is green."""
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
    results = [run(cell, args.pytest) for cell in args.cells]  # all of them, whatever comes of the first
    sys.exit(not all(results))
