"""The plain model inside of wrappers such as those of torch.compile and DataParallel, whose names do not count."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from geolora_pl.adapters.internals import children
from geolora_pl.adapters.names import ancestors

# Where a wrapper keeps the module inside of it, by the name of its class, which need not be imported for that.
_INSIDE = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
}


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """Give the plain model, with the names that its modules have without wrappers, around it and inside of it.

    Wrappers inside of the model are taken out for the block, and are back after it, also around a layer that was
    replaced in the meantime.

    Args:
        model: Any module, such as the result of ``torch.compile``, or one with compiled modules in it.

    Example:
        >>> model = nn.DataParallel(nn.Sequential(nn.DataParallel(nn.Linear(2, 2))))
        >>> with unwrapped(model) as plain:
        ...     print([name for name, _ in plain.named_parameters()])
        ['0.weight', '0.bias']
        >>> [name for name, _ in model.named_parameters()]
        ['module.0.module.weight', 'module.0.module.bias']
    """
    plain = _opened(model)
    taken_out: list[tuple[str, nn.Module]] = []
    try:
        _take_out(plain, "", taken_out)
        yield plain
    finally:
        for name, wrapper in reversed(taken_out):
            plain.set_submodule(name, _around(wrapper, plain.get_submodule(name)))


def wrapper_names(model: nn.Module) -> list[str]:
    """The names of the modules inside of wrappers, each of which ends with a part that the plain model does not have.

    Example:
        >>> wrapper_names(nn.Sequential(nn.DataParallel(nn.Linear(2, 2))))
        ['0.module']
    """
    inside = {name: _attribute(module) for name, module in model.named_modules(remove_duplicate=False)}
    return [f"{name}.{attribute}".lstrip(".") for name, attribute in inside.items() if attribute is not None]


def plain_name(name: str, wrappers: Collection[str]) -> str:
    """The name that a tensor has in the plain model.

    Args:
        name: Its name in the model with wrappers.
        wrappers: What :func:`wrapper_names` says of that model; a set of it where many names are asked for.

    Example:
        >>> plain_name("0.module.weight", ["0.module"])
        '0.weight'
    """
    *around, last = name.split(".")
    return ".".join([*(part for part, path in zip(around, ancestors(name), strict=True) if path not in wrappers), last])


def _attribute(module: nn.Module) -> str | None:
    """The attribute in which a module keeps the one that it wraps; ``None`` if it is not a wrapper."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__)
    return next((_INSIDE[name] for name in names if name in _INSIDE), None)


def _opened(module: nn.Module) -> nn.Module:
    """The module inside of all wrappers around it."""
    while (attribute := _attribute(module)) is not None:
        module = getattr(module, attribute)
    return module


def _take_out(module: nn.Module, prefix: str, taken_out: list[tuple[str, nn.Module]]) -> None:
    """Put what is inside of wrappers in their place, outside before inside, and note each with its name."""
    for name, child in children(module):
        inside = _opened(child)
        if inside is not child:
            taken_out.append((prefix + name, child))  # before, so that an interrupt loses none
            module.set_submodule(name, inside)
        _take_out(inside, f"{prefix}{name}.", taken_out)


def _around(wrapper: nn.Module, inside: nn.Module) -> nn.Module:
    """A wrapper, or several, around a module, which is a new one if a layer was replaced."""
    attribute = _attribute(wrapper)
    if attribute is None or _opened(wrapper) is inside:
        return inside if attribute is None else wrapper
    around = _around(getattr(wrapper, attribute), inside)
    if attribute == "_orig_mod":
        return wrapper.dynamo_ctx(around)  # type: ignore[no-any-return, operator]  # what compiled the old one
    setattr(wrapper, attribute, around)
    return wrapper
