r"""RiemannianAdam: moments that do not depend on the basis for the adapters, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from geolora_pl.adapters.base import adapter_of_factor
from geolora_pl.math.decomposition import svd
from geolora_pl.math.precision import without_autocast
from geolora_pl.math.ranks import resolution
from geolora_pl.training.internals import foreach_add_, foreach_copy_, foreach_mul_, foreach_norm
from geolora_pl.training.stacks import Stack, leading, owners, stacks

Geometry = Literal["rowwise", "isotropic", "spectral", "entrywise"]


def parameter_groups(model: nn.Module | Iterable[nn.Parameter], head_lr: float | None = 1e-3) -> list[dict[str, Any]]:
    """Split what is trained into adapters, other matrices and other vectors.

    The groups suit any torch optimizer. Adapters come first, K and L of one adapter side by side, marked with
    ``adapters: True`` for :class:`RiemannianAdam`. Biases and norms get ``weight_decay: 0``.

    Args:
        model: A model with adapters, or parameters of one; those that need no gradient are left out.
        head_lr: Learning rate of all but the adapters, above 0, or ``None`` for the optimizer's own.

    Returns:
        One to three groups, none of them empty.

    Example:
        >>> from geolora_pl import AdapterConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> _ = inject_adapters(model, AdapterConfig(target_modules=["0"], modules_to_save=["1"]))
        >>> [len(group["params"]) for group in parameter_groups(model)]
        [2, 1, 1]
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    trained = [p for p in parameters if p.requires_grad]
    adapters = adapter_of_factor()
    layers = [adapters[id(p)] for p in trained if id(p) in adapters]
    factors = [factor for layer in layers for factor in (layer.K, layer.L)]
    of_adapters = {id(p) for p in factors}
    rest = [p for p in trained if id(p) not in of_adapters]
    lr = {} if head_lr is None else {"lr": head_lr}
    groups: list[dict[str, Any]] = [
        {"params": factors, "adapters": True},
        {"params": [p for p in rest if p.dim() > 1], **lr},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0, **lr},
    ]
    return [group for group in groups if group["params"]]


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
        lr: Norm of a step of an adapter, at least 0; also AdamW's learning rate in groups without one of their own.
        betas: Decay of first and second moments, in [0, 1); AdamW's, too.
        eps: Added to the root of the second moment, above 0.
        weight_decay: Decoupled; for the adapters the integrator applies it to S.
        geometry: ``rowwise`` as above; ``isotropic``: one second moment for each pair of K and L; ``spectral``: the
            polar factor of each momentum, scaled to norm one (Muon in tangent coordinates), which fills the rank it is
            given; ``entrywise``: Adam's division entry by entry, scaled to the same norm.

    Attributes:
        found_inf: Set to a tensor just before a step, as torch's gradient scaler does: the step is taken where it is 0,
            and leaves weights and state alone where it is 1, without waiting for the device.

    Raises:
        ValueError: An argument is out of range, or no group holds adapters.

    Example:
        >>> from geolora_pl import inject_adapters
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject_adapters(model)
        >>> optimizer = RiemannianAdam(model, lr=0.1)
    """

    found_inf: Tensor | None

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
        for group in self.param_groups:
            _check(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of an optimizer of the same geometry.

        Raises:
            ValueError: It has another, whose second moments mean something else.
        """
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if (geometry := theirs.get("geometry")) != ours["geometry"]:
                raise ValueError(
                    f"geometry={ours['geometry']!r} does not fit the state, which was made with {geometry!r}: set it "
                    "to that, or start a new run from the weights"
                )
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "step" in state:  # torch leaves it where it was saved from
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
        found_inf = self.__dict__.pop("found_inf", None)
        adapters = adapter_of_factor()
        for group in self.param_groups:
            parameters = group["params"]
            if group["adapters"]:
                pairs = zip(parameters[::2], parameters[1::2], strict=True)
                having = ((K, L) for K, L in pairs if K.grad is not None and L.grad is not None)
                for stack in stacks(having, adapters):
                    with without_autocast(stack.factors[0].device):  # a step may be taken inside autocast
                        self._step_adapters(stack, group, found_inf)
            else:
                self._step_others([p for p in parameters if p.grad is not None], group, found_inf)
        return loss

    def _step_adapters(self, stack: Stack, group: dict[str, Any], found_inf: Tensor | None) -> None:
        """K and L of one adapter are neighbours; all of them are one matrix here, one under the other."""
        (factors, columns), (beta1, beta2), eps = stack, group["betas"], group["eps"]
        rows = [len(factor) for factor in factors]
        owner = owners(tuple(a + b for a, b in zip(rows[::2], rows[1::2], strict=True)), factors[0].device)
        G = torch.cat(leading(_gradients(factors), columns))
        taken: float | Tensor = 1.0
        if found_inf is not None:
            G, taken = torch.where(found_inf > 0, 0, G), 1.0 - found_inf.to(G.dtype)
        M = self._lerp(factors, "exp_avg", G, rows, (1 - beta1) * taken)
        steps = self._count(factors[::2], taken)
        bias1, bias2 = (1 - torch.pow(beta, steps) for beta in (beta1, beta2))

        # A direction, the weights of its rows, and the scale of each adapter that gives both the norm 1 at most.
        direction = M
        of_rows: float | Tensor = 1.0
        if group["geometry"] == "spectral":
            direction = torch.cat([polar_factor(momentum) for momentum in M.split(rows)])
            scale = 1 / _pair_norms(direction.split(rows)).clamp_min(eps)
        elif group["geometry"] == "isotropic":
            squares = _pair_norms(G.split(rows)).square()
            seconds = self._states(factors[::2], "exp_avg_sq", squares.unbind())
            v = torch.stack(seconds).lerp_(squares, (1 - beta2) * taken)
            foreach_copy_(seconds, list(v.unbind()))
            scale = 1 / (bias1 * ((v / bias2).sqrt() + eps))
        elif group["geometry"] == "rowwise":
            ones = G.new_ones(G.shape[1])  # sums over rows are several times faster as products
            v = self._lerp(factors, "exp_avg_sq", G.square() @ ones, rows, (1 - beta2) * taken)
            # Cautious: the rows in which momentum and gradient agree, and no step in the others.
            of_rows = ((M * G) @ ones > 0) / ((v / bias2[owner]).sqrt() + eps)
            scale = 1 / (bias1 * _norm_of_ones(v, owner, len(bias1)))
        else:
            v = self._lerp(factors, "exp_avg_sq", G.square(), rows, (1 - beta2) * taken)
            direction = M / ((v / bias2[owner, None]).sqrt() + eps)
            scale = 1 / (bias1 * _norm_of_ones(v, owner, len(bias1)))
        live = leading(factors, columns)
        if group["weight_decay"]:
            kept = 1 - group["lr"] * group["weight_decay"] * taken
            foreach_mul_(live, [kept] * len(live) if isinstance(kept, Tensor) else kept)
        step = direction * (of_rows * (-group["lr"] * taken * scale)[owner])[:, None]
        foreach_add_(live, list(step.split(rows)))

    def _step_others(self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None) -> None:
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
            fused=found_inf is not None or parameters[0].device.type != "cpu",
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _lerp(
        self, factors: Sequence[Tensor], key: str, new: Tensor, lengths: list[int], weight: float | Tensor
    ) -> Tensor:
        """Move a moment of all factors towards ``new``, of which each has so many rows, and return it whole."""
        of_rows = new.dim() == 1
        moments = self._states(factors, key, new.split(lengths) if of_rows else factors)
        moments = moments if of_rows else leading(moments, new.shape[1])
        moved = torch.cat(moments).lerp_(new, weight)
        foreach_copy_(moments, list(moved.split(lengths)))
        return moved

    def _states(self, parameters: Sequence[Tensor], key: str, like: Sequence[Tensor]) -> list[Tensor]:
        for parameter, example in zip(parameters, like, strict=True):
            if key not in self.state[parameter]:
                self.state[parameter][key] = torch.zeros_like(example)
        return [self.state[parameter][key] for parameter in parameters]

    def _steps(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Steps taken so far by each parameter, on its device."""
        for parameter in parameters:
            if "step" not in self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros((), device=parameter.device)
        return [self.state[parameter]["step"] for parameter in parameters]

    def _count(self, parameters: Sequence[Tensor], taken: float | Tensor) -> Tensor:
        """Steps taken by each parameter, with this one if it is taken, as a vector; at least 1."""
        steps = self._steps(parameters)
        foreach_add_(steps, [taken] * len(steps) if isinstance(taken, Tensor) else taken)
        return torch.stack(steps).to(parameters[0].dtype).clamp_min(1)


def _norm_of_ones(v: Tensor, owner: Tensor, adapters: int) -> Tensor:
    """Norm of each K and L together if every entry were one, but for rows whose second moment is zero."""
    present = (v != 0).to(v.dtype)
    counts = v.new_zeros(adapters).index_add_(0, owner, present if v.dim() == 1 else present.sum(1))
    return counts.clamp_min(1).sqrt()


def polar_factor(matrix: Tensor) -> Tensor:
    """``P Q^T`` of the SVD of a matrix (..., d, R): of the same rank, with every singular value one."""
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


def _check(group: dict[str, Any]) -> None:
    if not group["lr"] >= 0:
        raise ValueError(f"lr={group['lr']!r} must be at least 0")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']!r} must lie in [0, 1)")
    if not group["eps"] > 0:
        raise ValueError(f"eps={group['eps']!r} must be above 0")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay={group['weight_decay']!r} must be at least 0")
    if group["geometry"] not in get_args(Geometry):
        raise ValueError(f"geometry={group['geometry']!r} must be one of {', '.join(get_args(Geometry))}")
    if group["adapters"] and len(group["params"]) % 2:
        raise ValueError("a group with adapters=True must hold K and L of each adapter side by side")
