import json
import os
import shutil
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolerance import NETWORK, close, rounding
from torch import nn

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, inject_adapters, load_adapter, save_adapter
from geolora_pl.adapters.inject import find_adapters, has_adapters
from geolora_pl.storage.adapter_file import _checksum, read_adapter
from geolora_pl.storage.atomic import atomic

CONFIG = AdapterConfig(init_rank=2, max_rank=4, target_modules=["0", "2.0"], modules_to_save=["3"], alpha=2.0)


def base():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 7), nn.Tanh()), nn.Linear(7, 2))


def train(model, steps=3, lr=0.1, **settings):
    torch.manual_seed(4)
    integrator = RankAdaptiveIntegrator(model, tau=0.0, **{"adapt_every": 2, **settings})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().sum().backward()
        optimizer.step()
        integrator.step(optimizer)
    integrator.retract(optimizer)  # as at the end of a fit: the last step is pending, and probes are in no file
    integrator.close()
    return model.eval()


@pytest.fixture
def trained():
    model = base()
    inject_adapters(model, CONFIG)
    train(model)
    set_rank(model[2][0], 0)  # a layer may have been dropped altogether
    return model


def set_rank(layer, rank):
    with torch.no_grad():
        for factor in (layer.U, layer.V):
            factor[:, layer.probes + rank :] = 0
        layer.S[:, rank:] = 0
        layer.S[rank:] = 0
    layer.read_rank()


@pytest.fixture
def file(trained, tmp_path):
    save_adapter(trained, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_saved_adapter_gives_the_same_model_on_a_plain_and_on_a_fresh_base(trained, file, fresh):
    model = base()
    if fresh:
        inject_adapters(model, CONFIG)
        objects = {name: id(p) for name, p in model.named_parameters()}
    load_adapter(model, file)
    assert torch.equal(model.eval()(X), trained(X))
    assert {n: layer.rank for n, layer in find_adapters(model).items()} == {"0": 4, "2.0": 0}
    assert {n: layer.max_rank for n, layer in find_adapters(model).items()} == {"0": 4, "2.0": 4}
    requires = {name for name, p in model.named_parameters() if p.requires_grad}
    assert requires == {name for name, p in trained.named_parameters() if p.requires_grad}
    if fresh:
        assert objects == {name: id(p) for name, p in model.named_parameters()}


def test_training_goes_on_as_if_it_had_never_stopped(trained, file):
    model = base()
    load_adapter(model, file)
    first, second = train(trained.train()), train(model.train())
    close(second(X), first(X), NETWORK)
    assert not torch.equal(first(X), base()(X))


def test_the_file_has_the_live_ranks_and_says_what_it_is_of(file):
    tensors = load_file(file)
    assert {n: tuple(t.shape) for n, t in tensors.items() if n.startswith("adapters/")} == {
        "adapters/0/U": (8, 4),
        "adapters/0/S": (4, 4),
        "adapters/0/V": (6, 4),
        "adapters/2.0/U": (7, 0),
        "adapters/2.0/S": (0, 0),
        "adapters/2.0/V": (8, 0),
    }
    assert {n for n in tensors if n.startswith("trained/")} == {"trained/3.weight", "trained/3.bias"}
    assert torch.equal(tensors["buffers/1.num_batches_tracked"], torch.tensor(3))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    config = AdapterConfig(**json.loads(metadata["config"]))
    assert config.probes == CONFIG.probes
    assert list(inject_adapters(base(), config)) == ["0", "2.0"]
    assert config.alpha == 2.0
    assert json.loads(metadata["base_name"]) is None
    assert [len(digest) for digest in metadata["base_hash"].split()] == [64, 64]


def test_pending_increments_are_in_the_copy_and_the_model_stays_as_it_is(tmp_path):
    model = base().eval()
    inject_adapters(model, AdapterConfig(init_rank=1, max_rank=4, target_modules=["0"]))
    for factor in (model[0].K, model[0].L):
        factor.data[:, : model[0].probes + 1].normal_()
    before, expected = snapshot(model), model(X)
    save_adapter(model, tmp_path / "a")
    assert same(model, before)
    fresh = base().eval()
    load_adapter(fresh, tmp_path / "a")
    close(fresh(X), expected, NETWORK)
    assert fresh[0].rank == 2
    assert not fresh[0].K.any()


def test_the_base_may_be_in_another_precision(file, trained):
    model = base().bfloat16()
    load_adapter(model, file)
    assert model[0].U.dtype == torch.float32
    close(model.eval()(X.bfloat16()).float(), trained(X), within=rounding(torch.bfloat16, 1))


def test_a_train_bias_all_model_comes_back(tmp_path):
    model = base()
    inject_adapters(model, AdapterConfig(target_modules=["0"], train_bias="all"))
    train(model)
    save_adapter(model, tmp_path / "a")
    fresh = base()
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh.eval()(X), model(X))
    assert fresh[0].base.bias.requires_grad


def rewrite(file, change):
    """Change a file in a way that its checksum does not show."""
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    metadata.pop("checksum")
    tensors = load_file(file)
    change(metadata, tensors)
    save_file(tensors, file, {**metadata, "checksum": _checksum(metadata, tensors)})


def newer(metadata, tensors):
    metadata["version"] = "2"


def foreign(metadata, tensors):
    metadata["format"] = "pt"


def infinite(metadata, tensors):
    tensors["trained/3.bias"][0] = torch.inf


def without_V(metadata, tensors):
    del tensors["adapters/0/V"]


def other_rank(metadata, tensors):
    tensors["adapters/0/V"] = tensors["adapters/0/V"][:, :2].contiguous()


def other_size(metadata, tensors):
    tensors["adapters/0/U"] = tensors["adapters/0/U"][:5].contiguous()


def unknown_kind(metadata, tensors):
    tensors["more/0"] = torch.ones(1)


def unknown_layer(metadata, tensors):
    metadata["config"] = metadata["config"].replace("2\\\\.0", "2\\\\.1")


def unknown_setting(metadata, tensors):
    metadata["config"] = metadata["config"].replace('"alpha"', '"beta"')


def broken_json(metadata, tensors):
    metadata["config"] = "{"


def set_to(setting, value):
    def change(metadata, tensors):
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), setting: value})

    return change


def other_head(metadata, tensors):
    tensors["trained/3.bias"] = torch.ones(3)


def unknown_parameter(metadata, tensors):
    tensors["trained/4.bias"] = tensors.pop("trained/3.bias")


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (newer, "is of version 2, and this geolora_pl reads up to 1"),
        (foreign, "is not an adapter of geolora_pl"),
        (infinite, "trained/3.bias is not finite"),
        (without_V, "at least one adapter, each with U, S and V"),
        (other_rank, r"0 has U \(8, 4\), S \(4, 4\), V \(6, 2\)"),
        (other_size, "0 is 5 x 6 in the file and 8 x 6 in the model"),
        (unknown_kind, "not a well-formed adapter"),
        (unknown_layer, "not a well-formed adapter"),
        (unknown_setting, "not a well-formed adapter .*beta"),
        (broken_json, "not a well-formed adapter"),
        (set_to("alpha", 10**400), "not a well-formed adapter"),
        (other_head, r"3.bias is \(3,\) in the adapter and \(2,\) in the model"),
        (unknown_parameter, "the model has no 4.bias"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence_and_the_model_stays(file, change, message, fresh):
    rewrite(file, change)
    refuses(file, message, fresh)


def test_a_file_does_not_ask_for_more_probes_than_there_are_directions(file, trained):
    """A stranger's file of a few kB asked for 32 GB in every layer."""
    rewrite(file, set_to("probes", 10**9))
    model = base()
    load_adapter(model, file)
    assert model[0].probes == 8
    close(model.eval()(X), trained(X), NETWORK)


def refuses(file, message, fresh=False, model=None):
    model = model or base()
    if fresh:
        inject_adapters(model, CONFIG)
    before, requires = snapshot(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, file)
    assert "\n" not in str(error.value)
    assert same(model, before)
    assert has_adapters(model) == fresh
    assert [p.requires_grad for p in model.parameters()] == requires


def test_a_truncated_or_altered_file_is_refused_wherever_it_was_cut(file):
    whole = file.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    for length in (0, 4, 100, 8 + header, len(whole) - 1):
        file.write_bytes(whole[:length])
        refuses(file, "is corrupt")
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # what safetensors itself does not see
    refuses(file, "its checksum does not fit")
    refuses(file.parent / "gone", "gone is not a file")


def test_another_base_is_refused(file):
    model = base()
    model[0].weight.data[0, 0] += 1
    refuses(file, r"on another base \(without a name\)", model=model)


def test_other_fresh_adapters_are_refused(file, trained):
    for config, message in (
        (AdapterConfig(target_modules="0"), "2.0 has an adapter only in the file"),
        (AdapterConfig(init_rank=2, max_rank=2, target_modules=["0", "2.0"], alpha=2.0), "max_rank=2"),
        (AdapterConfig(target_modules=["0", "2.0"]), "alpha=1.0 does not fit"),
    ):
        model = base()
        inject_adapters(model, config)
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, file)
        assert same(model, before)


def test_what_cannot_be_saved_is_refused_and_the_old_file_stays(file, trained):
    before = file.read_bytes()
    trained[0].S.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^0 holds values that are not finite"):
        save_adapter(trained, file)
    with pytest.raises(ValueError, match="holds no adapters"):
        save_adapter(base(), file)
    mixed = base()
    inject_adapters(mixed, AdapterConfig())
    mixed[0].scaling = 3.0
    with pytest.raises(ValueError, match="differ in"):
        save_adapter(mixed, file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["a.safetensors"]


def fail_after(write, path):
    write(path)
    raise RuntimeError


def test_an_error_while_writing_leaves_nothing_and_what_was_there(tmp_path):
    for target, write in (("file", lambda p: p.write_text("half")), ("folder", lambda p: p.mkdir())):
        target = tmp_path / target
        with pytest.raises(RuntimeError), atomic(target) as path:
            fail_after(write, path)
        assert not list(tmp_path.iterdir())
        target.mkdir()
        (target / "old").write_text("old")
        with pytest.raises(RuntimeError), atomic(target) as path:
            fail_after(write, path)
        assert (target / "old").read_text() == "old"
        with pytest.raises(ValueError, match="exists already"), atomic(target, overwrite=False):
            pass
        if target.name == "file":  # never replaces a folder
            with pytest.raises(ValueError, match="is a folder, but a file must be written"), atomic(target) as path:
                write(path)
            assert (target / "old").read_text() == "old"
        else:
            with pytest.raises(ValueError, match="holds old, which is no part"), atomic(target) as path:
                write(path)
            assert (target / "old").read_text() == "old"
            with atomic(target) as path:
                write(path)
                (path / "old").write_text("new")
            assert (target / "old").read_text() == "new"
        assert list(tmp_path.iterdir()) == [target]
        shutil.rmtree(target)


@pytest.mark.parametrize("letter", ["a", "é"])
def test_a_name_may_be_as_long_as_names_can_be(tmp_path, letter):
    """A user's checkpoints had all metrics in their names. They could not be written, for the folder beside them."""
    path = tmp_path / (letter * (os.pathconf(tmp_path, "PC_NAME_MAX") // len(letter.encode())))
    with atomic(path) as unfinished:
        unfinished.write_text("whole")
    assert path.read_text() == "whole"


def test_a_folder_replaces_no_file_and_a_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("file")
    with pytest.raises(ValueError, match="is a file, but a folder must be written"), atomic(tmp_path / "x") as path:
        path.mkdir()
    assert (tmp_path / "x").is_file()
    (tmp_path / "y").write_text("file")
    with pytest.raises(ValueError, match="is a file and not a folder"), atomic(tmp_path / "y" / "z"):
        pass


class Shared(nn.Module):
    """One layer under two names, and two layers with one weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 6)
        self.again = self.a
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied_too = nn.Linear(6, 6, bias=False)
        self.tied_too.weight = self.tied.weight

    def forward(self, x):
        return self.tied_too(self.tied(self.again(self.a(x))))


def test_layers_that_share_an_adapter_all_get_it_back(tmp_path):
    model, plain = Shared(), Shared()
    for layer in inject_adapters(model).values():
        layer.S.data[:2, :2].normal_()
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(plain, tmp_path / "a.safetensors")
    x = torch.randn(3, 6)
    close(plain(x), model(x), NETWORK)


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").touch()
    model = Shared()
    inject_adapters(model)
    with pytest.raises(ValueError, match="is a folder, but a file must be written"):
        save_adapter(model, tmp_path / "folder")
    assert (tmp_path / "folder" / "precious").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_was_trained_is_trained_again_in_a_model_with_adapters(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))

    first, second, third = build(), build(), build()
    inject_adapters(first, AdapterConfig(target_modules=["0"], modules_to_save=["1"]))
    nn.init.ones_(first[1].weight)
    save_adapter(first, tmp_path / "first.safetensors")
    inject_adapters(second, AdapterConfig(target_modules=["0"]))
    load_adapter(second, tmp_path / "first.safetensors")
    assert second[1].weight.requires_grad
    save_adapter(second, tmp_path / "second.safetensors")
    load_adapter(third, tmp_path / "second.safetensors")
    assert torch.equal(third[1].weight, first[1].weight)


def test_what_is_loaded_is_not_cut_to_the_budget_of_an_earlier_fit_when_it_is_saved_again(file, tmp_path):
    """A user trained to a budget, and later loaded a larger adapter into that model. Saved again, it was smaller."""
    model, again = base(), tmp_path / "again.safetensors"
    inject_adapters(model, CONFIG)
    train(model, budget=29)
    load_adapter(model, file)
    save_adapter(model, again)
    assert read_adapter(file).factors["0"].S.shape[0] > 1
    assert load_file(again).keys() == load_file(file).keys()
    assert all(torch.equal(tensor, load_file(again)[name]) for name, tensor in load_file(file).items())
