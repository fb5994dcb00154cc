import pytest
import torch
from tolerance import NETWORK, close, rounding
from torch import nn

from geolora_pl import (
    AdapterConfig,
    AdapterLibrary,
    MergedAdapters,
    inject_adapters,
    load_adapter,
    merge_adapters,
    remove_adapters,
    save_adapter,
)
from geolora_pl.adapters.inject import find_adapters, has_adapters

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def base():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.BatchNorm1d(7), nn.Linear(7, 2)).eval()


def make(path, seed, layers, rank=2, **settings):
    model = base()
    inject_adapters(model, AdapterConfig(init_rank=rank, max_rank=5, target_modules=layers, **settings))
    torch.manual_seed(seed)
    for layer in find_adapters(model).values():
        layer.S.data[:rank, :rank].normal_()
    for parameter in model[4].parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model[3].running_mean.fill_(seed)
    save_adapter(model, path)
    return model


@pytest.fixture
def three(tmp_path):
    """Adapters of different layers, alphas, ranks, and with and without a head."""
    models = {
        "a": make(tmp_path / "a", 1, ["0", "2"], modules_to_save=["4"]),
        "b": make(tmp_path / "b", 2, ["0"], alpha=2.0, rank=1),
        "c": make(tmp_path / "c", 4, ["0", "2"], rank=4, modules_to_save=["4"]),
    }
    library = AdapterLibrary(base())
    for name in models:
        library.load(name, tmp_path / name)
    return models, library


def test_switching_gives_each_model_and_none_the_base_whatever_was_in_use_before(three):
    models, library = three
    for name in ("a", "b", "c", None, "b", "a", None):
        library.use(name)
        assert library.in_use == name
        assert torch.equal(library.model(X), (models[name] if name else base())(X))
        assert has_adapters(library.model) == (name is not None)


def test_training_goes_on_with_the_dropout_and_the_room_of_the_file_whatever_was_in_use_before(three, tmp_path):
    _, library = three
    layers, settings = ["0", "2"], {"dropout": 0.5, "modules_to_save": ["4"]}
    model = base()
    inject_adapters(model, AdapterConfig(init_rank=2, max_rank=4, target_modules=layers, **settings))
    save_adapter(model, tmp_path / "d")
    library.load("d", tmp_path / "d")
    for name, expected in (("a", (0.0, 5)), ("d", (0.5, 4)), ("a", (0.0, 5)), (None, None), ("d", (0.5, 4))):
        library.use(name)
        found = {(getattr(layer.dropout, "p", 0.0), layer.max_rank) for layer in find_adapters(library.model).values()}
        assert found == ({expected} if expected else set())


def test_adapters_that_are_made_alike_are_written_over(three):
    _, library = three
    library.use("a")
    before = [id(parameter) for parameter in library.model.parameters()]
    library.use("c")
    assert [id(parameter) for parameter in library.model.parameters()] == before


def test_loading_while_another_is_in_use_leaves_it_in_use(three, tmp_path):
    models, library = three
    library.use("a")
    make(tmp_path / "d", 6, ["4"])
    library.load("d", tmp_path / "d")
    assert library.in_use == "a"
    assert torch.equal(library.model(X), models["a"](X))
    for layer in find_adapters(library.model).values():  # as training does
        layer.S.data.mul_(2)
    expected = library.model(X)
    library.load("e", tmp_path / "d")
    assert torch.equal(library.model(X), expected)
    assert not torch.equal(expected, models["a"](X))


def deltas(model):
    return {name: layer.delta_weight() for name, layer in find_adapters(model).items()}


def test_a_weighted_sum_is_again_an_adapter(three, tmp_path):
    models, library = three
    assert library.combine("mix", {"a": 0.7, "b": -0.3}) == 0.0
    library.use("mix")
    a, b, mix = deltas(models["a"]), deltas(models["b"]), deltas(library.model)
    close(mix["0"], 0.7 * a["0"] - 0.3 * b["0"])
    close(mix["2"], 0.7 * a["2"])
    head = base()[4].weight + 0.7 * (models["a"][4].weight - base()[4].weight)
    close(library.model[4].weight, head)
    assert library.model[0].rank == 3
    save_adapter(library.model, tmp_path / "mix")
    fresh = base()
    load_adapter(fresh, tmp_path / "mix")
    assert torch.equal(fresh.eval()(X), library.model(X))


def test_weights_that_add_to_one_average_the_heads_and_one_alone_is_itself(three):
    models, library = three
    library.use("b")
    library.combine("mix", {"a": 0.25, "c": 0.75})
    library.combine("again", {"a": 1.0})
    library.use("mix")
    expected = 0.25 * models["a"][4].bias + 0.75 * models["c"][4].bias
    close(library.model[4].bias, expected)
    close(library.model[3].running_mean, torch.full((7,), 3.25))
    library.use("again")
    close(library.model(X), models["a"](X), NETWORK)


def test_beyond_max_rank_the_sum_is_the_best_approximation_and_the_loss_is_said(three):
    models, library = three
    cut = library.combine("mix", {"a": 1.0, "c": 1.0})
    library.use("mix")
    wanted = {name: (delta + deltas(models["c"])[name]).detach() for name, delta in deltas(models["a"]).items()}
    tails = [torch.linalg.svdvals(delta)[5:].square().sum() for delta in wanted.values()]
    total = sum(delta.square().sum() for delta in wanted.values())
    assert cut == pytest.approx(float((sum(tails) / total).sqrt()), abs=rounding(torch.float32))
    assert cut > 0.001
    for (name, delta), tail in zip(wanted.items(), tails, strict=True):
        assert library.model.get_submodule(name).rank == 5
        error = (deltas(library.model)[name] - delta).norm()
        close(error, tail.sqrt(), beside=delta.norm())


def test_an_adapter_that_is_removed_is_gone(three):
    models, library = three
    library.use("a")
    library.remove("b")
    assert torch.equal(library.model(X), models["a"](X))
    library.remove("a")
    assert library.names == ["c"]
    assert library.in_use is None
    assert torch.equal(library.model(X), base()(X))


def test_mistakes_are_refused_and_change_nothing(three, tmp_path):
    models, library = three
    library.use("a")
    other = nn.Sequential(nn.Linear(6, 8))
    inject_adapters(other)
    save_adapter(other, tmp_path / "other")
    for act, message in (
        (lambda: library.use("z"), "name='z' is not an adapter of the library: it has a, b, c"),
        (lambda: library.remove("z"), "name='z'"),
        (lambda: library.load("a", tmp_path / "a"), "name='a' is taken"),
        (lambda: library.load("d", tmp_path / "other"), "another base"),
        (lambda: library.load("d", tmp_path / "gone"), "is not a file"),
        (lambda: library.combine("a", {"b": 1.0}), "name='a' is taken"),
        (lambda: library.combine("d", {}), "weights={}"),
        (lambda: library.combine("d", {"a": float("nan")}), "finite"),
        (lambda: library.combine("d", {"z": 1.0}), "name='z'"),
        (lambda: AdapterLibrary(library.model), "already has adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            act()
        assert library.names == ["a", "b", "c"]
        assert torch.equal(library.model(X), models["a"](X))


def test_no_adapter_is_put_on_a_base_that_another_was_merged_into(three):
    """A user merged the adapter in use, for speed, and went on to the next. The model then computed with both."""
    models, library = three
    library.use("a")
    merged = MergedAdapters(library.model)
    for name in ("b", "a", None):
        with pytest.raises(ValueError, match="a is in use, but the model holds no adapters: it was merged"):
            library.use(name)
    merged.unmerge()
    library.use("b")
    assert torch.equal(library.model(X), models["b"](X))
    merge_adapters(library.model)
    with pytest.raises(ValueError, match="b is in use, but"):
        library.remove("b")


def test_an_adapter_in_use_may_be_removed_by_hand(three):
    """A user called remove_adapters, which leaves the base as it was, and went on to the next adapter."""
    models, library = three
    for name in ("a", "b", "a"):
        library.use(name)
        assert torch.equal(library.model(X), models[name](X))
        remove_adapters(library.model)
