import copy
import pickle
from itertools import pairwise

import pytest
import torch
from reference import NaiveRiemannianAdam, one_layer, orthonormal, set_point
from tolerance import EXACT, RUN, close, rounding
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters, parameter_groups
from geolora_pl.math.decomposition import computed_columns
from geolora_pl.math.ranks import RankRule
from geolora_pl.training.optim import polar_factor

GEOMETRIES = ["rowwise", "isotropic", "spectral", "entrywise"]


def pair(adapter, **settings):
    return RiemannianAdam([{"params": [adapter.K, adapter.L], "adapters": True}], **settings)


def give_gradients(adapter, scale=1.0):
    w = adapter.probes + adapter.rank
    for factor in (adapter.K, adapter.L):
        factor.grad = torch.zeros_like(factor)
        factor.grad[:, :w] = scale * torch.randn(len(factor), w, dtype=factor.dtype)


def step_norm(adapter):
    return torch.cat([adapter.K.detach(), adapter.L.detach()]).norm().item()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("m", "n", "r", "R"), [(12, 9, 3, 6), (12, 9, 3, 9), (50, 20, 8, 8), (6, 6, 1, 2)])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_lr_is_the_norm_of_the_first_step_whatever_the_rank_the_padding_and_the_gradient(geometry, m, n, r, R, scale):
    _, adapter, _ = one_layer(m, n, r, R)
    give_gradients(adapter, scale)
    pair(adapter, lr=0.05, geometry=geometry).step()
    assert step_norm(adapter) == pytest.approx(0.05, rel=1e-2)  # eps takes a little
    for factor in (adapter.K, adapter.L):
        assert torch.count_nonzero(factor[:, adapter.probes + r :]) == 0


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_every_step_is_that_of_the_naive_reference(geometry, weight_decay):
    """With gradients that turn, rows and columns without any, and an adapter that joins later than the other."""
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "geometry": geometry}
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4)).double()
    adapters = list(inject_adapters(model, AdapterConfig(init_rank=2, max_rank=3)).values())
    optimizer = RiemannianAdam(model, weight_decay=weight_decay, **settings)
    naive = [NaiveRiemannianAdam(adapter.K, adapter.L, **settings) for adapter in adapters]
    stayed = 0
    for t in range(8):
        optimizer.zero_grad()
        for i, (adapter, reference) in enumerate(zip(adapters, naive, strict=True)):
            if t < 3 * i:
                continue
            give_gradients(adapter)
            adapter.K.grad[1] = 0  # an output that the loss does not depend on
            before = reference.K.clone()
            reference.step(adapter.K.grad, adapter.L.grad, weight_decay)
            stayed += int((before == reference.K).all(1).sum()) - 1  # but for the row without a gradient
        optimizer.step()
        for adapter, reference in zip(adapters, naive, strict=True):
            close(adapter.K.detach(), reference.K, within=EXACT)
            close(adapter.L.detach(), reference.L, within=EXACT)
    if geometry == "rowwise" and not weight_decay:
        assert stayed > 0, "no gradient has turned against its momentum"


@pytest.mark.parametrize(("geometry", "rank"), [("rowwise", 2), ("isotropic", 2), ("entrywise", 4)])
def test_a_momentum_of_low_rank_stays_a_step_of_low_rank_but_entrywise(geometry, rank):
    _, adapter, _ = one_layer(12, 9, 4, 4, probes=0)
    optimizer = pair(adapter, lr=0.1, geometry=geometry)
    directions = torch.randn(2, 2, 4).double()
    for _ in range(3):
        for factor, direction in zip((adapter.K, adapter.L), directions, strict=True):
            factor.grad = torch.randn(len(factor), 2).double() @ direction
        optimizer.step()
    assert torch.linalg.matrix_rank(adapter.K.detach(), rtol=1e-6) == rank


@pytest.mark.parametrize("geometry", ["rowwise", "isotropic"])
def test_a_step_does_not_depend_on_the_basis(geometry):
    """The same point written in rotated bases takes the same step."""
    target = torch.randn(8, 6).double()
    U, V, Q = orthonormal(8, 3), orthonormal(6, 3), orthonormal(3, 3)
    sigma = torch.tensor([1.0, 1.0, 1.0]).double()  # U V^T = (U Q) (V Q)^T
    after = []
    for rotation in (torch.eye(3).double(), Q):
        _, adapter, integrator = one_layer(8, 6, 3, 6, tau=0.0)
        torch.manual_seed(0)  # for the probes
        set_point(adapter, U @ rotation, sigma, V @ rotation)
        optimizer = pair(adapter, lr=0.1, geometry=geometry)
        for _ in range(4):
            optimizer.zero_grad()
            (0.5 * (adapter.delta_weight() - target).square().sum()).backward()
            optimizer.step()
            integrator.step(optimizer)
        after.append(adapter.delta_weight().detach())
    close(after[0], after[1], within=RUN)


def test_the_rest_follows_torchs_adamw():
    torch.manual_seed(0)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)))
    inject_adapters(models[0], AdapterConfig(target_modules=["0"], modules_to_save=["1"]))
    groups = parameter_groups(models[0], head_lr=1e-2)
    ours = RiemannianAdam(groups, betas=(0.9, 0.99), weight_decay=0.1)
    theirs = torch.optim.AdamW(
        [
            {"params": [models[1][1].weight], "weight_decay": 0.1},
            {"params": [models[1][1].bias], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.99),
    )
    for t in range(5):
        for model in models:
            torch.manual_seed(t)
            model[1].weight.grad, model[1].bias.grad = torch.randn(2, 6), torch.randn(2)
        ours.step()
        theirs.step()
    close(models[0][1].weight, models[1][1].weight)
    close(models[0][1].bias, models[1][1].bias)


def test_parameter_groups():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    inject_adapters(model, AdapterConfig(target_modules=["0"], modules_to_save=["1", "2"], train_bias=True, max_rank=4))
    adapters, matrices, vectors = parameter_groups(model, head_lr=0.1)
    assert [id(p) for p in adapters["params"]] == [id(model[0].K), id(model[0].L)]
    assert {id(p) for p in matrices["params"]} == {id(model[2].weight)}
    assert {id(p) for p in vectors["params"]} == {
        id(p) for p in (model[0].base.bias, model[1].weight, model[1].bias, model[2].bias)
    }
    assert "lr" not in adapters
    assert matrices["lr"] == vectors["lr"] == 0.1
    assert vectors["weight_decay"] == 0
    torch.optim.AdamW(parameter_groups(model))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_pair_without_a_gradient_is_left_out_and_the_others_stay_pairs(geometry):
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    adapters = list(inject_adapters(model).values())
    optimizer = RiemannianAdam(model, geometry=geometry)
    give_gradients(adapters[0])
    give_gradients(adapters[2])
    optimizer.step()
    assert [step_norm(a) > 0 for a in adapters] == [True, False, True]
    for adapter in adapters:
        give_gradients(adapter)
    optimizer.step()
    assert [int(optimizer.state[a.K]["step"]) for a in adapters] == [2, 1, 2]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_state_dict_resumes_exactly(geometry):
    def run(model, optimizer, integrator, steps):
        for t in steps:
            torch.manual_seed(t)
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().sum().backward()
            optimizer.step()
            integrator.step(optimizer)

    def fresh():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 2))
        inject_adapters(model, AdapterConfig(target_modules=["0", "2"], modules_to_save=["3"]))
        return model, RiemannianAdam(model, geometry=geometry), RankAdaptiveIntegrator(model)

    whole = fresh()
    run(*whole, range(6))
    first = fresh()
    run(*first, range(3))
    second = fresh()
    for target, source in zip(second, first, strict=True):
        target.load_state_dict(source.state_dict())
    run(*second, range(3, 6))
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_state_of_another_geometry_is_refused():
    _, adapter, _ = one_layer(5, 4, 2, 2)
    state = pair(adapter, geometry="isotropic").state_dict()
    with pytest.raises(ValueError, match="geometry='rowwise' does not fit the state, which was made with 'isotropic'"):
        pair(adapter).load_state_dict(state)


def test_closure():
    _, adapter, _ = one_layer(5, 4, 2, 2)
    optimizer = pair(adapter)

    def closure():
        loss = adapter.delta_weight().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert step_norm(adapter) > 0


@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float32, [10, 1, 0.1]), (torch.float64, [1e3, 1, 1e-2])])
def test_polar_factor(dtype, sizes):
    matrix = torch.zeros(3, 9, 5, dtype=dtype)
    matrix[..., :3] = torch.randn(3, 9, 3, dtype=dtype) * torch.tensor(sizes, dtype=dtype)
    P, sigma, Qh = torch.linalg.svd(matrix[..., :3].double(), full_matrices=False)
    condition = float((sigma[:, 0] / sigma[:, -1]).max())  # by which rounding is magnified
    close(polar_factor(matrix)[..., :3], (P @ Qh).to(dtype), within=condition * rounding(dtype, 9))
    assert torch.count_nonzero(polar_factor(matrix)[..., 3:]) == 0
    assert torch.count_nonzero(polar_factor(torch.zeros(4, 2))) == 0
    assert sigma.min() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (1.0, 0.9)}, "betas="),
        ({"eps": 0.0}, "eps=0.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"geometry": "conic"}, "geometry='conic' must be one of rowwise, isotropic, spectral, entrywise"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    _, adapter, _ = one_layer(5, 4, 2, 2)
    with pytest.raises(ValueError, match=message):
        pair(adapter, **settings)


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_model_and_its_bare_parameters_give_the_same_groups(copied):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    inject_adapters(model, AdapterConfig(target_modules=["0", "1"], modules_to_save=["2"]))
    model = copied(model)
    trained = (p for p in model.parameters() if p.requires_grad)
    groups = [
        [[id(p) for p in group["params"]] for group in RiemannianAdam(params).param_groups]
        for params in (model, model.parameters(), trained)
    ]
    assert groups[0] == groups[1] == groups[2]
    assert groups[0][0] == [id(p) for layer in (model[0], model[1]) for p in (layer.K, layer.L)]


def test_parameters_without_adapters_are_refused_with_the_remedy():
    model = nn.Linear(3, 3)
    for params in (model, model.parameters(), [{"params": list(model.parameters())}]):
        with pytest.raises(ValueError, match=r"pass the model itself, after inject_adapters\(model\)"):
            RiemannianAdam(params)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_how_many_adapters_are_stepped_at_once_changes_nothing(monkeypatch, geometry):
    runs = []
    for cached in (1, 2**18):
        monkeypatch.setattr("geolora_pl.training.stacks._CACHED", cached)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(n, m) for m, n in ((6, 6), (9, 6), (6, 9), (3, 6))))
        adapters = inject_adapters(model, AdapterConfig(init_rank=2, max_rank=5)).values()
        optimizer = RiemannianAdam(model, geometry=geometry)
        for _ in range(3):
            for adapter in adapters:
                give_gradients(adapter)
            optimizer.step()
        runs.append(list(model.parameters()))
    for a, b in zip(*runs, strict=True):
        close(a, b)


class Entries(TorchDispatchMode):
    """Counts the entries of all tensors that are computed with."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.count += sum(t.numel() for t in tree_leaves(args) if isinstance(t, torch.Tensor))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_columns_far_beyond_the_live_rank_cost_nothing(geometry):
    counts = []
    for max_rank in (6, 40):  # of 8 columns with the probes, and of 42
        _, adapter, integrator = one_layer(50, 40, 6, max_rank)
        integrator.close()  # which looks at all columns
        optimizer = pair(adapter, geometry=geometry, weight_decay=0.1)
        give_gradients(adapter)
        optimizer.step()
        with Entries() as entries:
            optimizer.step()
        counts.append(entries.count)
        assert optimizer.state[adapter.K]["exp_avg"].shape == adapter.K.shape
    assert counts[0] == counts[1]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("skipped", [None, 3])
def test_live_columns_alone_and_all_columns_take_the_same_step(monkeypatch, geometry, skipped):
    """While ranks grow and shrink across multiples of 8, and two adapters of one shape have different ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48), nn.Linear(48, 30)).double()
    config = AdapterConfig(init_rank=4, max_rank=48, modules_to_save=["3"], rank_pattern={"2": 12})
    adapters = inject_adapters(model, config).values()
    optimizer = RiemannianAdam(model, lr=0.5, geometry=geometry, weight_decay=0.01)
    integrator = RankAdaptiveIntegrator(model, tau=0.0, adapt_every=2)
    live = []
    for t in range(16):
        integrator.rule = RankRule(tau=0.5 if 8 <= t < 12 else 0.0, adapt_every=2)
        optimizer.zero_grad()
        x = torch.randn(64, 48).double()
        (model(x) - x[:, :30]).square().mean().backward()
        of_all, takes_all = copy.deepcopy((model, optimizer))
        for ours, theirs in zip(model.parameters(), of_all.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.clone()
        if skipped is not None:
            optimizer.leave_out_next_step_if(torch.tensor(float(t == skipped)))
            takes_all.leave_out_next_step_if(torch.tensor(float(t == skipped)))
        optimizer.step()
        with monkeypatch.context() as patch:  # of adapters that it does not know, an optimizer takes all columns
            patch.setattr("geolora_pl.training.stacks.adapter_of", lambda factor: None)
            takes_all.step()
        for ours, theirs in zip(model.parameters(), of_all.parameters(), strict=True):
            close(ours, theirs, within=EXACT)
            assert optimizer.state[ours].keys() == takes_all.state[theirs].keys()
            for key, value in optimizer.state[ours].items():
                close(value, takes_all.state[theirs][key], within=EXACT)
        live.append([computed_columns(adapter.rank, 48, multiple=8) for adapter in adapters])
        integrator.step(optimizer)
    changes = {b - a for before, after in pairwise(live) for a, b in zip(before, after, strict=True)}
    assert min(changes) < 0 < max(changes)
    assert any(first != second for first, second in live)
    assert {8, 16, 48} <= {columns for of_step in live for columns in of_step}


def test_adapters_that_join_by_add_param_group_are_trained_and_retracted():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    first, second = inject_adapters(model, AdapterConfig(target_modules=["0", "1"])).values()
    integrator = RankAdaptiveIntegrator(model)
    optimizer = RiemannianAdam(first.parameters())
    with pytest.raises(ValueError, match="does not hold the factors of the adapter 1"):
        integrator.step(optimizer)
    optimizer.add_param_group({"params": [second.K, second.L], "adapters": True})
    for t in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        assert integrator.step(optimizer)
        assert integrator.total_steps == t + 1
    assert all(adapter.delta_weight().any() for adapter in (first, second))
