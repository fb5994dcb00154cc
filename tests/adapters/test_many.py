"""With many layers, work grows no faster than their number: it is counted for some and for four times as many."""

import re
from types import SimpleNamespace

import pytest
import torch
from counted import operations
from torch import nn

from geolora_pl import AdapterConfig, inject_adapters
from geolora_pl.adapters import names, targets, wrappers
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.report.rank_map import RankMap
from geolora_pl.storage import adapter_state, checkpoint, fingerprint, peft_import

FEW, TIMES = 30, 4
FASTER = 1.3  # than the number of layers; the square would be 4


class Block(nn.Module):
    """A layer, and a buffer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(1))


def layers(number: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(number)))


def grows(work) -> float:
    """How many times as much is done for four times as many layers, as a part of these four times."""
    work(FEW)  # what is done once per process is done
    few, many = (operations(work(number)) for number in (FEW, TIMES * FEW))  # what is prepared does not count
    return many / few / TIMES


def listed(number: int) -> list[str]:
    return [f"{i}.fc" for i in range(number)]


@pytest.mark.parametrize(
    "settings",
    [
        lambda number: {},
        lambda number: {"target_modules": listed(number)},
        lambda number: {"target_modules": names.alternation(listed(number))},
        lambda number: {"exclude_modules": listed(number // 2)},
        lambda number: {"rank_pattern": dict.fromkeys(listed(number), 1)},
        lambda number: {"rank_pattern": {names.alternation(listed(number)): 1}},
    ],
    ids=["all", "list", "expression", "excluded", "a rank each", "a rank for all"],
)
def test_to_choose_the_layers(settings):
    """Someone adapts a model of 5,000 layers, each by its name: a check of every layer against every other took longer
    than the rest."""

    def work(number):
        model, config = layers(number), AdapterConfig(**settings(number))

        def choose():
            chosen, config_of = targets.find_targets(model, config, {}), targets.config_of_each(config)
            targets.check_rank_pattern(config, chosen)
            return list(map(config_of, chosen))

        return choose

    assert grows(work) < FASTER


def test_no_expression_of_all_names_is_run_for_every_name(monkeypatch):
    """A file of an adapter names every layer in one expression, which took a step per layer for every layer."""
    model = layers(8)
    config = adapter_state.config_of(dict.fromkeys(listed(8), 2))
    without = SimpleNamespace(**{name: getattr(re, name) for name in ("escape", "fullmatch", "split", "sub")})
    monkeypatch.setattr(names, "re", without)  # which can compile none
    assert list(inject_adapters(model, config)) == listed(8)


class Listed(list):
    """Names that must not be searched through for every weight."""

    def __contains__(self, name: object) -> bool:
        raise AssertionError(f"the list was searched for {name}")


def test_the_names_of_what_is_trained_are_no_list_to_search():
    """Someone saves an adapter of a model whose thousands of biases are trained: the hash of the base searched the list
    of their names for every weight."""
    model = layers(3)
    inject_adapters(model, AdapterConfig(train_bias="all"))
    trained = Listed(fingerprint.trained_names(model))
    assert len(trained) == 3
    assert fingerprint.base_hash(model, trained) == fingerprint.base_hash(model, list(trained))


def test_a_buffer_belongs_to_the_base_unless_it_is_in_an_adapter():
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "fcs": Block()})
    model["fc"].register_buffer("inside", torch.zeros(1))
    inject_adapters(model, AdapterConfig(target_modules=["fc"], exclude_modules=["fcs.fc"]))
    assert list(adapter_state.base_buffers(model)) == ["fcs.seen"]


def wrapped(number: int) -> nn.Module:
    model = layers(number)
    for i in range(number):
        model[i] = nn.DataParallel(model[i])
    return model


def test_to_take_layers_out_of_wrappers():
    """Someone compiles every block, or recomputes its activations: the model was walked once for each."""

    def work(number):
        model = wrapped(number)
        return lambda: find_adapters(model)

    assert grows(work) < FASTER


def test_a_wrapper_that_has_two_names_is_taken_out_under_both_and_put_back():
    shared = nn.DataParallel(nn.Sequential(nn.DataParallel(nn.Linear(2, 2))))
    model = nn.ModuleDict({"one": shared, "two": shared})
    with wrappers.unwrapped(model) as plain:
        found = [name for name, _ in plain.named_modules(remove_duplicate=False)]
        assert found == ["", "one", "one.0", "two", "two.0"]
    assert model["one"] is model["two"] is shared
    assert isinstance(shared.module[0], nn.DataParallel)


def test_the_plain_names_of_the_weights_of_a_checkpoint():
    """Someone shows the ranks in a checkpoint of a model of which every block was compiled."""

    def work(number):
        model = wrapped(number)
        inject_adapters(model)
        content = {"state_dict": model.state_dict()}
        checkpoint.describe_adapters(content, model)
        assert "0.fc.U" in checkpoint.plain_weights(content)
        return lambda: checkpoint.plain_weights(content)

    assert grows(work) < FASTER


def test_the_factors_of_a_lora_with_a_rank_per_layer(tmp_path):
    """Someone loads a LoRA that was exported with the rank of each layer: every layer was compared with every key."""

    def work(number):
        sides = {name: {"A": torch.ones(1, 2), "B": torch.ones(2, 1)} for name in listed(number)}
        config = {"r": 2, "lora_alpha": 2, "rank_pattern": dict.fromkeys(listed(number), 1)}
        config["alpha_pattern"] = config["rank_pattern"]
        return lambda: peft_import.factors_of(sides, config, tmp_path)

    assert grows(work) < FASTER


def test_the_places_of_adapters_are_gone_through_once_for_all_kinds():
    """Someone trains a model in which no two layers are of one kind."""
    found = RankMap.of([f"layer{i}" for i in range(5)])
    found.of_kind("layer0")
    found.places.clear()
    assert [found.of_kind(kind) for kind in found.kinds] == [[f"layer{i}"] for i in range(5)]


def test_the_first_key_that_means_a_layer_gives_its_rank():
    model = layers(3)
    config = AdapterConfig(rank_pattern={r"1\..*": 1, "fc": 2, "2.fc": 1}, max_rank=2)
    ranks = {name: layer.rank for name, layer in inject_adapters(model, config).items()}
    assert ranks == {"0.fc": 2, "1.fc": 1, "2.fc": 2}
