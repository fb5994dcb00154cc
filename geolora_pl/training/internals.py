"""The only door of this folder to private names of torch; docs/architecture.md says why each is needed."""

from collections.abc import Sequence

from torch import _foreach_add_ as foreach_add_
from torch import _foreach_copy_ as foreach_copy_
from torch import _foreach_lerp_ as foreach_lerp_
from torch import _foreach_mul as foreach_mul
from torch import _foreach_mul_ as foreach_mul_
from torch import _foreach_norm as foreach_norm
from torch import _foreach_zero_ as foreach_zero_
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "foreach_add_",
    "foreach_copy_",
    "foreach_lerp_",
    "foreach_mul",
    "foreach_mul_",
    "foreach_norm",
    "foreach_zero_",
    "leave_to_each_process",
]


def leave_to_each_process(module: nn.Module, names: Sequence[str]) -> None:
    """Keep DistributedDataParallel, which is yet to come around a module, from sending parameters by these names."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
