"""What probes gather, and which of it becomes a direction, against dense float64 references."""

import pytest
import torch
from reference import orthonormal, padded, rank_within_tau, tangent_projection
from tolerance import EXACT, close

from geolora_pl.math.decomposition import orthonormality_defect
from geolora_pl.math.probes import candidates, new_basis, remembered, still_growing, worth_a_rank
from geolora_pl.math.ranks import resolution
from geolora_pl.math.transport import outside_tangent_space

SHAPES = [(20, 15, 3, 5, 2), (15, 20, 4, 4, 1), (12, 9, 0, 3, 2), (30, 40, 6, 8, 3)]  # m, n, r, R and p
every_shape = pytest.mark.parametrize(("m", "n", "r", "R", "p"), SHAPES)


def with_probes(rows, r, R, p):
    return padded(orthonormal(rows, p + r), p + R)


def after_one_step(m, n, r, R, p):
    """A gradient, bases, and the K and L that it gives."""
    G, U, V = torch.randn(m, n).double(), with_probes(m, r, R, p), with_probes(n, r, R, p)
    live = V[:, p:]
    return G, U, V, G @ V, G.T @ U - live @ live.T @ G.T @ U


@every_shape
def test_what_lies_outside_of_the_tangent_space_is_counted_once(m, n, r, R, p):
    """Both K and L of the probes hold ``U_p U_p^T G V_p V_p^T``, and K of the probes what L of the others has."""
    G, U, V, K, L = after_one_step(m, n, r, R, p)
    K_out, L_out = outside_tangent_space(K, L, U, V, p)
    found = K_out[:, :p] @ V[:, :p].T + U[:, :p] @ L_out[:, :p].T
    close(found, tangent_projection(G, U, V) - tangent_projection(G, U[:, p:], V[:, p:]), within=EXACT)
    assert torch.equal(K_out[:, p:], K[:, p:])
    assert torch.equal(L_out[:, p:], L[:, p:])
    everything = K_out @ V.T + U @ L_out.T
    close(everything, tangent_projection(G, U, V), within=EXACT)


@every_shape
def test_candidates_are_the_triplets_of_the_dense_matrix(m, n, r, R, p):
    G, U, V, K, L = after_one_step(m, n, r, R, p)
    U_kept, V_kept = padded(orthonormal(m, 2), 5), padded(orthonormal(n, 2), 5)
    outside = tangent_projection(G, U, V) - tangent_projection(G, U[:, p:], V[:, p:])
    outside = outside - U_kept @ U_kept.T @ outside
    outside = outside - outside @ V_kept @ V_kept.T
    new = candidates(U, V, K, L, p, U_kept, V_kept)
    close(new.sigma, torch.linalg.svdvals(outside)[: 2 * p], within=EXACT)
    close((new.U * new.sigma) @ new.V.T, outside, within=EXACT)
    batch = candidates(*(torch.stack([x, 2 * x]) for x in (U, V)), *(torch.stack([x, x]) for x in (K, L)), p,
                       *(torch.stack([x, x]) for x in (U_kept, V_kept)))  # fmt: skip
    close(batch.sigma[0], new.sigma, within=EXACT)


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
def test_what_probes_remember_is_their_part_of_the_candidates_whatever_their_signs(m, n, r, R, p):
    _, U, V, K, L = after_one_step(m, n, r, R, p)
    new = candidates(U, V, K, L, p, U[:, p:], V[:, p:])
    U_p, V_p = new.U[:, :p].clone(), orthonormal(n, p)
    V_p[:, 0] = new.V[:, 0]
    V_p = torch.linalg.qr(V_p).Q
    dense = (new.U * new.sigma) @ new.V.T
    for signs in (torch.ones(p), 1 - 2.0 * (torch.arange(p) % 2 == 0)):
        E = remembered(new, U_p * signs, V_p * signs.flip(0))
        assert E.shape == (p, p)
        memory = (U_p * signs) @ E @ (V_p * signs.flip(0)).T
        close(memory, 0.8 * U_p @ U_p.T @ dense @ V_p @ V_p.T, within=EXACT)
    close(new.U[:, 0] @ memory @ new.V[:, 0], 0.8 * new.sigma[0], within=EXACT)


def made(kept, ranks, new, admitted, p, columns, room):
    """One basis, and that it is orthonormal."""
    gaussian = torch.randn(1, len(kept), 3 * p).double()
    (basis,) = new_basis(
        kept[None], torch.tensor([ranks]), new[None], torch.tensor([admitted]), gaussian, columns, room
    )
    assert basis.shape == (len(kept), p + columns)
    assert orthonormality_defect(basis) < 1e-12
    c = min(columns, kept.shape[1])
    assert torch.equal(basis[:, p : p + ranks], kept[:, :ranks])
    used = (basis != 0).any(0)
    assert used[p:].tolist() == [j < ranks + admitted for j in range(columns)]
    assert int(used[:p].sum()) == min(p, room - ranks - admitted)
    assert c >= ranks
    return basis


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize(("m", "ranks"), [(40, 5), (40, 0), (9, 4), (9, 7), (5, 4), (4, 4), (2, 0), (1, 0), (1, 1)])
def test_a_new_basis_is_orthonormal_also_where_there_is_hardly_room(m, ranks, p):
    kept = padded(orthonormal(m, ranks), m)
    new = torch.linalg.qr(torch.cat([kept[:, :ranks], torch.randn(m, 2 * p).double()], 1)).Q[:, ranks:]
    if ranks == m:  # as the singular vectors of zero
        new = torch.linalg.qr(torch.randn(m, min(m, 2 * p)).double()).Q
    for admitted in range(min(2 * p, m - ranks) + 1):
        basis = made(kept, ranks, new, admitted, p, columns=m, room=m)
        taken = basis[:, p + ranks : p + ranks + admitted]
        close(taken @ (taken.T @ new[:, :admitted]), new[:, :admitted], within=EXACT)
        if admitted < min(m - ranks, 2 * p):  # the next in line is a probe
            first = basis[:, :p] @ (basis[:, :p].T @ new[:, admitted])
            close(first, new[:, admitted], within=EXACT)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_the_room_is_that_of_the_smaller_side(p):
    kept = padded(orthonormal(30, 4), 6)
    new = torch.linalg.qr(torch.cat([kept[:, :4], torch.randn(30, 2 * p).double()], 1)).Q[:, 4:]
    made(kept, 4, new, 1, p, columns=6, room=6)
    made(kept, 4, new, 0, p, columns=6, room=4)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["zero", "in the span", "half in the span", "dependent outside of the span"])
@pytest.mark.parametrize("m", [30, 12])
def test_candidates_that_are_no_directions_are_replaced_by_random_ones(p, kind, m):
    """As the singular vectors of zero may be anything."""
    kept = padded(orthonormal(m, 4), 6)
    free = torch.linalg.qr(torch.cat([kept[:, :4], torch.randn(m, 2 * p).double()], 1)).Q[:, 4:]
    free = padded(free, 2 * p)
    inside = kept[:, :4] @ orthonormal(4, 4)
    inside = torch.cat([inside, inside], 1)[:, : 2 * p]
    new = {
        "zero": 0 * free,
        "in the span": inside,
        "half in the span": (free + inside) / 2**0.5,
        "dependent outside of the span": (free[:, :1] + inside) / 2**0.5,
    }[kind]
    made(kept, 4, new, 0, p, columns=6, room=m)


def test_without_probes_the_basis_is_what_is_kept():
    kept = padded(orthonormal(9, 3), 4)
    empty = kept.new_zeros(1, 9, 0)
    assert torch.equal(
        new_basis(kept[None], torch.tensor([3]), empty, torch.tensor([0]), empty, 6, 9)[0], padded(kept, 6)
    )
