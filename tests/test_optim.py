import copy
import pickle

import pytest
import torch
from reference import one_layer, orthonormal, set_point
from torch import nn

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters, parameter_groups
from geolora_pl.optim import polar_factor

GEOMETRIES = ["rowwise", "isotropic", "spectral", "entrywise"]


def pair(adapter, **settings):
    return RiemannianAdam([{"params": [adapter.K, adapter.L], "adapters": True}], **settings)


def give_gradients(adapter, scale=1.0):
    r = adapter.rank
    for factor in (adapter.K, adapter.L):
        factor.grad = torch.zeros_like(factor)
        factor.grad[:, :r] = scale * torch.randn(len(factor), r, dtype=factor.dtype)


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
    assert torch.count_nonzero(adapter.K[:, r:]) == torch.count_nonzero(adapter.L[:, r:]) == 0


def test_isotropic_is_riemannian_adam_on_the_pair():
    """Against the formula of the docstring, in plain scalars and lists."""
    _, adapter, _ = one_layer(7, 5, 2, 3)
    optimizer = pair(adapter, lr=0.1, betas=(0.8, 0.95), eps=1e-3, geometry="isotropic")
    m = torch.zeros(12, 3).double()
    v, point = 0.0, torch.zeros(12, 3).double()
    for t in range(1, 6):
        give_gradients(adapter)
        g = torch.cat([adapter.K.grad, adapter.L.grad])
        m = 0.8 * m + 0.2 * g
        v = 0.95 * v + 0.05 * float((g**2).sum())
        point = point - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)) ** 0.5 + 1e-3)
        optimizer.step()
    torch.testing.assert_close(torch.cat([adapter.K, adapter.L]).detach(), point, rtol=1e-6, atol=1e-8)


def test_rowwise_is_riemannian_adam_on_every_row():
    """Against the formula of the docstring, row by row."""
    _, adapter, _ = one_layer(7, 5, 2, 3)
    optimizer = pair(adapter, lr=0.1, betas=(0.8, 0.95), eps=1e-3)
    m, v, point = torch.zeros(12, 3).double(), [0.0] * 12, torch.zeros(12, 3).double()
    for t in range(1, 6):
        give_gradients(adapter)
        g = torch.cat([adapter.K.grad, adapter.L.grad])
        m = 0.8 * m + 0.2 * g
        for i in range(12):
            v[i] = 0.95 * v[i] + 0.05 * float((g[i] ** 2).sum())
            if float(m[i] @ g[i]) > 0:
                point[i] -= 0.1 / 12**0.5 * (m[i] / (1 - 0.8**t)) / ((v[i] / (1 - 0.95**t)) ** 0.5 + 1e-3)
        optimizer.step()
    torch.testing.assert_close(torch.cat([adapter.K, adapter.L]).detach(), point, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("geometry", "rank"), [("rowwise", 2), ("isotropic", 2), ("entrywise", 4)])
def test_a_momentum_of_low_rank_stays_a_step_of_low_rank_but_entrywise(geometry, rank):
    _, adapter, _ = one_layer(12, 9, 4, 4)
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
        set_point(adapter, U @ rotation, sigma, V @ rotation)
        optimizer = pair(adapter, lr=0.1, geometry=geometry)
        for _ in range(4):
            optimizer.zero_grad()
            (0.5 * (adapter.delta_weight() - target).square().sum()).backward()
            optimizer.step()
            integrator.step(optimizer)
        after.append(adapter.delta_weight().detach())
    torch.testing.assert_close(after[0], after[1], rtol=0, atol=1e-9)


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
    torch.testing.assert_close(models[0][1].weight, models[1][1].weight)
    torch.testing.assert_close(models[0][1].bias, models[1][1].bias)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polar_factor(dtype):
    matrix = torch.zeros(3, 9, 5, dtype=dtype)
    matrix[..., :3] = torch.randn(3, 9, 3, dtype=dtype) * torch.tensor([1e3, 1.0, 1e-2], dtype=dtype)
    P, sigma, Qh = torch.linalg.svd(matrix[..., :3], full_matrices=False)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(polar_factor(matrix)[..., :3], P @ Qh, rtol=0, atol=tolerance)
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
        monkeypatch.setattr("geolora_pl.optim._CACHED", cached)
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
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
