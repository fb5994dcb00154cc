"""GeoLoRA: low-rank fine-tuning that finds its own ranks, for PyTorch Lightning.

Names are imported at their first use: the adapters, the integrator and the optimizer do without Lightning.
"""

from typing import TYPE_CHECKING

from geolora_pl.lazy import lazy_exports

if TYPE_CHECKING:
    from geolora_pl.adapters.base import GeoLoRALayer
    from geolora_pl.adapters.config import AdapterConfig
    from geolora_pl.adapters.inject import inject_adapters, remove_adapters
    from geolora_pl.adapters.kinds import GeoLoRALinear
    from geolora_pl.adapters.merge import MergedAdapters, merge_adapters
    from geolora_pl.adapters.registry import register_adapter
    from geolora_pl.errors import GeoLoRAWarning
    from geolora_pl.lightning.callback import GeoLoRACallback
    from geolora_pl.lightning.module import GeoLoRAModule
    from geolora_pl.lightning.predictions import PredictionWriter, predict
    from geolora_pl.storage.adapter_file import load_adapter, save_adapter
    from geolora_pl.storage.library import AdapterLibrary
    from geolora_pl.storage.peft import export_peft, import_peft
    from geolora_pl.training.integrator import RankAdaptiveIntegrator
    from geolora_pl.training.optim import RiemannianAdam, parameter_groups
    from geolora_pl.training.schedule import warmup_cosine

__all__ = [
    "AdapterConfig",
    "AdapterLibrary",
    "GeoLoRACallback",
    "GeoLoRALayer",
    "GeoLoRALinear",
    "GeoLoRAModule",
    "GeoLoRAWarning",
    "MergedAdapters",
    "PredictionWriter",
    "RankAdaptiveIntegrator",
    "RiemannianAdam",
    "export_peft",
    "import_peft",
    "inject_adapters",
    "load_adapter",
    "merge_adapters",
    "parameter_groups",
    "predict",
    "register_adapter",
    "remove_adapters",
    "save_adapter",
    "warmup_cosine",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "adapters.base": ["GeoLoRALayer"],
        "adapters.config": ["AdapterConfig"],
        "adapters.inject": ["inject_adapters", "remove_adapters"],
        "adapters.kinds": ["GeoLoRALinear"],
        "adapters.merge": ["MergedAdapters", "merge_adapters"],
        "adapters.registry": ["register_adapter"],
        "errors": ["GeoLoRAWarning"],
        "lightning.callback": ["GeoLoRACallback"],
        "lightning.module": ["GeoLoRAModule"],
        "lightning.predictions": ["PredictionWriter", "predict"],
        "storage.adapter_file": ["load_adapter", "save_adapter"],
        "storage.library": ["AdapterLibrary"],
        "storage.peft": ["export_peft", "import_peft"],
        "training.integrator": ["RankAdaptiveIntegrator"],
        "training.optim": ["RiemannianAdam", "parameter_groups"],
        "training.schedule": ["warmup_cosine"],
    },
)
