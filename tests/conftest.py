import functools
import gc
import importlib.metadata
import os
import sys

import pytest
import torch
from hypothesis import settings

# Set by tools/test_matrix.py: what is tested holds for every number of threads and every seed, and wherever the garbage
# collector comes, after so many new objects.
THREADS, SEED, GARBAGE = (
    int(os.environ.get(f"GEOLORA_TEST_{name}", default))
    for name, default in (("THREADS", 1), ("SEED", 0), ("GARBAGE", gc.get_threshold()[0]))
)
torch.set_num_threads(THREADS)

# Lightning warns of commands in Python while the process has arguments: those are pytest's.
del sys.argv[1:]

# Every Trainer reads the metadata of all packages for callbacks among them. No package comes or goes during the tests.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)

# The libraries stay until the end: to look for garbage among them while they are imported is in vain.
gc.disable()

# The same examples in every run, and no clock: a test that fails fails again.
settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=150, database=None)
settings.load_profile("deterministic")


def pytest_collection_finish():
    """From now on there is garbage, and none of it is what was imported."""
    gc.freeze()
    gc.set_threshold(GARBAGE)
    gc.enable()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(SEED)


@pytest.fixture
def one_thread(monkeypatch):
    """For tests that fork: a forked process with several torch threads waits for those of its parent for ever."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Lightning would give every process its share of the cores
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _forks_with_one_thread(request, monkeypatch):
    """Fails a test that forks and does not ask for ``one_thread``, before it hangs where there are several threads."""
    start = torch.multiprocessing.start_processes

    def start_processes(*arguments, start_method="spawn", **settings):
        assert start_method != "fork" or "one_thread" in request.fixturenames, "this test needs the fixture one_thread"
        return start(*arguments, start_method=start_method, **settings)

    monkeypatch.setattr(torch.multiprocessing, "start_processes", start_processes)


@pytest.fixture(scope="module")
def one_parser():
    """For modules of many commands: a command's parser, which takes long to make, serves all of them."""
    from geolora_pl.cli.train import GeoLoRACLI

    make, made = GeoLoRACLI.setup_parser, {}

    def setup_parser(cli, *arguments):
        commands = tuple(cli.subcommands())
        if commands not in made:
            before = set(vars(cli))
            make(cli, *arguments)
            made[commands] = {name: value for name, value in vars(cli).items() if name not in before}
        vars(cli).update(made[commands])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GeoLoRACLI, "setup_parser", setup_parser)
        yield


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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in of the Hugging Face hub for its client in this process, without repositories."""
    from hub_server import stand_in

    with stand_in(monkeypatch, tmp_path) as server:
        yield server
