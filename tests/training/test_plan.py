"""What a retraction decides is decided on the device."""

from types import SimpleNamespace

import pytest
import torch
from reference import bought_one_by_one, rank_within_tau
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters
from geolora_pl.adapters.inject import find_adapters

SHAPES = [(12, 8), (8, 12), (12, 8), (20, 8), (8, 12)]  # out and in


def adapted(devices=("cpu",), probes=2, **settings):
    """Adapters of three shapes, in turn on the devices, and their integrator; it watches no steps."""
    layers = [nn.Linear(n, m, device=devices[i % len(devices)]) for i, (m, n) in enumerate(SHAPES)]
    model = nn.Sequential(*layers)
    inject_adapters(model, AdapterConfig(init_rank=2, max_rank=6, probes=probes))
    integrator = RankAdaptiveIntegrator(model, **settings)
    integrator.close()
    return model, integrator


def take_a_step(model, optimizer, but=()):
    """Gradients for all adapters but some."""
    for name, layer in find_adapters(model).items():
        for factor in (layer.K, layer.L):
            factor.grad = None if name in but else torch.randn_like(factor)
    optimizer.step()


def transfers(monkeypatch, kind):
    """The devices that are read from by ``tolist``, in one transfer; other ways to a value fail on such tensors."""
    devices = []

    def tolist(tensor):
        devices.append(tensor.device.type)
        return [1.0] * tensor.numel()

    monkeypatch.setattr(kind, "tolist", tolist)
    return devices


@pytest.fixture
def without_generators(monkeypatch):
    """The device ``meta`` has no generator of random numbers, and needs none."""
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))


@pytest.mark.usefixtures("without_generators")
@pytest.mark.parametrize("admits", [True, False])
@pytest.mark.filterwarnings("ignore::geolora_pl.GeoLoRAWarning")  # of state without a rule
@pytest.mark.parametrize("settings", [{}, {"budget": 300}, {"budget": 300, "rank_changes": False}])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop, RiemannianAdam])
def test_an_adaptation_reads_from_the_device_once(monkeypatch, make, settings, admits):
    """Tensors on the device ``meta`` have no values and cannot be copied away from it."""
    model, integrator = adapted(["meta"], budget=settings.get("budget"))
    integrator.rank_changes = settings.get("rank_changes", True)
    optimizer = make(model if make is RiemannianAdam else [p for p in model.parameters() if p.requires_grad])
    take_a_step(model, optimizer, but=["2"])  # beside others of its shape that have a state
    reads = transfers(monkeypatch, torch.Tensor)
    monkeypatch.setattr(torch, "tensor", None)  # nor is anything copied to it: no weight decay is pending
    integrator._retract(optimizer, admits=admits)
    assert reads == ["meta"]
    assert set(integrator.ranks().values()) == {1}
    assert integrator.truncation_error == 1.0


@pytest.mark.usefixtures("without_generators")
@pytest.mark.parametrize("admits", [True, False])
def test_adapters_may_be_on_several_devices(monkeypatch, admits):
    """Fake tensors have no values, and refuse whatever mixes devices."""
    monkeypatch.setattr("geolora_pl.adapters.base.GeoLoRALayer.read_rank", lambda layer: None)
    with FakeTensorMode(allow_non_fake_inputs=True):  # torch.tensor makes none on "meta"
        model, integrator = adapted(["meta", "cpu"], budget=300)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
        take_a_step(model, optimizer)
        reads = transfers(monkeypatch, FakeTensor)
        integrator._retract(optimizer, admits=admits)
    assert reads == ["meta"]
    devices = [{p.device.type for p in layer.parameters()} for layer in find_adapters(model).values()]
    assert devices == [{"meta"}, {"cpu"}, {"meta"}, {"cpu"}, {"meta"}]


@pytest.mark.parametrize("probes", [0, 2])
@pytest.mark.parametrize("budget", [None, 160])
def test_the_ranks_are_those_of_the_spectra(budget, probes):
    """Of dense float64 matrices: by tau where something is pending, then by the budget."""
    model, integrator = adapted(tau=0.3, budget=budget, probes=probes)
    model.double()
    adapters = find_adapters(model)
    for name, layer in adapters.items():
        nn.init.normal_(layer.S.data[:2, :2])
        if name != "2":
            nn.init.normal_(layer.K.data[:, : probes + 2])
            nn.init.normal_(layer.L.data[:, : probes + 2])
    dense = {name: layer.delta_weight().detach() for name, layer in adapters.items()}
    sigmas = {name: torch.linalg.svdvals(W) for name, W in dense.items()}
    ranks = [2 if name == "2" else rank_within_tau(sigma, 0.3, 6) for name, sigma in sigmas.items()]
    if budget is not None:
        costs = [layer.in_features + layer.out_features for layer in adapters.values()]
        within = bought_one_by_one([sigma.tolist() for sigma in sigmas.values()], ranks, costs, budget, [1] * 5)
        assert within != ranks
        ranks = within
    before = [factor.clone() for factor in adapters["2"].parameters()]
    integrator.retract()
    assert list(integrator.ranks().values()) == ranks
    moved = [name for name in adapters if name != "2" or integrator.ranks()["2"] < 2]
    dropped = sum((dense[name] - adapters[name].delta_weight().detach()).square().sum() for name in moved)
    total = sum(dense[name].square().sum() for name in moved)
    assert integrator.truncation_error == pytest.approx(float((dropped / total).sqrt()), rel=1e-9)
    if "2" not in moved:
        assert all(torch.equal(a, b) for a, b in zip(adapters["2"].parameters(), before, strict=True))
