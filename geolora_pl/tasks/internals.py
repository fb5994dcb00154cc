"""The only door of this folder to private names of timm; docs/architecture.md says why each is needed."""

from timm.models._hub import save_config_for_hf

__all__ = ["save_config_for_hf"]
