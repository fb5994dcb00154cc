"""What the math promises for every shape, rank and scale, held against the float64 oracle."""

import math
import warnings
from itertools import chain

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import bought_one_by_one, orthonormal, padded, tangent_projection, truncate
from torch import nn

from geolora_pl import AdapterConfig, GeoLoRAWarning, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters
from geolora_pl.adapters.base import FACTORS
from geolora_pl.math import decomposition, transport
from geolora_pl.math import ranks as rank_rules

SCALES = st.sampled_from([0.0, 1e-30, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e30])
DTYPES = st.sampled_from([torch.float32, torch.float64])
PROBES = st.sampled_from([0, 1, 2])
TAUS = st.sampled_from([0.0, 1e-7, 1e-3, 0.05, 0.2, 0.7, 0.99])


def dense(U, S, V, K, L):
    U, S, V, K, L = (factor.double() for factor in (U, S, V, K, L))
    return U @ S @ V.mT + K @ V.mT + U @ L.mT


@st.composite
def points(draw, m=None, n=None):
    """A point with its pending step: any shape from 1 x 1, live rank from 0, scale of each factor and column.

    The columns of K and L may be zero, dependent, or in the span of the bases.
    """
    torch.manual_seed(draw(st.integers(0, 2**31)))
    m = m or draw(st.sampled_from([1, 2, 3, 7, 16, 80]))
    n = n or draw(st.sampled_from([1, 2, 3, 7, 16, 80]))
    R = draw(st.integers(1, min(m, n)))
    r = draw(st.integers(0, R))
    dtype = draw(DTYPES)
    U, V = padded(orthonormal(m, r), R), padded(orthonormal(n, r), R)
    S, K, L = (torch.zeros(rows, R, dtype=torch.float64) for rows in (R, m, n))
    S[:r, :r] = torch.diag(torch.rand(r, dtype=torch.float64).sort(descending=True).values) * draw(SCALES)
    for increment, basis in ((K, U), (L, V)):
        scale, kind = draw(SCALES), draw(st.sampled_from(["free", "in the span", "dependent", "badly scaled"]))
        columns = torch.randn(len(basis), r, dtype=torch.float64)
        if kind == "in the span":
            columns = basis[:, :r] @ torch.randn(r, r, dtype=torch.float64)
        elif kind == "dependent":
            columns = columns[:, :1] * torch.randn(r, dtype=torch.float64)
        elif kind == "badly scaled":
            columns = columns * torch.logspace(0, -30, r, dtype=torch.float64)
        increment[:, :r] = columns * scale
    return tuple(factor.to(dtype) for factor in (U, S, V, K, L))


def rounding(m, n, dtype, W):
    """What a retraction may be off by, in the Frobenius norm."""
    norm = float(torch.linalg.matrix_norm(W)) + torch.finfo(dtype).tiny
    return 4 * rank_rules.resolution(m, n, dtype) * math.sqrt(min(m, n)) * norm


@given(points())
def test_the_decomposition_is_that_of_the_dense_sum(point):
    U, _, V, *_ = point
    (m, R), n, dtype = U.shape, len(V), U.dtype
    W = dense(*point)
    step = decomposition.decompose(*point)
    for factor in step:
        assert factor.isfinite().all()
    torch.testing.assert_close(
        step.sigma.double(), torch.linalg.svdvals(W)[: min(m, n, 2 * R)], rtol=0, atol=rounding(m, n, dtype, W)
    )
    assert (step.sigma.diff() <= 0).all()
    for basis in (step.U, step.V):
        assert decomposition.orthonormality_defect(basis) <= 4 * R * rank_rules.resolution(m, n, dtype)


@given(points(), st.data())
def test_a_truncation_is_the_best_there_is_at_its_rank(point, data):
    U, _, V, *_ = point
    (m, R), n, dtype = U.shape, len(V), U.dtype
    W = dense(*point)
    rank = data.draw(st.integers(0, R))
    U, S, V = truncate(decomposition.decompose(*point), torch.tensor(rank))
    error = torch.linalg.matrix_norm(W - U.double() @ S.double() @ V.double().mT)
    tail = torch.linalg.svdvals(W)[rank:].norm()
    assert abs(error - tail) <= rounding(m, n, dtype, W)
    for unused in (U[:, rank:], V[:, rank:], S[rank:], S[:, rank:]):
        assert torch.count_nonzero(unused) == 0


@given(points(), st.data())
def test_a_second_truncation_to_the_same_rank_changes_nothing(point, data):
    U, _, V, K, L = point
    (m, R), n = U.shape, len(V)
    rank = torch.tensor(data.draw(st.integers(0, R)))
    U, S, V = truncate(decomposition.decompose(*point), rank)
    again = truncate(decomposition.decompose(U, S, V, 0 * K, 0 * L), rank)
    zero = torch.zeros(())
    W = dense(U, S, V, zero.expand_as(K), zero.expand_as(L))
    U2, S2, V2 = (factor.double() for factor in again)
    torch.testing.assert_close(U2 @ S2 @ V2.mT, W, rtol=0, atol=rounding(m, n, U.dtype, W))


SIGMAS = st.one_of(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e30)), min_size=1, max_size=12),
    st.lists(st.floats(0.1, 1.0), min_size=1, max_size=12),  # in which tau decides
).map(lambda values: sorted(values, reverse=True))


@given(SIGMAS, TAUS, DTYPES, st.data())
def test_the_rank_by_tau_is_the_least_that_keeps_to_it(sigma, tau, dtype, data):
    values = torch.tensor(sigma, dtype=dtype)
    cap = data.draw(st.integers(0, len(sigma)))
    floor = data.draw(st.integers(0, cap))
    resolution = rank_rules.resolution(80, 80, dtype)
    rank = int(rank_rules.ranks_by_tau(values, tau, resolution, floor, cap))
    assert floor <= rank <= cap
    exact = values.double() / max(float(values[0]), 1e-300)  # squares of 1e-30 are not lost beside 1e30 either
    if rank < cap:  # nothing bound it: the dropped tail obeys tau, or is rounding
        assert exact[rank:].norm() <= tau * exact.norm() * (1 + 1e-12) + resolution * math.sqrt(len(sigma))
    if rank > floor:  # and one less would not do
        assert exact[rank - 1 :].norm() > tau * exact.norm() * (1 - 1e-12)
        assert exact[rank - 1] > resolution


@st.composite
def groups(draw):
    """Adapters for which a rank costs the same: the cost, singular values, most ranks and floors. Many values tie."""
    k = draw(st.integers(1, 8))
    value = draw(st.sampled_from([st.floats(1e-30, 1e30), st.sampled_from([0.0, 0.5, 1.0, 2.0])]))
    sigmas, ranks, floors = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        sigmas.append(sorted(draw(st.lists(value, min_size=k, max_size=k)), reverse=True))
        ranks.append(draw(st.integers(0, k)))
        floors.append(draw(st.integers(0, ranks[-1])))
    return draw(st.integers(1, 200)), sigmas, ranks, floors


@given(st.lists(groups(), min_size=1, max_size=5), st.integers(0, 4000))
def test_the_budget_buys_what_one_purchase_after_the_other_would(made, left):
    costs, sigmas, ranks, floors = zip(*made, strict=True)
    floors_cost = sum(cost * sum(floor) for cost, floor in zip(costs, floors, strict=True))
    chosen = rank_rules.ranks_by_budget(
        [torch.tensor(s, dtype=torch.float64) for s in sigmas],
        [torch.tensor(r) for r in ranks],
        costs,
        floors_cost + left,
        [torch.tensor(f) for f in floors],
    )
    of_each = [cost for cost, rank in zip(costs, ranks, strict=True) for _ in rank]
    sigmas, ranks, floors = (list(chain(*of_groups)) for of_groups in (sigmas, ranks, floors))
    one_by_one = bought_one_by_one(sigmas, ranks, of_each, floors_cost + left, floors)
    chosen = torch.cat(chosen).tolist()
    assert chosen == one_by_one
    spare = floors_cost + left - sum(rank * cost for rank, cost in zip(chosen, of_each, strict=True))
    assert spare >= 0
    for rank, floor, most, cost in zip(chosen, floors, ranks, of_each, strict=True):
        assert floor <= rank <= most
        assert rank == most or cost > spare


def put(layer, U, S, V, K, L):
    """Put an adapter at a point with its pending step, with probes that remember something, and maybe saw a step."""
    p = layer.probes
    r = int((U != 0).any(0).sum())
    room = max(0, min(p, len(U) - r, len(V) - r))
    with torch.no_grad():
        for name, value in zip(FACTORS, (U, S, V, K, L), strict=True):
            factor = getattr(layer, name).zero_()
            columns = factor if name == "S" else factor[:, p:]
            columns[: value.shape[0], : value.shape[1]] = value
        for name, live in (("U", U), ("V", V)):
            both = torch.cat([live[:, :r].double(), torch.randn(len(live), room, dtype=torch.float64)], 1)
            getattr(layer, name)[:, :room] = torch.linalg.qr(both).Q[:, r:].to(U.dtype)
        layer.K[:, :room] = layer.U[:, :room] @ torch.randn(room, room, dtype=layer.U.dtype)
        if K.any() or L.any():
            layer.K[:, :room] += torch.randn(len(U), room, dtype=U.dtype)
            layer.L[:, :room] = torch.randn(len(V), room, dtype=U.dtype)
    layer.read_rank()


@st.composite
def models(draw):
    """Up to three adapters, of one shape or of several, with pending steps; some have nothing pending."""
    shapes = draw(st.lists(st.sampled_from([(1, 1), (6, 4), (4, 6), (12, 12)]), min_size=1, max_size=3))
    of_layer = [draw(points(m, n)) for m, n in shapes]
    dtype = of_layer[0][0].dtype
    model = nn.Sequential(*(nn.Linear(n, m, dtype=dtype) for m, n in shapes))
    adapters = inject_adapters(model, AdapterConfig(init_rank=1, max_rank=12, probes=draw(PROBES)))
    for layer, (U, S, V, K, L) in zip(adapters.values(), of_layer, strict=True):
        quiet = draw(st.booleans())
        put(layer, U, S, V, *((0 * K, 0 * L) if quiet else (K, L)))
    return model, adapters


def of_the_point(layer):
    return decomposition.without_probes(*(getattr(layer, name).detach() for name in FACTORS))


def as_it_is(layer):
    """The dense update, the rank, whether anything is pending, and the state."""
    U, S, V, K, L = of_the_point(layer)
    pending = bool(K.any() or L.any() or (not layer.rank and layer.K.any()))
    return dense(U, S, V, K, L), layer.rank, pending, {key: v.clone() for key, v in layer.state_dict().items()}


@given(models(), TAUS, st.one_of(st.none(), st.integers(1, 400)), st.integers(0, 12), st.booleans(), st.booleans())
def test_an_adaptation_keeps_to_tau_budget_and_floors(made, tau, budget, min_rank, rank_changes, last):
    """Be it one in the middle of a run, which takes in what the probes have found, or the last one."""
    model, adapters = made
    min_rank = min(min_rank, max(layer.max_rank for layer in adapters.values()))
    costs = {name: layer.in_features + layer.out_features for name, layer in adapters.items()}
    floors = {name: min(min_rank, layer.max_rank) for name, layer in adapters.items()}
    if budget is not None and sum(floors[name] * costs[name] for name in adapters) > budget:
        with pytest.raises(ValueError, match="below the floor"):
            RankAdaptiveIntegrator(model, tau, budget, min_rank)
        return
    integrator = RankAdaptiveIntegrator(model, tau, budget, min_rank)
    integrator.rank_changes = rank_changes
    before = {name: as_it_is(layer) for name, layer in adapters.items()}
    if last:
        integrator.retract()
    elif not integrator.step(torch.optim.SGD([p for layer in adapters.values() for p in (layer.K, layer.L)], lr=1.0)):
        assert all(torch.equal(v, before[n][3][k]) for n in adapters for k, v in adapters[n].state_dict().items())
        return
    left = math.inf if budget is None else budget - integrator.adapter_parameters()
    assert left >= 0
    assert 0 <= integrator.truncation_error <= 1 + 1e-9
    for name, layer in adapters.items():
        W, rank_before, pending, state = before[name]
        m, n = W.shape
        U, _, V, K, _ = of_the_point(layer)
        assert not K.any()
        assert not layer.L.any()
        assert layer.rank == int((U != 0).any(0).sum()) == int((V != 0).any(0).sum())
        if not pending and layer.rank == rank_before:
            assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
            continue
        slack = rounding(m, n, layer.U.dtype, W)
        error = torch.linalg.matrix_norm(W - layer.delta_weight().double())
        kept = int((layer.S.diagonal() != 0).sum())  # and the others are new
        assert abs(error - torch.linalg.svdvals(W)[kept:].norm()) <= slack
        assert not (last and layer.U[:, : layer.probes].any())
        assert not (last and layer.K.any())
        for basis in (layer.U, layer.V):
            assert decomposition.orthonormality_defect(basis.detach()) <= 4 * 12 * rank_rules.resolution(
                m, n, basis.dtype
            )
        bound = layer.rank == layer.max_rank or costs[name] > left
        if rank_changes and pending and not bound:
            assert layer.rank >= floors[name]
            assert error <= tau * torch.linalg.matrix_norm(W) + slack
        if not rank_changes and left == math.inf:
            assert layer.rank == rank_before


@given(points(), TAUS, PROBES)
def test_an_adaptation_with_nothing_pending_changes_no_bit(point, tau, probes):
    U, S, V, K, L = point
    assume(U.any() or not probes)  # at rank 0 what the probes have gathered is pending
    (m, R), n = U.shape, len(V)
    model = nn.Sequential(nn.Linear(n, m, dtype=U.dtype))
    (layer,) = inject_adapters(model, AdapterConfig(init_rank=1, max_rank=R, probes=probes)).values()
    put(layer, U, S, V, 0 * K, 0 * L)
    optimizer = torch.optim.AdamW([layer.K, layer.L])
    for factor in (layer.K, layer.L):
        optimizer.state[factor] = {"exp_avg": torch.randn_like(factor), "exp_avg_sq": torch.rand_like(factor)}
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    moments = [{key: value.clone() for key, value in optimizer.state[f].items()} for f in (layer.K, layer.L)]
    rank = layer.rank
    RankAdaptiveIntegrator(model, tau=tau).retract(optimizer)
    assert layer.rank == rank
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    for factor, kept in zip((layer.K, layer.L), moments, strict=True):
        assert all(torch.equal(value, kept[key]) for key, value in optimizer.state[factor].items())


@st.composite
def moves(draw):
    """Old and new bases of any ranks, sharing some directions, and the coordinates of a tangent vector."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    m, n = (draw(st.sampled_from([1, 2, 3, 7, 16, 80])) for _ in range(2))
    R = draw(st.integers(1, min(m, n)))
    r, r_new, shared = (draw(st.integers(0, R)) for _ in range(3))
    dtype, scale = draw(DTYPES), draw(SCALES)
    bases = []
    for rows in (m, n):
        old = orthonormal(rows, r)
        both = torch.cat([old[:, : min(shared, r)], torch.randn(rows, R, dtype=torch.float64)], 1)
        bases += [padded(old, R), padded(torch.linalg.qr(both).Q[:, :r_new], R)]
    U, U_new, V, V_new = (basis.to(dtype) for basis in bases)
    K, L = (torch.zeros(rows, R, dtype=dtype) for rows in (m, n))
    K[:, :r], L[:, :r] = (scale * torch.randn(rows, r, dtype=dtype) for rows in (m, n))
    return K, L, U, V, U_new, V_new


@given(moves(), st.floats(-3, 0))
def test_transport_is_the_nearest_tangent_vector_there_is(move, exponent):
    K, L, U, V, U_new, V_new = move
    new_K, new_L = transport.transport_first_moment(*move)
    U, V, U_new, V_new = (basis.double() for basis in (U, V, U_new, V_new))
    xi = K.double() @ V.mT + U @ L.double().mT
    moved = new_K.double() @ V_new.mT + U_new @ new_L.double().mT
    norm = float(torch.linalg.matrix_norm(K.double()) + torch.linalg.matrix_norm(L.double()))
    slack = 8 * rank_rules.resolution(len(K), len(L), K.dtype) * norm
    torch.testing.assert_close(moved, tangent_projection(xi, U_new, V_new), rtol=0, atol=slack)
    assert (V_new.mT @ new_L.double()).abs().max() <= slack
    for moment, basis in ((new_K, V_new), (new_L, U_new)):  # unused columns stay zero
        assert not moment[:, (basis == 0).all(0)].any()
    for _ in range(4):
        other = tangent_projection(torch.randn_like(xi), U_new, V_new) * norm * 10**exponent
        assert torch.linalg.matrix_norm(xi - moved) <= torch.linalg.matrix_norm(xi - moved - other) + slack


@given(moves())
def test_second_moments_stay_non_negative_and_zero_in_unused_columns(move):
    K, _, _, V, _, V_new = move
    v = K.abs() * (torch.arange(K.shape[1]) % 2)  # of any scale from 1e-30 to 1e30, and zero in live columns, too
    moved = transport.transport_second_moment(v, V, V_new)
    assert moved.isfinite().all()
    assert (moved >= 0).all()
    assert not moved[:, (V_new == 0).all(0)].any()
    if (V != 0).any() and v.any():
        most = v.sum(1, keepdim=True).double()
        assert (moved.double() <= most * (1 + 1e-4)).all()  # no direction gets more than all had together


@given(st.floats(15, 38), DTYPES, st.booleans())
def test_a_gradient_of_any_size_breaks_nothing(exponent, dtype, adamw):
    """Either the step is taken or it is skipped whole; a square that overflows would stay in the second moments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, dtype=dtype))
    inject_adapters(model)
    integrator = RankAdaptiveIntegrator(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if adamw else RiemannianAdam(model)
    x = torch.randn(4, 6, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GeoLoRAWarning)
        for step in range(4):
            optimizer.zero_grad()
            (model(x).square().mean() * (10**exponent if step == 1 else 1)).backward()
            optimizer.step()
            integrator.step(optimizer)
            assert model(x).isfinite().all()
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())
