# The public names, once: __init__.py reads them here, and so do type checkers.
from geolora_pl.adapters.base import GeoLoRALayer as GeoLoRALayer
from geolora_pl.adapters.config import AdapterConfig as AdapterConfig
from geolora_pl.adapters.inject import inject_adapters as inject_adapters
from geolora_pl.adapters.inject import remove_adapters as remove_adapters
from geolora_pl.adapters.kinds import GeoLoRALinear as GeoLoRALinear
from geolora_pl.adapters.merge import MergedAdapters as MergedAdapters
from geolora_pl.adapters.merge import merge_adapters as merge_adapters
from geolora_pl.adapters.registry import register_adapter as register_adapter
from geolora_pl.errors import GeoLoRAWarning as GeoLoRAWarning
from geolora_pl.huggingface.callback import GeoLoRATrainerCallback as GeoLoRATrainerCallback
from geolora_pl.lightning.averaging import GeoLoRAEMAWeightAveraging as GeoLoRAEMAWeightAveraging
from geolora_pl.lightning.callback import GeoLoRACallback as GeoLoRACallback
from geolora_pl.lightning.module import GeoLoRAModule as GeoLoRAModule
from geolora_pl.lightning.predictions import PredictionWriter as PredictionWriter
from geolora_pl.lightning.predictions import predict as predict
from geolora_pl.lightning.push import push_to_hub as push_to_hub
from geolora_pl.storage.adapter_file import load_adapter as load_adapter
from geolora_pl.storage.adapter_file import save_adapter as save_adapter
from geolora_pl.storage.library import AdapterLibrary as AdapterLibrary
from geolora_pl.storage.peft import export_peft as export_peft
from geolora_pl.storage.peft_import import import_peft as import_peft
from geolora_pl.training.groups import parameter_groups as parameter_groups
from geolora_pl.training.integrator import RankAdaptiveIntegrator as RankAdaptiveIntegrator
from geolora_pl.training.optim import RiemannianAdam as RiemannianAdam
from geolora_pl.training.schedule import warmup_cosine as warmup_cosine

__version__: str
