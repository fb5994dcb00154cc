import pytest
import torch
from reference import best_of_rank, orthonormal, padded, truncate
from tolerance import EXACT, close, is_orthonormal

from geolora_pl.math import decomposition, transport
from geolora_pl.math import ranks as rank_rules


def random_point(m, n, r, R, dtype=torch.float64, scale=1.0):
    U, V = padded(orthonormal(m, r, dtype), R), padded(orthonormal(n, r, dtype), R)
    S = torch.zeros(R, R, dtype=dtype)
    S[:r, :r] = scale * torch.randn(r, r, dtype=dtype)
    K, L = (torch.zeros(rows, R, dtype=dtype) for rows in (m, n))
    K[:, :r], L[:, :r] = scale * torch.randn(m, r, dtype=dtype), scale * torch.randn(n, r, dtype=dtype)
    return U, S, V, K, L


def dense(U, S, V, K, L):
    return U @ S @ V.mT + K @ V.mT + U @ L.mT


SHAPES = [(1, 1, 1, 1), (5, 1, 1, 1), (1, 7, 1, 1), (8, 8, 3, 4), (40, 6, 3, 6), (6, 40, 6, 6), (30, 20, 4, 16)]


@pytest.mark.parametrize(("m", "n", "r", "R"), SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_decompose_is_the_svd_of_the_dense_sum(m, n, r, R, scale):
    point = random_point(m, n, r, R, scale=scale)
    step = decomposition.decompose(*point)
    full = dense(*point)
    k = min(m, n, 2 * R)
    close(step.sigma / scale, (torch.linalg.svdvals(full) / scale)[:k], m * n)
    U, S, V = truncate(step, torch.tensor(R))
    close((U @ S @ V.mT) / scale, best_of_rank(full / scale, R), within=EXACT)
    for basis in (U, V):
        assert is_orthonormal(basis)


def test_decompose_is_batched_over_leading_dimensions():
    points = [[random_point(9, 7, 2, 4) for _ in range(3)] for _ in range(2)]
    batched = [torch.stack([torch.stack([p[i] for p in row]) for row in points]) for i in range(5)]
    together = truncate(decomposition.decompose(*batched), torch.tensor([[1, 2, 3], [4, 1, 2]]))
    for i, row in enumerate(points):
        for j, point in enumerate(row):
            alone = truncate(decomposition.decompose(*point), torch.tensor([[1, 2, 3], [4, 1, 2]])[i, j])
            for a, b in zip(together, alone, strict=True):
                close(a[i, j].abs(), b.abs(), within=EXACT)


def test_the_work_is_done_in_float32_or_float64():
    for dtype, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        point = [x.to(dtype) for x in random_point(8, 6, 2, 4)]
        assert decomposition.decompose(*point).sigma.dtype == expected


def test_columns_beyond_the_rank_are_exactly_zero():
    step = decomposition.decompose(*random_point(12, 9, 3, 6))
    U, S, V = truncate(step, torch.tensor(2))
    for zeros in (U[:, 2:], V[:, 2:], S[2:], S[:, 2:]):
        assert torch.count_nonzero(zeros) == 0
    assert torch.count_nonzero(S) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_dependent_directions_are_no_directions(dtype, scale):
    """Increments within the span of the bases, and repeated ones, add nothing to the rank."""
    U, S, V, K, L = random_point(64, 48, 3, 8, dtype, scale)
    K[:, :3] = U[:, :3] @ torch.randn(3, 3, dtype=dtype) * scale
    new = orthonormal(48, 1, dtype)
    L[:, :3] = scale * new @ torch.ones(1, 3, dtype=dtype)
    sigma = decomposition.decompose(U, S, V, K, L).sigma
    rank = rank_rules.ranks_by_tau(sigma, 0.0, rank_rules.resolution(64, 48, dtype), 1, 8)
    assert rank == torch.linalg.matrix_rank(dense(U, S, V, K, L).double() / scale, rtol=1e-5)
    assert rank <= 4


@pytest.mark.parametrize("tau", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_ranks_by_tau_is_the_smallest_rank_within_tau(tau):
    for _ in range(50):
        sigma = (torch.rand(8, dtype=torch.float64).pow(4) + 1e-3).sort(descending=True).values
        rank = int(rank_rules.ranks_by_tau(sigma, tau, 1e-14, 0, 8))
        assert sigma[rank:].norm() <= tau * sigma.norm()
        assert rank == 0 or sigma[rank - 1 :].norm() > tau * sigma.norm()


def test_ranks_by_tau_keeps_to_its_bounds():
    sigma = torch.tensor([[1.0, 1e-3, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert rank_rules.ranks_by_tau(sigma, 0.1, 1e-6, 2, 3).tolist() == [2, 3, 2]


def brute_force_budget(sigmas, ranks, costs, budget, floors):
    import itertools

    options = itertools.product(*(range(f, r + 1) for f, r in zip(floors, ranks, strict=True)))
    affordable = [o for o in options if sum(r * c for r, c in zip(o, costs, strict=True)) <= budget]
    return max(sum(s**2 for sigma, r in zip(sigmas, o, strict=True) for s in sigma[:r]) for o in affordable)


def test_budget_is_never_exceeded_and_keeps_most_energy_at_equal_costs():
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        sigma = torch.rand(3, 4, generator=generator).sort(descending=True).values
        floors, ranks, costs = [1, 0, 1], [4, 3, 4], [10, 10, 10]
        (chosen,) = rank_rules.ranks_by_budget([sigma], [torch.tensor(ranks)], [10], 60, [torch.tensor(floors)])
        chosen, sigmas = chosen.tolist(), sigma.tolist()
        assert sum(r * c for r, c in zip(chosen, costs, strict=True)) <= 60
        assert all(f <= c <= r for f, c, r in zip(floors, chosen, ranks, strict=True))
        kept = sum(s**2 for sigma, r in zip(sigmas, chosen, strict=True) for s in sigma[:r])
        assert kept == pytest.approx(brute_force_budget(sigmas, ranks, costs, 60, floors))


def bought(sigmas, costs, budget):
    """Of adapters of which each has a cost of its own, and no floor; all of their ranks are for sale."""
    most, least = ([torch.tensor([end(len(sigma), 0)]) for sigma in sigmas] for end in (max, min))
    return [int(r) for r in rank_rules.ranks_by_budget([torch.tensor([s]) for s in sigmas], most, costs, budget, least)]


def test_budget_prefers_energy_per_parameter():
    """The larger singular value sits in the layer that is eight times as expensive."""
    assert bought([[2.0], [1.9]], [80, 10], 80) == [0, 1]


def test_budget_goes_on_to_what_still_fits():
    """After 50 are spent the dearest of the rest fits no more, then the next but one; what is cheaper does."""
    sigmas = [[9.0, 9.0], [5.0, 5.0], [2.0, 2.0, 2.0], [0.5, 0.4]]
    assert bought(sigmas, [50, 30, 10, 1], 82) == [1, 1, 0, 2]


def test_budget_without_an_end_buys_all():
    assert bought([[2.0, 1.0], [1.9]], [80, 10], 10**30) == [2, 1]


@pytest.mark.parametrize(("m", "n", "r", "r_new"), [(20, 15, 3, 5), (15, 20, 4, 2), (6, 30, 6, 6), (9, 9, 1, 1)])
def test_transport_is_the_best_approximation_of_the_tangent_vector(m, n, r, r_new):
    R = max(r, r_new)
    U, V = padded(orthonormal(m, r), R), padded(orthonormal(n, r), R)
    U_new, V_new = padded(orthonormal(m, r_new), R), padded(orthonormal(n, r_new), R)
    m_K, m_L = torch.zeros(m, R).double(), torch.zeros(n, R).double()
    m_K[:, :r], m_L[:, :r] = torch.randn(m, r).double(), torch.randn(n, r).double()
    xi = m_K @ V.T + U @ m_L.T
    new_K, new_L = transport.transport_first_moment(m_K, m_L, U, V, U_new, V_new)
    moved = new_K @ V_new.T + U_new @ new_L.T
    projected = U_new @ U_new.T @ xi + xi @ V_new @ V_new.T - U_new @ U_new.T @ xi @ V_new @ V_new.T
    close(moved, projected, m * n)
    close(V_new.T @ new_L, torch.zeros(R, R).double(), m * n, beside=xi)
    assert torch.count_nonzero(new_K[:, r_new:]) == torch.count_nonzero(new_L[:, r_new:]) == 0


def test_transport_to_the_same_bases_changes_nothing():
    U, V = orthonormal(9, 3), orthonormal(7, 3)
    m_K, m_L = torch.randn(9, 3).double(), decomposition.project_out(torch.randn(7, 3).double(), V)
    new_K, new_L = transport.transport_first_moment(m_K, m_L, U, V, U, V)
    close(new_K, m_K)
    close(new_L, m_L)
    v = torch.rand(9, 3).double()
    close(transport.transport_second_moment(v, V, V), v)


def test_second_moments_of_new_columns_are_of_the_size_of_their_row():
    basis = padded(orthonormal(30, 3), 6)
    both = torch.linalg.qr(torch.cat([basis[:, :3], torch.randn(30, 2).double()], 1)).Q
    v = padded(torch.rand(8, 3).double() + 0.5, 6)
    moved = transport.transport_second_moment(v, basis, padded(both, 6))
    close(moved[:, :3], v[:, :3])
    close(moved[:, 3], v[:, :3].mean(1))
    assert torch.count_nonzero(moved[:, 5]) == 0


def test_svd_falls_back_before_it_gives_up(monkeypatch):
    calls = []
    real = decomposition._svd

    def failing(matrix, driver=None):
        calls.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, driver)

    monkeypatch.setattr(decomposition, "_svd", failing)
    matrix = torch.randn(5, 4)
    P, sigma, Qh = decomposition.svd(matrix)
    assert calls == [torch.float32, torch.float64]
    assert sigma.dtype == torch.float32
    close((P * sigma) @ Qh, matrix)


def test_svd_of_what_is_not_finite_raises():
    with pytest.raises(torch.linalg.LinAlgError):
        decomposition.svd(torch.full((3, 3), float("nan")))


def test_orthonormality_defect_sees_a_defect():
    basis = padded(orthonormal(10, 3), 5)
    assert is_orthonormal(basis)
    basis[:, 1] *= 1.01
    assert decomposition.orthonormality_defect(basis) > 0.02
