"""Check a kind of layer or an optimizer of one's own against what the rest of the package takes for granted."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import Optimizer

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.inject import inject_adapters
from geolora_pl.adapters.merge import MergedAdapters
from geolora_pl.math.decomposition import orthonormality_defect, project_out
from geolora_pl.training.integrator import RankAdaptiveIntegrator

_EXACT = 1e-8  # of the largest value, in float64: far above rounding, far below a mistake
_MOMENTUM = ("exp_avg", "momentum_buffer")
_STEPS, _EVERY = 40, 8
_LONGER = 2.0  # times as long as the steps before it may the first step after a retraction be


def check_adapter(layer_class: type[GeoLoRALayer], module: nn.Module, inputs: Tensor) -> None:
    """Check a kind of adapter on one layer: what it computes, its gradients, a retraction, a merge, files and vmap.

    The layer is copied, to float64, so that a mistake stands out from rounding; it does not change.

    Args:
        layer_class: The adapter, a subclass of :class:`~geolora_pl.GeoLoRALayer`.
        module: A layer that it is for.
        inputs: What the layer takes, with the samples along the first dimension.

    Raises:
        AssertionError: A part of the contract does not hold; the message says which, and by how much.
        ValueError: The adapter refuses the layer.

    Example:
        >>> from geolora_pl import GeoLoRALinear
        >>> check_adapter(GeoLoRALinear, nn.Linear(8, 6), torch.randn(5, 8))
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = layer_class(copy.deepcopy(module), AdapterConfig())
        _require(torch.equal(own(inputs), own.base(inputs)), "a new adapter changes the output of the layer")
        base, x = copy.deepcopy(module).double(), inputs.double() if inputs.is_floating_point() else inputs
        adapter = layer_class(base, AdapterConfig(init_rank=2, max_rank=4, alpha=0.5))
        _check_matrix(adapter)
        _move(adapter)
        _check_weight(adapter, x)
        _check_gradients(adapter, x)
        _check_transforms(adapter, x)
        _check_state_dict(layer_class, base, adapter, x)
        _check_merge(adapter, x)
        _check_retraction(adapter, x)


def check_optimizer(factory: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    """Check an optimizer on a small problem: steps, moments and state across retractions of the adapters.

    Args:
        factory: Makes the optimizer of a list of parameters, K and L of each adapter among them, with a learning rate
            at which 40 steps lower a least-squares loss by a tenth. Its ``step`` is called with a closure, which it
            calls, and with gradients.

    Raises:
        AssertionError: A part of the contract does not hold; the message says which, and by how much.
        ValueError: The integrator refuses the optimizer.

    Example:
        >>> check_optimizer(lambda params: torch.optim.Adam(params, lr=0.01))
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _check_training(factory)
        _check_momentum(factory)
        _check_state(factory)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def _same(actual: Tensor, expected: Tensor, what: str) -> None:
    off, scale = float((actual - expected).detach().abs().max()), float(expected.detach().abs().max())
    _require(off <= _EXACT * max(scale, 1e-30), f"{what}: off by {off:.1e}, where the largest value is {scale:.1e}")


@torch.no_grad()
def _move(adapter: GeoLoRALayer) -> None:
    """Give an adapter an update and a pending step, as in the middle of training."""
    live = slice(adapter.probes, adapter.probes + adapter.rank)
    adapter.S[: adapter.rank, : adapter.rank] = torch.diag(torch.rand(adapter.rank) + 0.5)
    for factor in (adapter.K, adapter.L):
        factor[:, live] = torch.randn_like(factor[:, live])
    if adapter.unused_row is not None:
        adapter.L[adapter.unused_row] = 0


def _check_matrix(adapter: GeoLoRALayer) -> None:
    weight, shape = adapter.base_weight(), (adapter.out_features, adapter.in_features)
    numbers = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    layout = adapter.from_matrix(numbers)
    _require(
        layout.shape == weight.shape,
        f"from_matrix makes {tuple(layout.shape)} of matrix_shape {shape}, and the weight is {tuple(weight.shape)}",
    )
    _require(torch.equal(layout.flatten().sort().values, numbers.flatten()), "from_matrix loses or repeats entries")


def _check_weight(adapter: GeoLoRALayer, x: Tensor) -> None:
    plain = copy.deepcopy(adapter).plain(adapter.weight.detach())
    _same(adapter(x), plain(x), "apply_update does not add to the output what from_matrix adds to the weight")


def _check_gradients(adapter: GeoLoRALayer, x: Tensor) -> None:
    along = torch.randn_like(adapter(x)).detach()
    adapter.zero_grad()
    (adapter(x) * along).sum().backward()
    of_K, of_L = adapter.K.grad, adapter.L.grad
    _require(of_K is not None and of_L is not None, "no gradient reaches K and L")
    assert of_K is not None
    assert of_L is not None
    V = adapter.V.detach()[:, adapter.probes :]
    _same(of_L + V @ (V.mT @ of_L), of_L, "the gradient of L has a part in the span of V")
    for factor, gradient, name in ((adapter.K, of_K, "K"), (adapter.L, of_L, "L")):
        direction = torch.zeros_like(factor)
        live = slice(adapter.probes, adapter.probes + adapter.rank)
        direction[:, live] = torch.randn_like(factor[:, live])
        if name == "L":
            direction = project_out(direction, V)
        ends = []
        for sign in (0.5, -0.5):
            with torch.no_grad():
                factor.add_(direction, alpha=sign)
                ends.append((adapter(x) * along).sum())
                factor.sub_(direction, alpha=sign)
        _same((gradient * direction).sum(), ends[0] - ends[1], f"the gradient of {name} is not that of the output")


def _check_transforms(adapter: GeoLoRALayer, x: Tensor) -> None:
    factors = {"K": adapter.K.detach(), "L": adapter.L.detach()}

    def one(factors: dict[str, Tensor], sample: Tensor) -> Tensor:
        output: Tensor = functional_call(adapter, factors, (sample[None],))
        return output[0]

    _same(vmap(one, in_dims=(None, 0))(factors, x), adapter(x), "vmap over the samples changes the output")
    adapter.zero_grad()
    adapter(x).square().sum().backward()
    of_samples = vmap(grad(lambda factors, sample: one(factors, sample).square().sum()), in_dims=(None, 0))(factors, x)
    for name, gradients in of_samples.items():
        whole = getattr(adapter, name).grad
        _same(gradients.sum(0), whole, f"the gradients of {name} per sample do not add up to that of the batch")


def _check_state_dict(layer_class: type[GeoLoRALayer], base: nn.Module, adapter: GeoLoRALayer, x: Tensor) -> None:
    fresh = layer_class(copy.deepcopy(base), AdapterConfig(init_rank=1, max_rank=4, alpha=0.5))
    fresh.load_state_dict(adapter.state_dict())
    _require(fresh.rank == adapter.rank, f"a state dict of rank {adapter.rank} is loaded as rank {fresh.rank}")
    _require(torch.equal(fresh(x), adapter(x)), "the state dict does not carry the function")


def _check_merge(adapter: GeoLoRALayer, x: Tensor) -> None:
    model = nn.Sequential(adapter)
    expected, before = adapter(x), {name: value.clone() for name, value in model.state_dict().items()}
    merged = MergedAdapters(model)
    _same(model(x), expected, "the merged layer does not compute what the adapter does")
    merged.unmerge()
    after = model.state_dict()
    _require(after.keys() == before.keys(), "a merge that is undone leaves other names in the state dict")
    _require(all(torch.equal(after[name], before[name]) for name in before), "a merge that is undone changes values")


def _check_retraction(adapter: GeoLoRALayer, x: Tensor) -> None:
    expected = adapter(x)
    integrator = RankAdaptiveIntegrator(nn.Sequential(adapter), tau=0.0)
    integrator.retract()
    integrator.close()
    _same(adapter(x), expected, "a retraction that drops nothing changes the function")
    for name in ("U", "V"):
        defect = float(orthonormality_defect(getattr(adapter, name).detach()))
        _require(defect < _EXACT, f"{name} is not orthonormal after a retraction: off by {defect:.1e}")


class _Problem:
    """Least squares in float64, with two adapters and a target that two ranks of each can reach."""

    def __init__(self, factory: Callable[[list[nn.Parameter]], Optimizer], probes: int, adapt_every: int) -> None:
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6)).double()
        self.x = torch.randn(64, 12, dtype=torch.float64)
        aim = copy.deepcopy(model)
        with torch.no_grad():
            for weight in (aim[0].weight, aim[2].weight):
                m, n = weight.shape
                weight += torch.randn(m, 2) @ torch.randn(2, n) / math.sqrt(n)
            self.y = aim(self.x)
        config = AdapterConfig(target_modules=["0", "2"], probes=probes)
        self.adapters = list(inject_adapters(model, config).values())
        self.model = model
        self.integrator = RankAdaptiveIntegrator(model, adapt_every=adapt_every)
        self.optimizer = factory(self.factors)
        self.integrator.check_optimizer(self.optimizer)

    @property
    def factors(self) -> list[nn.Parameter]:
        return [factor for layer in self.adapters for factor in (layer.K, layer.L)]

    def loss(self) -> Tensor:
        self.model.zero_grad()
        loss: Tensor = (self.model(self.x) - self.y).square().mean()
        loss.backward()
        return loss.detach()

    def step(self) -> float:
        """Take a step of the optimizer alone, and return the length of what it added to K and L."""
        before = [factor.detach().clone() for factor in self.factors]
        self.loss()
        self.optimizer.step(self.loss)  # type: ignore[arg-type]  # a closure may return a tensor
        steps = [factor.detach() - old for factor, old in zip(self.factors, before, strict=True)]
        return float(torch.cat([step.flatten() for step in steps]).norm())


def _check_training(factory: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    problem = _Problem(factory, AdapterConfig.probes, _EVERY)
    first, lengths, retracted = float(problem.loss()), [], []
    for _ in range(_STEPS):
        lengths.append(problem.step())
        retracted.append(problem.integrator.step(problem.optimizer))
    problem.integrator.close()
    last, counted = float(problem.loss()), problem.integrator.total_steps
    _require(counted == _STEPS, f"{_STEPS} steps are counted as {counted}")
    _require(math.isfinite(last), f"the loss is not finite after {_STEPS} steps")
    _require(last < 0.9 * first, f"{_STEPS} steps take the loss from {first:.3g} to {last:.3g} only")
    for end in range(3 * _EVERY, _STEPS, _EVERY):  # some optimizers warm up before
        _require(retracted[end - 1], f"there is no retraction at step {end}")
        longest = max(lengths[end - _EVERY // 2 : end])
        _require(
            lengths[end] <= _LONGER * longest,
            f"the step after the retraction at step {end} is {lengths[end] / longest:.1f} times as long as others",
        )


def _check_momentum(factory: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    problem = _Problem(factory, 0, 1)
    problem.step()
    problem.integrator.step(problem.optimizer)
    problem.step()
    state = problem.integrator.innermost(problem.optimizer).state
    before = [_tangent_vectors(layer, state) for layer in problem.adapters]
    problem.integrator.step(problem.optimizer)
    problem.integrator.close()
    for layer, old in zip(problem.adapters, before, strict=True):
        P, Q = (basis.detach() @ basis.detach().mT for basis in (layer.U, layer.V))
        for key, vector in _tangent_vectors(layer, state).items():
            expected = old[key] @ Q + P @ old[key] - P @ old[key] @ Q
            _same(vector, expected, f"{key} is not carried to the nearest vector of the new tangent space")


def _tangent_vectors(layer: GeoLoRALayer, state: dict[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The moments of K and L as one matrix, ``m_K V^T + U m_L^T``, where L has no part in the span of V."""
    found = {}
    for key in _MOMENTUM:
        m_K, m_L = state[layer.K].get(key), state[layer.L].get(key)
        if m_K is not None and m_L is not None and (m_K.shape, m_K.dtype) == (layer.K.shape, layer.K.dtype):
            found[key] = m_K @ layer.V.detach().mT + layer.U.detach() @ m_L.mT
    return found


def _check_state(factory: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    one, other = _Problem(factory, AdapterConfig.probes, _EVERY), _Problem(factory, AdapterConfig.probes, _EVERY)
    for _ in range(_EVERY):
        one.step()
        one.integrator.step(one.optimizer)
    other.model.load_state_dict(one.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    for problem in (one, other):
        problem.step()
        problem.integrator.close()
    for ours, theirs in zip(one.factors, other.factors, strict=True):
        _same(theirs, ours, "the optimizer does not go on from its state dict as it would have")
