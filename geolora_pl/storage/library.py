"""Keep several adapters on one base, switch between them and add them."""

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
    check_base,
    config_of,
    leading,
    write,
)
from geolora_pl.storage.fingerprint import base_hash, base_parameters, is_same_base
from geolora_pl.storage.hub import located


class AdapterLibrary:
    """A library of adapters on one base model, of which one is in use at a time.

    What was trained with an adapter, such as its head, is put in and taken out with it. The adapters stay in memory as
    they were loaded: training changes only the copy in the model, which :func:`save_adapter` saves.

    Args:
        model: The plain base; it is changed in place.

    Attributes:
        model: The model.
        in_use: The name of the adapter in the model, or ``None`` for the base alone.

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
        self._of_base: dict[str, Tensor] = {}  # values of the base that adapters in use have overwritten

    @property
    def names(self) -> list[str]:
        """The names of all adapters, in the order in which they were added."""
        return list(self._states)

    def load(self, name: str, path: str | Path, *, revision: str | None = None, token: str | None = None) -> None:
        """Read a file under a name; the adapter in use stays in use, with what training has changed in it.

        Args:
            name: The name in this library.
            path: The file, or the name of a repository on the hub, ``user/name``, as :func:`load_adapter` takes it.
            revision: A branch, tag or commit of the repository.
            token: For a private repository; by default the one of ``hf auth login`` or ``HF_TOKEN``.

        Raises:
            ValueError: The name is taken, or the file is broken, was made on another base or cannot be fetched.
        """
        self._refuse_taken(name)
        state = read_adapter(located(path, revision, token))
        in_use = {key: tensor.detach().clone() for key, tensor in self._tensors().items() if key in self._of_base}
        write(self.model, self._of_base)  # the hash is that of the base alone
        try:
            check_base(self.model, state)
        except ValueError as error:
            raise ValueError(f"{path} does not fit the model: {error}") from error
        finally:
            write(self.model, in_use)
        self._states[name] = state

    def use(self, name: str | None) -> None:
        """Put an adapter into the model instead of the one in use; ``None`` leaves the base alone.

        Raises:
            ValueError: There is no adapter of that name, or the one in use was merged into the base.
        """
        state = None if name is None else self._get(name)
        self._refuse_merged()
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
        r"""Add a new adapter that is the weighted sum of others.

        .. math:: \alpha U S V^T = \sum_i w_i \alpha_i U_i S_i V_i^T

        The sum is computed by QR of the joint bases and the SVD of the small core. It is exact while the sum of the
        ranks is at most ``max_rank`` (the largest among the adapters for that layer), and otherwise the best
        approximation of that rank. Whatever else was trained is summed as its difference from the base, with the same
        weights. Dropout and probes are those of the first adapter.

        Args:
            name: The name of the sum.
            weights: The weight of each adapter by name, any finite number.

        Returns:
            The Frobenius norm, over all layers and relative to the sum, of what the truncation to ``max_rank`` cut; 0
            if it cut nothing.

        Raises:
            ValueError: The name is taken or unknown, or a weight is not finite.
        """
        self._refuse_taken(name)
        if not weights or not all(torch.isfinite(torch.tensor(float(weight))) for weight in weights.values()):
            raise ValueError(f"weights={dict(weights)!r} must give a finite weight to at least one adapter")
        states = [(self._get(part), float(weight)) for part, weight in weights.items()]
        max_ranks: dict[str, int] = {}
        for state, _ in states:
            for layer, max_rank in state.max_ranks.items():
                max_ranks[layer] = max(max_rank, max_ranks.get(layer, 0))
        factors: dict[str, Factors] = {}
        cut = total = 0.0
        first = states[0][0]
        alpha = first.config.alpha
        for layer, max_rank in max_ranks.items():
            parts = [
                (state.factors[layer], weight * state.config.alpha / alpha)
                for state, weight in states
                if layer in state.factors
            ]
            factors[layer], sigma = _sum(parts, max_rank)
            cut += float(sigma[max_rank:].square().sum())
            total += float(sigma.square().sum())
        self._states[name] = replace(
            first,
            config=replace(
                config_of(max_ranks, alpha, first.config.dropout, first.config.probes),
                target_modules="|".join(str(state.config.target_modules) for state, _ in states),
            ),
            factors=factors,
            trained=self._sum_tensors([(state.trained, weight) for state, weight in states]),
            buffers=self._sum_tensors([(state.buffers, weight) for state, weight in states]),
        )
        return (cut / total) ** 0.5 if cut else 0.0

    def remove(self, name: str) -> None:
        """Remove an adapter from the library; if it was in use, the model is the base again.

        Raises:
            ValueError: There is no adapter of that name.
        """
        self._get(name)
        if self.in_use == name:
            self.use(None)
        del self._states[name]

    def _get(self, name: str) -> AdapterState:
        if name not in self._states:
            raise ValueError(
                f"name={name!r} is not an adapter of the library: it has {', '.join(self._states) or 'none'}"
            )
        return self._states[name]

    def _refuse_taken(self, name: str) -> None:
        if name in self._states:
            raise ValueError(f"name={name!r} is taken: remove it first, or choose another name")

    def _refuse_merged(self) -> None:
        """Refuse to go on if the adapter in use was merged; where it was removed by hand, the base is what it was."""
        if self.in_use is None or has_adapters(self.model):
            return
        state = self._states[self.in_use]
        if not is_same_base(base_hash(self.model, state.trained), state.base_hash):
            raise ValueError(
                f"{self.in_use} is in use, but the model holds no adapters: it was merged into the base, which would "
                "stay beneath the next one; unmerge it (MergedAdapters) first, or make a new library on a new base"
            )

    def _tensors(self) -> dict[str, Tensor]:
        return {**base_parameters(self.model), **base_buffers(self.model)}

    def _sum_tensors(self, parts: list[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
        of_model = self._tensors()
        summed: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for tensors, _ in parts for name in tensors):
            there = [(tensors[name], weight) for tensors, weight in parts if name in tensors]
            if not there[0][0].is_floating_point():  # a counter cannot be averaged
                summed[name] = there[0][0]
                continue
            base = self._of_base.get(name, of_model[name]).detach().to(there[0][0])
            summed[name] = base + sum(weight * (tensor - base) for tensor, weight in there)
        return summed


def _made_with(state: AdapterState) -> tuple[Mapping[str, int], float, float, int]:
    """The settings of adapters: if they are equal, new values overwrite the old; if not, adapters are made again."""
    return state.max_ranks, state.config.alpha, state.config.dropout, state.config.probes


def _sum(parts: list[tuple[Factors, float]], max_rank: int) -> tuple[Factors, Tensor]:
    """The sum, truncated to ``max_rank``, and all its singular values."""
    with exact_products(parts[0][0].U.device):
        A = torch.cat([weight * (U @ S) for (U, S, _), weight in parts], dim=1)
        B = torch.cat([V for (_, _, V), _ in parts], dim=1)
        total = svd_of_product(A, B, max_rank)
        return leading(*total), total.sigma
