"""Several adapters on one base: switch between them and add them up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from geolora_pl.adapters.inject import has_adapters, remove_adapters
from geolora_pl.math.decomposition import svd_of_product
from geolora_pl.math.precision import exact_products
from geolora_pl.storage.adapter_file import read_adapter
from geolora_pl.storage.adapter_state import (
    AdapterState,
    Factors,
    apply,
    base_buffers,
    capture,
    check,
    config_of,
    leading,
    write,
)
from geolora_pl.storage.fingerprint import base_parameters


class AdapterLibrary:
    """Adapter files on one base model, of which one is in use at a time.

    What was trained with an adapter, such as its head, comes and goes with it. The adapters are kept in memory as they
    were loaded: training changes the model's copy alone, which :func:`save_adapter` saves.

    Args:
        model: The plain base; it is changed in place.

    Attributes:
        model: The model.
        in_use: The name of the adapter in it, ``None`` for the base alone.

    Raises:
        ValueError: The model has adapters already.

    Example:
        >>> import copy, tempfile
        >>> from geolora_pl import inject_adapters, save_adapter
        >>> base, file = nn.Sequential(nn.Linear(8, 6)), Path(tempfile.mkdtemp(), "a.safetensors")
        >>> trained = copy.deepcopy(base)
        >>> _ = inject_adapters(trained)
        >>> save_adapter(trained, file)
        >>> library = AdapterLibrary(base)
        >>> library.load("a", file)
        >>> library.load("b", file)
        >>> library.combine("both", {"a": 0.7, "b": 0.3})
        0.0
        >>> library.use("both")
        >>> library.names
        ['a', 'b', 'both']
    """

    def __init__(self, model: nn.Module) -> None:
        if has_adapters(model):
            raise ValueError("the model already has adapters: take a plain one, and load their file by its name")
        self.in_use: str | None = None
        self.model = model
        self._states: dict[str, AdapterState] = {}
        self._of_base: dict[str, Tensor] = {}  # what adapters in use have written over

    @property
    def names(self) -> list[str]:
        """The names of all adapters, in the order in which they came."""
        return list(self._states)

    def load(self, name: str, path: str | Path) -> None:
        """Read a file under a name; the adapter in use stays in use, with what training has made of it.

        Raises:
            ValueError: The name is taken, or the file is broken or of another base.
        """
        self._refuse_taken(name)
        state = read_adapter(path)
        active = self.in_use
        current = None if active is None else capture(self.model)
        self.use(None)  # the base must be the base to be compared
        try:
            check(self.model, state)
        except ValueError as error:
            raise ValueError(f"{path} does not fit the model: {error}") from error
        finally:
            self.use(active)
            if current is not None:
                apply(self.model, current)
        self._states[name] = state

    def use(self, name: str | None) -> None:
        """Put an adapter into the model in the place of the one in use; ``None`` for the base alone.

        Raises:
            ValueError: There is none of that name.
        """
        state = None if name is None else self._get(name)
        if self._of_base:
            write(self.model, self._of_base)
        if self.in_use is not None:
            parameters = base_parameters(self.model)
            for trained in self._states[self.in_use].trained:
                parameters[trained].requires_grad_(False)
        here = None if self.in_use is None else _made_with(self._states[self.in_use])
        if has_adapters(self.model) and (state is None or _made_with(state) != here):
            remove_adapters(self.model)
        self.in_use = None
        if state is not None:
            for key in (*state.trained, *state.buffers):
                self._of_base.setdefault(key, self._tensors()[key].detach().clone())
            apply(self.model, state)
            self.in_use = name

    def combine(self, name: str, weights: Mapping[str, float]) -> float:
        r"""Add adapters with weights, as a further adapter.

        .. math:: \alpha U S V^T = \sum_i w_i \alpha_i U_i S_i V_i^T

        by QR of the joint bases and the SVD of the small core: exact while the sum of the ranks is at most
        ``max_rank`` (the largest there is among them for that layer), and beyond it the best approximation of that
        rank. What else was trained is combined likewise, as its difference to the base; the dropout is the first one's.

        Args:
            name: Name of the sum.
            weights: The weight of each adapter by name, any finite number.

        Returns:
            What the truncation to ``max_rank`` cut, as the Frobenius norm over all layers relative to the sum's: 0 if
            nothing.

        Raises:
            ValueError: The name is taken or unknown, or a weight is not finite.
        """
        self._refuse_taken(name)
        if not weights or not all(torch.isfinite(torch.tensor(float(weight))) for weight in weights.values()):
            raise ValueError(f"weights={dict(weights)!r} must give a finite weight to one adapter at least")
        states = [(self._get(part), float(weight)) for part, weight in weights.items()]
        max_ranks: dict[str, int] = {}
        for state, _ in states:
            for layer, max_rank in state.max_ranks.items():
                max_ranks[layer] = max(max_rank, max_ranks.get(layer, 0))
        factors: dict[str, Factors] = {}
        cut = total = 0.0
        alpha = states[0][0].config.alpha
        for layer, max_rank in max_ranks.items():
            parts = [
                (state.factors[layer], weight * state.config.alpha / alpha)
                for state, weight in states
                if layer in state.factors
            ]
            factors[layer], sigma = _sum(parts, max_rank)
            cut += float(sigma[max_rank:].square().sum())
            total += float(sigma.square().sum())
        first = states[0][0]
        self._states[name] = replace(
            first,
            config=replace(
                config_of(max_ranks, alpha, first.config.dropout),
                target_modules="|".join(str(state.config.target_modules) for state, _ in states),
            ),
            factors=factors,
            trained=self._sum_tensors([(state.trained, weight) for state, weight in states]),
            buffers=self._sum_tensors([(state.buffers, weight) for state, weight in states]),
        )
        return (cut / total) ** 0.5 if cut else 0.0

    def remove(self, name: str) -> None:
        """Forget an adapter; the model goes back to its base if it was in use.

        Raises:
            ValueError: There is none of that name.
        """
        self._get(name)
        if self.in_use == name:
            self.use(None)
        del self._states[name]

    def _get(self, name: str) -> AdapterState:
        if name not in self._states:
            raise ValueError(f"name={name!r} is no adapter of the library: it has {', '.join(self._states) or 'none'}")
        return self._states[name]

    def _refuse_taken(self, name: str) -> None:
        if name in self._states:
            raise ValueError(f"name={name!r} is taken: remove it first, or choose another name")

    def _tensors(self) -> dict[str, Tensor]:
        return {**base_parameters(self.model), **base_buffers(self.model)}

    def _sum_tensors(self, parts: list[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
        of_model = self._tensors()
        summed: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for tensors, _ in parts for name in tensors):
            there = [(tensors[name], weight) for tensors, weight in parts if name in tensors]
            if not there[0][0].is_floating_point():  # a counter
                summed[name] = there[0][0]
                continue
            base = self._of_base.get(name, of_model[name]).detach().to(there[0][0])
            summed[name] = base + sum(weight * (tensor - base) for tensor, weight in there)
        return summed


def _made_with(state: AdapterState) -> tuple[Mapping[str, int], float, float]:
    """Where this is the same, adapters are written over; else they are made anew, as in the plain base."""
    return state.max_ranks, state.config.alpha, state.config.dropout


def _sum(parts: list[tuple[Factors, float]], max_rank: int) -> tuple[Factors, Tensor]:
    """The sum at no more than ``max_rank``, and all its singular values."""
    with exact_products(parts[0][0].U.device):
        A = torch.cat([weight * (U @ S) for (U, S, _), weight in parts], dim=1)
        B = torch.cat([V for (_, _, V), _ in parts], dim=1)
        total = svd_of_product(A, B, max_rank)
        return leading(*total), total.sigma
