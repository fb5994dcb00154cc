import pytest
import torch


@pytest.fixture(autouse=True)
def _a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU of Nvidia")


@pytest.fixture
def no_waiting():
    """A function that lets every wait of the host for the device fail from then on."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
