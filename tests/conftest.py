import pytest
import torch

# Forked processes deadlock with several torch threads.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
