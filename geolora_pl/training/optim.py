r"""RiemannianAdam: moments that do not depend on the basis for the adapters, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from geolora_pl.math.decomposition import svd
from geolora_pl.math.precision import without_autocast
from geolora_pl.math.ranks import resolution
from geolora_pl.training.groups import Geometry, check_group, parameter_groups
from geolora_pl.training.internals import foreach_add_, foreach_copy_, foreach_mul_, foreach_norm
from geolora_pl.training.stacks import Stack, leading, owners, stacks


class RiemannianAdam(Optimizer):
    r"""Adam on the product of the adapters' manifolds, AdamW on the head.

    Riemannian Adam (Bécigneul and Ganea, ICLR 2019; also in geoopt) keeps one second moment for each factor of a
    product manifold, the squared norm of its Riemannian gradient. Here a factor is a row of K or of L, an output or an
    input of the layer, as in the row statistics of Adafactor (Shazeer and Stern, ICML 2018), and the integrator is the
    retraction and carries the first moment:

    .. math::
        M \leftarrow \beta_1 M + (1 - \beta_1) G_K, \qquad
        v_i \leftarrow \beta_2 v_i + (1 - \beta_2) \lVert (G_K)_{i:} \rVert^2, \qquad
        \xi_{i:} = -\frac{\mathrm{lr}}{\sqrt{m + n}} \; \frac{\hat M_{i:}}{\sqrt{\hat v_i} + \epsilon}
        \; [\langle M_{i:}, (G_K)_{i:} \rangle > 0]

    and the same for L. In- and outputs of a transformer differ in scale by orders of magnitude, and this evens them
    out. The norm of a row does not depend on how its basis is turned, and a matrix of low rank with its rows rescaled
    has the same rank. (Adam's entrywise division makes it a step of full rank, and the adapters fill up with noise.)
    Rows in which the gradient has turned against the momentum stay (Cautious Optimizers, Liang et al. 2024, there
    entry by entry): steps that are too long for the loss shorten themselves.

    **What lr means.** One step moves the update of every adapter by a Frobenius norm of about ``alpha * lr`` at most,
    in every geometry, and by less where the gradients disagree. The norm is a sum over the entries of K and L, so
    neither the live rank nor ``max_rank`` nor the size of the layer changes its meaning. (m + n counts the rows that
    ever had a gradient.)

    Args:
        params: The model, its parameters, or groups: from :func:`parameter_groups`, or your own, in which those with K
            and L side by side carry ``adapters: True``.
        lr: Norm of a step of an adapter, at least 0; also the learning rate of AdamW in groups that set none.
        betas: Decay of first and second moments, in [0, 1), also of AdamW.
        eps: Added to the root of the second moment, above 0.
        weight_decay: Decoupled weight decay; of the adapters the integrator decays S.
        geometry: ``rowwise`` as above; ``isotropic``: one second moment for each pair of K and L; ``spectral``: the
            polar factor of each momentum, scaled to norm one (Muon in tangent coordinates), which fills the rank it is
            given; ``entrywise``: Adam's division entry by entry, scaled to the same norm.

    Raises:
        ValueError: An argument is out of range, or no group holds adapters.

    Example:
        >>> from geolora_pl import inject_adapters
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject_adapters(model)
        >>> optimizer = RiemannianAdam(model, lr=0.1)
    """

    _left_out: Tensor | None = None

    def __init__(
        self,
        params: nn.Module | Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        geometry: Geometry = "rowwise",
    ) -> None:
        groups: list[Any] = [params] if isinstance(params, nn.Module) else list(params)
        if not all(isinstance(group, dict) for group in groups):
            groups = parameter_groups(params if isinstance(params, nn.Module) else groups)
        if not any(group.get("adapters") for group in groups):
            raise ValueError(
                "params has no group of adapters: pass the model itself, after inject_adapters(model), or "
                "parameter_groups(model)"
            )
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "geometry": geometry,
            "adapters": False,
        }
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; one with K and L side by side carries ``adapters: True``.

        Raises:
            ValueError: A setting of the group is out of range, or its K and L are not side by side; it is not added.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    def leave_out_next_step_if(self, flag: Tensor) -> None:
        """Let the next step change neither weights nor state if ``flag`` is 1, without waiting for the device.

        Args:
            flag: (), 0 or 1, on the device of the parameters.
        """
        self._left_out = flag

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of an optimizer of the same geometry.

        Raises:
            ValueError: The state has another geometry, whose second moments mean something else.
        """
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if (geometry := theirs.get("geometry")) != ours["geometry"]:
                raise ValueError(
                    f"geometry={ours['geometry']!r} does not fit the state, which was made with {geometry!r}: set it "
                    "to that, or start a new run from the weights"
                )
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "step" in state:  # torch leaves it on the device that it was saved from
                state["step"] = state["step"].to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Computes the loss and its gradients again, if given.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        left_out, self._left_out = self._left_out, None
        for group in self.param_groups:
            parameters = group["params"]
            if group["adapters"]:
                pairs = zip(parameters[::2], parameters[1::2], strict=True)
                having = ((K, L) for K, L in pairs if K.grad is not None and L.grad is not None)
                for stack in stacks(having):
                    with without_autocast(stack.factors[0].device):  # a step may be taken inside autocast
                        self._step_adapters(stack, group, left_out)
            else:
                self._step_others([p for p in parameters if p.grad is not None], group, left_out)
        return loss

    def _step_adapters(self, stack: Stack, group: dict[str, Any], left_out: Tensor | None) -> None:
        """Step many adapters as one matrix: K and L of each adapter are neighbours, one under the other."""
        (factors, columns), (beta1, beta2) = stack, group["betas"]
        rows = [len(factor) for factor in factors]
        owner = owners(tuple(a + b for a, b in zip(rows[::2], rows[1::2], strict=True)), factors[0].device)
        G = torch.cat(leading(_gradients(factors), columns))
        taken: float | Tensor = 1.0
        if left_out is not None:
            G, taken = torch.where(left_out > 0, 0, G), 1.0 - left_out.to(G.dtype)
        M = self._average(factors, "exp_avg", G, rows, (1 - beta1) * taken)
        v = self._second_moment(group["geometry"], factors, G, rows, (1 - beta2) * taken)
        steps = self._count(factors[::2], taken)
        adapters = Adapters(rows, owner, 1 - torch.pow(beta1, steps), 1 - torch.pow(beta2, steps), group["eps"])
        direction, weights, scale = _GEOMETRIES[group["geometry"]](G, M, v, adapters)
        live = leading(factors, columns)
        if group["weight_decay"]:
            kept = 1 - group["lr"] * group["weight_decay"] * taken
            foreach_mul_(live, [kept] * len(live) if isinstance(kept, Tensor) else kept)
        step = direction * (weights * (-group["lr"] * taken * scale)[owner])[:, None]
        foreach_add_(live, list(step.split(rows)))

    def _second_moment(
        self, geometry: Geometry, factors: Sequence[Tensor], G: Tensor, rows: list[int], weight: float | Tensor
    ) -> Tensor:
        """The running average of squares that the geometry needs: per row, pair or entry; spectral keeps none."""
        if geometry == "rowwise":
            return self._average(factors, "exp_avg_sq", _sum_of_rows(G.square()), rows, weight)
        if geometry == "isotropic":
            return self._average(factors[::2], "exp_avg_sq", _pair_norms(G.split(rows)).square(), None, weight)
        if geometry == "entrywise":
            return self._average(factors, "exp_avg_sq", G.square(), rows, weight)
        return G.new_empty(0)

    def _step_others(self, parameters: list[Tensor], group: dict[str, Any], left_out: Tensor | None) -> None:
        if not parameters:
            return
        adamw(
            parameters,
            _gradients(parameters),
            self._states(parameters, "exp_avg", parameters),
            self._states(parameters, "exp_avg_sq", parameters),
            [],
            self._steps(parameters),
            foreach=False,
            fused=left_out is not None or parameters[0].device.type != "cpu",
            found_inf=left_out,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _average(
        self, parameters: Sequence[Tensor], key: str, new: Tensor, rows: list[int] | None, weight: float | Tensor
    ) -> Tensor:
        """Move a running average of all parameters towards ``new`` and return it whole.

        Args:
            parameters: Whose state it is.
            key: The name of the average in their state.
            new: (rows, columns), or (rows,), or (parameters,): one number for each entry, row or parameter.
            rows: How many rows of ``new`` each parameter has; ``None`` if it has one number.
            weight: Of ``new`` in the average.
        """
        parts = new.unbind() if rows is None else new.split(rows)
        averages = self._states(parameters, key, parameters if new.dim() == 2 else parts)
        if new.dim() == 2:
            averages = leading(averages, new.shape[1])
        whole = (torch.stack(averages) if rows is None else torch.cat(averages)).lerp_(new, weight)
        foreach_copy_(averages, list(whole.unbind() if rows is None else whole.split(rows)))
        return whole

    def _states(self, parameters: Sequence[Tensor], key: str, like: Sequence[Tensor]) -> list[Tensor]:
        for parameter, example in zip(parameters, like, strict=True):
            if key not in self.state[parameter]:
                self.state[parameter][key] = torch.zeros_like(example)
        return [self.state[parameter][key] for parameter in parameters]

    def _steps(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Steps taken so far by each parameter, on its device."""
        for parameter in parameters:
            if "step" not in self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return [self.state[parameter]["step"] for parameter in parameters]

    def _count(self, parameters: Sequence[Tensor], taken: float | Tensor) -> Tensor:
        """Count this step, if it is taken, and return the steps of each parameter, at least 1, as a vector."""
        steps = self._steps(parameters)
        foreach_add_(steps, [taken] * len(steps) if isinstance(taken, Tensor) else taken)
        return torch.stack(steps).to(parameters[0].dtype).clamp_min(1)


class Adapters(NamedTuple):
    """What a geometry knows of the adapters whose K and L lie one under the other in a matrix.

    Attributes:
        rows: The number of rows of every factor, K and L of one adapter side by side.
        owner: (rows,), the number of the adapter that each row belongs to.
        bias1: (adapters,), ``1 - beta1^t`` with the steps t of each adapter, by which its first moment is too small.
        bias2: (adapters,), ``1 - beta2^t``, by which its second moment is too small.
        eps: Added to the root of the second moment.
    """

    rows: list[int]
    owner: Tensor
    bias1: Tensor
    bias2: Tensor
    eps: float


class Direction(NamedTuple):
    """A step of norm one at most of every adapter: row i of ``direction`` times ``weights[i] * scale[owner[i]]``.

    A geometry gives it in three parts because only the first is as large as the gradient: the step is formed from them
    in one pass, together with the learning rate.
    """

    direction: Tensor
    weights: Tensor | float
    scale: Tensor


def rowwise(G: Tensor, M: Tensor, v: Tensor, adapters: Adapters) -> Direction:
    r"""One second moment per row, and no step in the rows whose gradient has turned against the momentum.

    .. math::
        \frac{1}{\sqrt{m + n}} \; \frac{\hat M_{i:}}{\sqrt{\hat v_i} + \epsilon} \;
        [\langle M_{i:}, G_{i:} \rangle > 0]
    """
    v_hat = v / adapters.bias2[adapters.owner]
    agrees = _sum_of_rows(M * G) > 0
    return Direction(M, agrees / (v_hat.sqrt() + adapters.eps), 1 / (adapters.bias1 * _norm_of_ones(v, adapters)))


def isotropic(G: Tensor, M: Tensor, v: Tensor, adapters: Adapters) -> Direction:
    r"""One second moment per adapter: :math:`\hat M / (\sqrt{\hat v} + \epsilon)`."""
    v_hat = v / adapters.bias2
    return Direction(M, 1.0, 1 / (adapters.bias1 * (v_hat.sqrt() + adapters.eps)))


def spectral(G: Tensor, M: Tensor, v: Tensor, adapters: Adapters) -> Direction:
    r"""The polar factor P of the momentum of K, and that of L, scaled together: :math:`P / \lVert P \rVert`.

    The polar factor does not depend on the size of the momentum, and so this needs neither v nor a bias correction.
    """
    polar = torch.cat([polar_factor(momentum) for momentum in M.split(adapters.rows)])
    return Direction(polar, 1.0, 1 / _pair_norms(polar.split(adapters.rows)).clamp_min(adapters.eps))


def entrywise(G: Tensor, M: Tensor, v: Tensor, adapters: Adapters) -> Direction:
    r"""Adam: one second moment per entry, :math:`\hat M / (\sqrt{\hat v} + \epsilon) / \sqrt{\text{entries}}`."""
    v_hat = v / adapters.bias2[adapters.owner, None]
    direction = M / (v_hat.sqrt() + adapters.eps)
    return Direction(direction, 1.0, 1 / (adapters.bias1 * _norm_of_ones(v, adapters)))


_GEOMETRIES: dict[Geometry, Callable[[Tensor, Tensor, Tensor, Adapters], Direction]] = {
    "rowwise": rowwise,
    "isotropic": isotropic,
    "spectral": spectral,
    "entrywise": entrywise,
}


def _norm_of_ones(v: Tensor, adapters: Adapters) -> Tensor:
    """For each adapter the root of the number of rows, or entries, of K and L that ever had a gradient."""
    present = (v != 0).to(v.dtype)
    counts = torch.zeros_like(adapters.bias2).index_add_(0, adapters.owner, present if v.dim() == 1 else present.sum(1))
    return counts.clamp_min(1).sqrt()


def _sum_of_rows(matrix: Tensor) -> Tensor:
    """The sum of each row, as a product, which is several times faster than a sum."""
    return matrix @ matrix.new_ones(matrix.shape[1])


def polar_factor(matrix: Tensor) -> Tensor:
    """``P Q^T`` of the SVD of a matrix (..., d, R): it has the same rank, and every singular value is one."""
    P, sigma, Qh = svd(matrix)
    rows, columns = matrix.shape[-2:]
    distinct = sigma > resolution(rows, columns, sigma.dtype) * sigma[..., :1]
    return (P * distinct[..., None, :]) @ Qh


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [gradient for parameter in parameters if (gradient := parameter.grad) is not None]


def _pair_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Frobenius norm of each K and L together."""
    norms: Tensor = torch.linalg.vector_norm(torch.stack(foreach_norm(list(tensors))).view(-1, 2), dim=1)
    return norms
