import pytest
import torch
from hypothesis import settings

# Forked processes deadlock with several torch threads.
torch.set_num_threads(1)

# The same examples in every run, and no clock: a test that fails fails again.
settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=150, database=None)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def messages(capfd, caplog):
    """Gives what was printed or logged since the last call: Lightning's log goes either way, by when it is imported."""

    def read():
        text = "".join(capfd.readouterr()) + caplog.text
        caplog.clear()
        return text

    return read
