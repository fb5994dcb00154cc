"""What probes gather, and which of it becomes a direction, against dense float64 references."""

import pytest
import torch
from reference import orthonormal, padded, rank_within_tau, tangent_projection
from tolerance import EXACT, close

from geolora_pl.math.decomposition import decompose, orthonormality_defect, without_probes
from geolora_pl.math.probes import augment, directions, new_basis, places, remembered, still_growing, worth_a_rank
from geolora_pl.math.ranks import resolution
from geolora_pl.math.transport import outside_tangent_space

SHAPES = [(20, 15, 3, 5, 2), (15, 20, 4, 4, 1), (12, 9, 0, 3, 2), (30, 40, 6, 8, 4)]  # m, n, r, R and p
every_shape = pytest.mark.parametrize(("m", "n", "r", "R", "p"), SHAPES)
RESOLUTION = resolution(40, 40, torch.float64)


def with_probes(rows, r, R, p):
    """A basis with p probes in front, or as many as there is room for."""
    basis = orthonormal(rows, min(rows, p + r))
    return torch.cat([padded(basis[:, r:], p), padded(basis[:, :r], R)], 1)


def after_one_step(m, n, r, R, p):
    """A gradient, a point, and the K and L that it gives."""
    G, U, V = torch.randn(m, n).double(), with_probes(m, r, R, p), with_probes(n, r, R, p)
    S = torch.zeros(R, R).double()
    S[:r, :r] = torch.randn(r, r)
    live = V[:, p:]
    return G, (U, S, V, G @ V, G.T @ U - live @ live.T @ G.T @ U)


def random_columns(factors):
    """Random numbers for both sides."""
    U, S, V, *_ = factors
    return tuple(torch.randn(len(basis), U.shape[1] - len(S)).double() for basis in (U, V))


def found(factors, kept, random=None):
    """For one adapter: what is kept of the point and the new directions that have room beside it, as columns."""
    U, S, V, *_ = factors
    p, room = U.shape[1] - len(S), min(len(U), len(V)) - kept
    at = augment(*(factor[None] for factor in factors), random or random_columns(factors))
    new = directions(at, p, torch.tensor([kept]))
    columns = min(room, int((new.sigma > 0).sum()) + p)  # those after the random ones are of no use
    (U_kept, V_kept), (U_new, V_new) = (
        ((at.Q_U @ left)[0, :, :c], (at.Q_V @ right)[0, :, :c])
        for left, right, c in ((at.P_U, at.P_V, kept), (new.U, new.V, columns))
    )
    assert not new.sigma[0, columns:].any()
    return U_kept, V_kept, U_new, new.sigma[0, :columns], V_new


def gathered(factors, U_kept, V_kept):
    """What the probes hold outside of the old bases and of the kept ones, as a dense matrix."""
    U, S, V, K, L = factors
    p = U.shape[1] - len(S)
    outside_U, outside_V, outside_V_p, no_kept_U, no_kept_V = (
        torch.eye(len(basis)).double() - basis @ basis.T for basis in (U[:, p:], V[:, p:], V, U_kept, V_kept)
    )
    dense = outside_U @ (K[:, :p] @ V[:, :p].T) @ outside_V + U[:, :p] @ (outside_V_p @ L[:, :p]).T
    return no_kept_U @ dense @ no_kept_V


@every_shape
def test_what_lies_outside_of_the_tangent_space_is_counted_once(m, n, r, R, p):
    """Both K and L of the probes hold ``U_p U_p^T G V_p V_p^T``, and K of the probes what L of the others has."""
    G, (U, _, V, K, L) = after_one_step(m, n, r, R, p)
    K_out, L_out = outside_tangent_space(K[:, :p], L[:, :p], U, V)
    of_probes = K_out @ V[:, :p].T + U[:, :p] @ L_out.T
    close(of_probes, tangent_projection(G, U, V) - tangent_projection(G, U[:, p:], V[:, p:]), within=EXACT)
    everything = of_probes + K[:, p:] @ V[:, p:].T + U[:, p:] @ L[:, p:].T
    close(everything, tangent_projection(G, U, V), within=EXACT)


@every_shape
@pytest.mark.parametrize("probes", [True, False])
def test_an_augmentation_holds_the_triplets_of_the_point_whatever_else_it_holds(m, n, r, R, p, probes):
    _, factors = after_one_step(m, n, r, R, p)
    random = random_columns(factors)
    at = augment(*(factor[None] for factor in factors), random if probes else None)
    step = decompose(*without_probes(*factors), columns=2 * R)
    close(at.sigma[0], step.sigma, within=EXACT)
    U, V = (at.Q_U @ at.P_U)[0], (at.Q_V @ at.P_V)[0]
    close((U * at.sigma[0]) @ V.T, (step.U * step.sigma) @ step.V.T, within=EXACT)
    assert all(orthonormality_defect(basis) < 1e-12 for basis in (U, V, at.Q_U[0], at.Q_V[0]))
    U, _, V, K, L = factors
    if probes:
        close((at.Q_U @ at.R_U)[0, :, 2 * R :], torch.cat([K[:, :p], U[:, :p], random[0]], 1), within=EXACT)
        close((at.Q_V @ at.R_V)[0, :, 2 * R :], torch.cat([V[:, :p], L[:, :p], random[1]], 1), within=EXACT)


@every_shape
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_new_directions_are_the_triplets_of_the_dense_matrix(m, n, r, R, p, kept):
    G, factors = after_one_step(m, n, r, R, p)
    U, _, V, *_ = factors
    U_kept, V_kept, U_new, sigma, V_new = found(factors, kept)
    outside = gathered(factors, U_kept, V_kept)
    if not kept:
        close(outside, tangent_projection(G, U, V) - tangent_projection(G, U[:, p:], V[:, p:]), within=EXACT)
    close(sigma[: 2 * p], torch.linalg.svdvals(outside)[: 2 * p], within=EXACT)
    assert (sigma[: 2 * p] > 0).all()
    assert not sigma[2 * p :].any()
    close((U_new * sigma) @ V_new.T, outside, within=EXACT)


def test_adapters_of_one_shape_find_their_directions_each_by_itself():
    """With other numbers kept, and one of them with nothing gathered."""
    adapters = [after_one_step(20, 15, 3, 5, 2)[1] for _ in range(4)]
    for factor in adapters[2][3:]:
        factor[:, :2] = 0
    random, kept = random_columns(adapters[0]), [0, 3, 2, 5]
    at = augment(*(torch.stack(factor) for factor in zip(*adapters, strict=True)), random)
    new = directions(at, 2, torch.tensor(kept))
    for i, factors in enumerate(adapters):
        _, _, U_new, sigma, V_new = found(factors, kept[i], random)
        columns = len(sigma)
        close(new.sigma[i, :columns], sigma, within=EXACT, beside=torch.ones(1))
        dense = (at.Q_U[i] @ new.U[i] * new.sigma[i]) @ (at.Q_V[i] @ new.V[i]).T
        close(dense, (U_new * sigma) @ V_new.T, within=EXACT, beside=torch.ones(1))
        for Q, P, N in ((at.Q_U, at.P_U, new.U), (at.Q_V, at.P_V, new.V)):
            assert orthonormality_defect(Q[i] @ torch.cat([P[i, :, : kept[i]], N[i, :, :columns]], 1)) < 1e-12


def degenerate(kind, factors):
    """What probes may hold that makes no directions, or fewer than there are columns."""
    U, S, V, K, L = (factor.clone() for factor in factors)
    p = U.shape[1] - len(S)
    if kind == "zero in K":
        K[:, :p] = 0
    elif kind == "zero":
        K[:, :p], L[:, :p] = 0, 0
    elif kind == "dependent":  # as with the gradient of one sample
        K[:, :p], L[:, :p] = K[:, :1], L[:, :1]
    elif kind == "in the span of the step":
        K[:, :p], L[:, :p] = K[:, p : p + 1], L[:, p : p + 1]
    elif kind == "badly scaled":
        scales = torch.logspace(0, -30, p).double()
        K[:, :p], L[:, :p] = K[:, :p] * scales, L[:, :p] * scales
    elif kind == "large":
        K[:, :p] *= 1e12
    elif kind == "probes inside of what is kept":  # after a step in their direction
        K[:, p : 2 * p] = U[:, :p][:, : K.shape[1] - p] * 1e3
        L[:, p : 2 * p] = V[:, :p][:, : L.shape[1] - p] * 1e3
    elif kind == "no probes":
        U[:, :p], V[:, :p], K[:, :p], L[:, :p] = 0, 0, 0, 0
    elif kind == "nothing":
        U, S, V, K, L = (torch.zeros_like(factor) for factor in factors)
    return U, S, V, K, L


TIGHT = [(40, 30, 4, 5), (30, 40, 5, 5), (9, 12, 2, 5), (6, 5, 2, 2), (5, 20, 0, 5), (3, 3, 1, 3), (1, 5, 1, 1)]
KINDS = ["regular", "zero in K", "zero", "dependent", "in the span of the step", "badly scaled", "large"]
KINDS += ["probes inside of what is kept", "no probes", "nothing"]


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_orthonormal_and_outside_of_what_is_kept_also_where_there_is_hardly_room(p, kind):
    for m, n, r, R in TIGHT:
        factors = degenerate(kind, after_one_step(m, n, r, R, p)[1])
        for kept in range(min(2 * R, m, n) + 1):
            U_kept, V_kept, U_new, sigma, V_new = found(factors, kept)
            for old, new in ((U_kept, U_new), (V_kept, V_new)):
                assert new.any(0).all()
                assert orthonormality_defect(torch.cat([old, new], 1)) < 1e-12
            dense = gathered(factors, U_kept, V_kept)
            size = max(factor.norm() for factor in factors)
            close((U_new * sigma) @ V_new.T, dense, within=1e-4, beside=size)  # less counts as unknown
            if kind in ("zero", "no probes", "nothing"):
                assert not sigma.any()


@pytest.mark.parametrize("kind", ["regular", "zero", "no probes", "nothing"])
@pytest.mark.parametrize(("m", "n"), [(40, 30), (5, 30), (30, 5)])
def test_directions_of_which_nothing_is_known_are_random(m, n, kind):
    """Also where there is less room than for all of them."""
    factors = degenerate(kind, after_one_step(m, n, 1, 3, 2)[1])
    first, again, other = (random_columns(factors) for _ in range(3))
    again = tuple(numbers.clone() for numbers in first)
    seen = []
    for random in (first, again, other):
        *_, U_new, sigma, V_new = found(factors, 1, random)
        known = int((sigma > 0).sum())
        seen.append([basis[:, known : known + 2] @ basis[:, known : known + 2].T for basis in (U_new, V_new)])
    for a, b, c in zip(*seen, strict=True):
        close(a, b, within=EXACT)
        if a.any() and len(a) > 5:  # in a smaller space they are what is left
            assert (a - c).norm() > 0.1


def test_random_directions_are_in_the_span_of_the_random_numbers_and_of_what_is_left_out():
    """Where nothing else is gathered, so that they see what is new."""
    factors = degenerate("zero", after_one_step(40, 30, 3, 5, 2)[1])
    random = random_columns(factors)
    U_kept, V_kept, U_new, _, V_new = found(factors, 3, random)
    for kept, new, numbers, old_probes in (
        (U_kept, U_new, random[0], factors[0]),
        (V_kept, V_new, random[1], factors[2]),
    ):
        span = torch.linalg.qr(torch.cat([kept, old_probes[:, :2], numbers], 1)).Q
        close(span @ (span.T @ new[:, :2]), new[:, :2], within=EXACT)
        assert (numbers.T @ new[:, :2]).norm() > 1


@pytest.mark.parametrize("tau", [0.0, 0.05, 0.3, 0.8])
def test_a_rank_is_due_to_what_tau_would_keep_among_all(tau):
    for _ in range(50):
        sigma = torch.rand(6).double().pow(3).sort(descending=True).values
        new = torch.rand(4).double().pow(3).sort(descending=True).values
        both = torch.cat([sigma, new]).sort(descending=True).values
        least = both[rank_within_tau(both, tau, len(both)) - 1]
        assert worth_a_rank(sigma, new, tau, resolution(9, 9, torch.float64)).tolist() == (new >= least).tolist()
    nothing = torch.zeros(4).double()
    assert not worth_a_rank(sigma, nothing, tau, 1e-12).any()
    assert not worth_a_rank(nothing, nothing, tau, 1e-12).any()


def test_what_still_grows_stays_and_only_in_order():
    for _ in range(100):
        sigma = torch.rand(6).double().pow(3).sort(descending=True).values
        before = torch.rand(5).double().pow(3).sort(descending=True).values
        ranks, present = int(torch.randint(0, 6, ())), int(torch.randint(0, 6, ()))
        expected = ranks
        while expected < present and sigma[expected] / sigma.norm() > 1.25 * before[expected] / before.norm():
            expected += 1
        found = still_growing(sigma[None], before[None], torch.tensor([ranks]), torch.tensor([present]))
        assert found.tolist() == [expected]


def test_a_direction_that_grows_steadily_stays_four_times_and_one_that_stands_still_once():
    for increments, stays in (([1.0] * 6, 4), ([1.0, 0, 0, 0, 0, 0], 1)):
        sizes = torch.tensor([0.0, *increments]).cumsum(0).double()
        lived = 0
        while True:
            before, now = (torch.tensor([[1e3, sizes[t], 0.0]]).double() for t in (lived, lived + 1))
            if still_growing(now, before, torch.tensor([1]), torch.tensor([2])) == 1:
                break
            lived += 1
        assert lived == stays


@every_shape
def test_probes_remember_their_part_of_what_was_gathered(m, n, r, R, p):
    """Left and right vectors stay paired whatever their signs: a candidate keeps 0.8 of its triplet."""
    _, factors = after_one_step(m, n, r, R, p)
    at = augment(*(factor[None] for factor in factors), random_columns(factors))
    room = min(m, n) - 1
    new = directions(at, p, torch.tensor([1]))
    k, in_line = at.sigma.shape[1], int((new.sigma > 0).sum())
    for admitted in range(min(2 * p, R - 1) + 1):
        of = [torch.tensor([x]) for x in (1, admitted, in_line, room)]
        source, used = places(*of, probes=p, columns=k, rank=R)
        U, V = (new_basis(Q, P, N, source, used)[0] for Q, P, N in ((at.Q_U, at.P_U, new.U), (at.Q_V, at.P_V, new.V)))
        (known,) = remembered(new.sigma, source[:, :p], used[:, :p], k)
        U_kept, V_kept = (at.Q_U @ at.P_U)[0, :, :1], (at.Q_V @ at.P_V)[0, :, :1]
        P, sigma, Qh = torch.linalg.svd(gathered(factors, U_kept, V_kept))
        candidates = range(admitted, min(admitted + (p + 1) // 2, in_line))
        expected = sum((0.8 * sigma[i] * P[:, [i]] @ Qh[[i]] for i in candidates), torch.zeros(m, n).double())
        close((U[:, :p] * known) @ V[:, :p].T, expected, within=EXACT, beside=sigma)
        assert known[len(candidates) :].tolist() == [0.0] * (p - len(candidates))


def expected_places(kept, admitted, in_line, room, p, columns, rank):
    """One column after the other; ``None`` for a column that is not used."""
    directions = list(range(columns, columns + min(room, 3 * p)))
    left, known = directions[admitted:], (p + 1) // 2
    probes, left = left[:known], left[known:]
    random = left[max(0, in_line - admitted - known) :]
    if len(random) < p - known:
        random = left[max(0, len(left) - (p - known)) :]
    probes = (probes + random)[:p] if len(probes) == known else probes
    probes = probes + [None] * (p - len(probes))
    return probes + list(range(kept)) + directions[:admitted] + [None] * (rank - kept - admitted)


@pytest.mark.parametrize("p", [0, 1, 2, 3, 4])
def test_the_places_are_those_of_the_probes_then_what_is_kept_then_what_is_admitted(p):
    """Also where the budget has left less than had been offered, and so more places than directions."""
    columns, rank = 8, 6
    cases = [
        (kept, admitted, in_line, room)
        for kept in range(rank + 1)
        for room in range(15)
        for in_line in range(min(room, 2 * p) + 1)
        for admitted in range(min(in_line, rank - kept) + 1)
    ]
    source, used = places(*torch.tensor(cases).T, probes=p, columns=columns, rank=rank)
    found = torch.where(used, source, -1).tolist()
    for case, of_one in zip(cases, found, strict=True):
        assert [None if i < 0 else i for i in of_one] == expected_places(*case, p, columns, rank)
        directions = [i for i in of_one[:p] if i >= 0]
        assert len(directions) == min(p, min(case[3], 3 * p) - case[1])  # no place is left empty that could be used
        assert len(set(of_one) - {-1}) == sum(i >= 0 for i in of_one)


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_basis_is_orthonormal_whatever_is_kept_and_admitted(p, kind):
    """With fewer directions kept than when the new ones were chosen, as the budget asks, as well."""
    for m, n, r, R in ((40, 30, 4, 8), (9, 12, 3, 9), (5, 4, 2, 4), (2, 2, 0, 2)):
        factors = degenerate(kind, after_one_step(m, n, r, R, p)[1])
        at = augment(*(factor[None] for factor in factors), random_columns(factors))
        columns = at.sigma.shape[1]
        for before in range(min(R, columns) + 1):
            room = min(m, n) - before
            new = directions(at, p, torch.tensor([before]))
            in_line = int((new.sigma > 0).sum())
            for kept in range(before + 1):
                for admitted in {0, min(1, in_line, R - kept), min(in_line, R - kept)}:
                    of = (torch.tensor([x]) for x in (kept, admitted, in_line, room))
                    source, used = places(*of, probes=p, columns=columns, rank=R)
                    for Q, P, N in ((at.Q_U, at.P_U, new.U), (at.Q_V, at.P_V, new.V)):
                        (basis,) = new_basis(Q, P, N, source, used)
                        assert basis.shape == (Q.shape[1], p + R)
                        assert orthonormality_defect(basis) < 1e-12
                        assert basis.any(0).tolist() == used[0].tolist()
                        close(basis[:, p : p + kept], (Q @ P)[0, :, :kept], within=EXACT)
                        close(basis[:, p + kept : p + kept + admitted], (Q @ N)[0, :, :admitted], within=EXACT)


def test_without_probes_the_basis_is_what_is_kept():
    _, factors = after_one_step(9, 12, 2, 6, 0)
    at = augment(*(factor[None] for factor in factors), None)
    new = directions(at, 0, torch.tensor([3]))
    of = (torch.tensor([x]) for x in (3, 0, 0, 6))
    source, used = places(*of, probes=0, columns=at.sigma.shape[1], rank=6)
    step = decompose(*factors)
    U, V = (new_basis(Q, P, N, source, used)[0] for Q, P, N in ((at.Q_U, at.P_U, new.U), (at.Q_V, at.P_V, new.V)))
    assert not U[:, 3:].any()
    close((U[:, :3] * step.sigma[:3]) @ V[:, :3].T, (step.U[:, :3] * step.sigma[:3]) @ step.V[:, :3].T, within=EXACT)
    assert remembered(new.sigma, source[:, :0], used[:, :0], at.sigma.shape[1]).shape == (1, 0)
