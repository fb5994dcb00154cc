import pytest
import torch
from torch import nn

from geolora_pl import AdapterConfig, inject_adapters
from geolora_pl.training.stacks import leading, owners, stacks


def adapters_with(*columns):
    """Adapters with so many columns in use out of 64, the two probes included."""
    model = nn.Sequential(*(nn.Linear(70, 80) for _ in columns))
    adapters = list(inject_adapters(model, AdapterConfig(init_rank=1, max_rank=62)).values())
    for adapter, of_adapter in zip(adapters, columns, strict=True):
        adapter.rank = of_adapter - adapter.probes
    return adapters


def stacked(adapters, unknown=0):
    """Columns of each stack, and the numbers of its adapters, of which the first are plain tensors."""
    found = []
    pairs = [(adapter.K, adapter.L) for adapter in adapters]
    pairs[:unknown] = [(K.detach(), L.detach()) for K, L in pairs[:unknown]]
    for factors, columns in stacks(pairs):
        members = [next(i for i, (K, _) in enumerate(pairs) if K is factor) for factor in factors[::2]]
        assert all(L is pairs[i][1] for i, L in zip(members, factors[1::2], strict=True))
        found.append((columns, members))
    return found


def test_adapters_with_as_many_live_columns_go_together():
    assert stacked(adapters_with(3, 12, 2, 9, 8)) == [(8, [0, 2, 4]), (16, [1, 3])]


@pytest.mark.parametrize(("used", "columns"), [(24, 24), (32, 32), (33, 64), (64, 64)])
def test_a_few_columns_that_are_zero_are_taken_along(used, columns):
    assert stacked(adapters_with(used)) == [(columns, [0])]


def test_unknown_adapters_are_taken_whole():
    assert stacked(adapters_with(3, 3, 3), unknown=1) == [(64, [0]), (8, [1, 2])]


def test_off_the_cpu_all_are_one_stack_and_whole(monkeypatch):
    monkeypatch.setattr("geolora_pl.training.stacks._CACHED", 1)
    adapters = [adapter.to("meta") for adapter in adapters_with(3, 12, 40)]
    assert stacked(adapters) == [(64, [0, 1, 2])]


def test_a_stack_ends_where_the_live_columns_are_more_than_the_cache_holds(monkeypatch):
    monkeypatch.setattr("geolora_pl.training.stacks._CACHED", 2 * 8 * (70 + 80))
    assert stacked(adapters_with(*[3] * 6)) == [(8, [0, 1, 2]), (8, [3, 4, 5])]


def test_leading_columns_share_memory_with_the_matrices():
    whole, wide = torch.zeros(3, 2), torch.zeros(4, 5)
    for part in leading([whole, wide], 2):
        part.fill_(1)
    assert (whole.sum(), wide.sum()) == (6, 8)


def test_owners():
    assert owners((2, 0, 1), torch.device("cpu")).tolist() == [0, 0, 2]
