"""GeoLoRA: low-rank fine-tuning that finds its own ranks, for PyTorch Lightning.

Names are imported at their first use: the adapters, the integrator and the optimizer do without Lightning.
"""

from typing import TYPE_CHECKING

from geolora_pl.lazy import lazy_exports

if TYPE_CHECKING:
    from geolora_pl.adapters import GeoLoRALayer, GeoLoRALinear
    from geolora_pl.callback import GeoLoRACallback
    from geolora_pl.config import AdapterConfig
    from geolora_pl.errors import GeoLoRAWarning
    from geolora_pl.files import load_adapter, save_adapter
    from geolora_pl.inject import inject_adapters, merge_adapters, remove_adapters
    from geolora_pl.integrator import RankAdaptiveIntegrator
    from geolora_pl.layers import register_adapter
    from geolora_pl.library import AdapterLibrary
    from geolora_pl.merge import MergedAdapters
    from geolora_pl.module import GeoLoRAModule
    from geolora_pl.optim import RiemannianAdam, parameter_groups
    from geolora_pl.peft import export_peft, import_peft
    from geolora_pl.predictions import PredictionWriter, predict
    from geolora_pl.schedule import warmup_cosine

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
        "adapters": ["GeoLoRALayer", "GeoLoRALinear"],
        "callback": ["GeoLoRACallback"],
        "config": ["AdapterConfig"],
        "errors": ["GeoLoRAWarning"],
        "files": ["load_adapter", "save_adapter"],
        "inject": ["inject_adapters", "merge_adapters", "remove_adapters"],
        "integrator": ["RankAdaptiveIntegrator"],
        "layers": ["register_adapter"],
        "library": ["AdapterLibrary"],
        "merge": ["MergedAdapters"],
        "module": ["GeoLoRAModule"],
        "optim": ["RiemannianAdam", "parameter_groups"],
        "peft": ["export_peft", "import_peft"],
        "predictions": ["PredictionWriter", "predict"],
        "schedule": ["warmup_cosine"],
    },
)
