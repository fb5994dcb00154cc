import copy

import pytest
import torch
from torch import nn

from geolora_pl import AdapterConfig, inject_adapters
from geolora_pl.storage.fingerprint import base_hash, base_parameters, trained_names


def model():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Sequential(nn.Linear(5, 4)), nn.Linear(4, 2))


def test_a_base_is_the_same_with_and_without_adapters_and_in_every_precision():
    plain = model()
    adapted = copy.deepcopy(plain)
    inject_adapters(adapted, AdapterConfig(target_modules=["0", "2.0"], modules_to_save=["3"], train_bias=True))
    trained = trained_names(adapted)
    assert trained == ["0.bias", "2.0.bias", "3.weight", "3.bias"]
    assert list(base_parameters(adapted)) == [name for name, _ in plain.named_parameters()]
    assert base_hash(adapted, trained) == base_hash(plain, trained) == base_hash(plain.double(), trained)
    assert base_hash(adapted.bfloat16(), trained) == base_hash(plain.bfloat16(), trained)


def test_what_is_trained_and_what_moves_by_itself_does_not_count():
    first = model()
    trained = ["3.weight", "3.bias"]
    expected = base_hash(first, trained)
    nn.init.zeros_(first[3].weight)
    first(torch.randn(8, 6))  # moves the running means
    assert base_hash(first, trained) == expected


@pytest.mark.parametrize("change", [lambda m: m[2][0].weight.data[0, 0].add_(1.0), lambda m: m[0].bias.data.zero_()])
def test_another_weight_is_another_base(change):
    first = model()
    expected = base_hash(first, [])
    change(first)
    assert base_hash(first, []) != expected


def test_names_count():
    weight = nn.Linear(3, 3)
    assert base_hash(nn.Sequential(weight), []) != base_hash(nn.Sequential(nn.Identity(), weight), [])
