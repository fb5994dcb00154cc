import sys

import pytest
import torch
from hypothesis import settings

# Forked processes deadlock with several torch threads.
torch.set_num_threads(1)

# Lightning warns of commands in Python while the process has arguments: those are pytest's.
del sys.argv[1:]

# The same examples in every run, and no clock: a test that fails fails again.
settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=150, database=None)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Graphs(list):
    """A backend of the compiler: keeps the graphs that it is given, and runs them as they are."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph.forward


@pytest.fixture
def graphs():
    """Such a backend; whatever was compiled before is forgotten."""
    torch._dynamo.reset()
    return Graphs()


@pytest.fixture
def messages(capfd, caplog):
    """Gives what was printed or logged since the last call: Lightning's log goes either way, by when it is imported."""

    def read():
        text = "".join(capfd.readouterr()) + caplog.text
        caplog.clear()
        return text

    return read
