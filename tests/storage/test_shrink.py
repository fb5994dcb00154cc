"""Adapters that exist are made smaller without training: files and LoRAs, by a tolerance or a budget."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tolerance import close
from torch import nn

from geolora_pl import AdapterConfig, inject_adapters, load_adapter, save_adapter
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.cli.dispatch import main
from geolora_pl.storage.shrink import shrink

SPECTRA = {"0": [4.0, 2.0, 0.1], "2": [3.0, 0.2, 0.1]}
X = torch.randn(5, 10, generator=torch.Generator().manual_seed(3)).double()


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 6), nn.Linear(6, 2)).double()


def orthonormal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def updates():
    """For each layer U, sigma and V of an update of rank 3 with known singular values."""
    shapes = {"0": (12, 10), "2": (6, 12)}
    return {
        name: (orthonormal(m, 3, 1), torch.tensor(SPECTRA[name]).double(), orthonormal(n, 3, 2))
        for name, (m, n) in shapes.items()
    }


def expected(ranks):
    """The base with the best approximations of the updates at these ranks, and the head that was trained."""
    model = base()
    with torch.no_grad():
        for name, (U, sigma, V) in updates().items():
            r = ranks[name]
            model.get_submodule(name).weight += U[:, :r] * sigma[:r] @ V[:, :r].mT
        model[3].bias += 1
        return model(X)


@pytest.fixture
def file(tmp_path):
    model = base()
    inject_adapters(model, AdapterConfig(target_modules=["0", "2"], modules_to_save=["3"]))
    with torch.no_grad():
        for name, layer in find_adapters(model).items():
            U, sigma, V = updates()[name]
            turn = orthonormal(3, 3, 7)  # S need not be diagonal
            p = layer.probes
            layer.U[:, p : p + 3], layer.S[:3, :3], layer.V[:, p : p + 3] = U @ turn, turn.mT * sigma, V
            layer.read_rank()
        model[3].bias += 1
    save_adapter(model, tmp_path / "whole.safetensors")
    return tmp_path / "whole.safetensors"


@pytest.fixture
def lora(tmp_path):
    model = get_peft_model(
        base(), LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], modules_to_save=["3"], use_rslora=True)
    )
    with torch.no_grad():
        for name, (U, sigma, V) in updates().items():
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(V.mT)
            layer.lora_B["default"].weight.copy_(U * sigma / layer.scaling["default"])
        model.base_model.model[3].modules_to_save["default"].bias += 1
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


CASES = [
    ({"tau": 0.3}, {"0": 2, "2": 1}),  # 0.1 of 4.5, and 0.22 of 3; 2 of 4.5 is too much
    ({"budget": 22 * 2 + 18}, {"0": 2, "2": 1}),
    ({"budget": 22 + 18 + 5}, {"0": 1, "2": 1}),
    ({"tau": 0.3, "budget": 30}, {"0": 1, "2": 0}),
]


@pytest.mark.parametrize(("how", "ranks"), CASES)
def test_a_file_keeps_the_best_of_each_adapter_and_the_head(file, tmp_path, how, ranks):
    said = shrink(file, tmp_path / "small.safetensors", **how)
    model = base()
    load_adapter(model, tmp_path / "small.safetensors")  # still on its base only
    assert {name: layer.rank for name, layer in find_adapters(model).items()} == ranks
    close(model(X), expected(ranks))
    assert (said.before, said.after) == (3 * (22 + 18), 22 * ranks["0"] + 18 * ranks["2"])
    dropped = sum(s**2 for name, sigma in SPECTRA.items() for s in sigma[ranks[name] :])
    assert said.cut == pytest.approx((dropped / sum(s**2 for sigma in SPECTRA.values() for s in sigma)) ** 0.5)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("how", "ranks"), CASES)
def test_a_lora_keeps_the_best_of_each_layer_and_peft_loads_it(lora, tmp_path, how, ranks, compact):
    said = shrink(lora, tmp_path / "small", **how, compact=compact)
    assert said.rank == max(ranks.values())
    close(PeftModel.from_pretrained(base(), tmp_path / "small")(X), expected(ranks))
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["r"] == said.rank
    assert not config["use_rslora"]
    sides = [value for key, value in load_file(tmp_path / "small" / "adapter_model.safetensors").items() if "_A" in key]
    assert sum(map(len, sides)) == (sum(ranks.values()) if compact else 2 * said.rank)
    assert all(side.dtype == torch.float64 for side in sides)


class Blocks(nn.Module):
    """Layers with numbers, as those of a language model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(6, 6)}) for _ in range(3)).double()

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer["fc"](x))
        return x


@pytest.mark.parametrize("compact", [False, True])
def test_a_lora_on_chosen_blocks_is_loaded_where_one_of_them_loses_its_adapter(tmp_path, compact):
    """A user had chosen blocks by layers_to_transform. PEFT takes no such choice beside the whole names of layers."""
    chosen = LoraConfig(r=2, target_modules=["fc"], layers_to_transform=[0, 2], layers_pattern="layers")
    model = get_peft_model(Blocks(), chosen)
    with torch.no_grad():
        model.base_model.model.layers[2]["fc"].lora_B["default"].weight.normal_()
    model.save_pretrained(tmp_path / "lora")
    shrink(tmp_path / "lora", tmp_path / "small", tau=0.0, compact=compact)
    x = torch.randn(4, 6).double()
    close(PeftModel.from_pretrained(Blocks(), tmp_path / "small")(x), model(x))


@pytest.mark.parametrize("compact", [False, True])
def test_the_trained_bias_of_a_layer_that_loses_its_adapter_stays(tmp_path, compact):
    """A user trained with bias="all": PEFT finds the bias of each layer, also where no adapter is left."""
    model = get_peft_model(base(), LoraConfig(r=3, lora_alpha=3, target_modules=["0", "2"], bias="all"))
    wanted = base()
    with torch.no_grad():
        for name, (U, sigma, V) in updates().items():
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(V.mT)
            layer.lora_B["default"].weight.copy_(U * sigma)
            layer.base_layer.bias += 1
            wanted.get_submodule(name).bias += 1
        wanted[0].weight += updates()["0"][0][:, :1] * SPECTRA["0"][0] @ updates()["0"][2][:, :1].mT
    model.save_pretrained(tmp_path / "lora")
    shrink(tmp_path / "lora", tmp_path / "small", tau=0.3, budget=30, compact=compact)
    close(PeftModel.from_pretrained(base(), tmp_path / "small")(X), wanted(X))


def test_an_adapter_of_rank_0_is_shrunk_again_in_place(file):
    shrink(file, file, budget=30, overwrite=True)
    assert shrink(file, file, tau=0.1, overwrite=True) == (22, 22, 0.0, 1)


def test_what_is_small_enough_stays_to_the_bit(file, tmp_path):
    shrink(file, tmp_path / "same.safetensors", budget=10**6)
    whole, same = load_file(file), load_file(tmp_path / "same.safetensors")
    assert whole.keys() == same.keys()
    assert all(torch.equal(value, same[name]) for name, value in whole.items())


def test_the_command_says_what_is_left(file, lora, tmp_path, capsys):
    main(["shrink", "--adapter", str(file), "--tau", "0.3", "--output", str(tmp_path / "small.safetensors")])
    said = capsys.readouterr().out
    assert "62 of 120 adapter parameters" in said
    assert "the largest rank is 2" in said
    main(["shrink", "--adapter", str(lora), "--budget", "62", "--output", str(tmp_path / "small")])
    assert "a server must allow rank 2 (vLLM: --max-lora-rank 8)" in capsys.readouterr().out


def test_mistakes_are_refused_and_nothing_is_written(file, lora, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="neither tau nor budget is given"):
        shrink(file, out)
    with pytest.raises(ValueError, match=r"tau=1\.5 must lie in \[0, 1\)"):
        shrink(file, out, tau=1.5)
    with pytest.raises(ValueError, match="budget=0 must be a whole number"):
        shrink(file, out, budget=0)
    with pytest.raises(ValueError, match="budget=17 leaves nothing: one direction takes 18 parameters"):
        shrink(lora, out, budget=17)
    with pytest.raises(ValueError, match="is not a file"):
        shrink(tmp_path / "absent", out, tau=0.1)
    with pytest.raises(ValueError, match="compact is for the folder of a LoRA"):
        shrink(file, out, tau=0.1, compact=True)
    with pytest.raises(ValueError, match="exists already"):
        shrink(lora, file, tau=0.1)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        shrink(lora, out, tau=0.1)
    assert not out.exists()
