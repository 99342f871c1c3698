"""The config: frozen sections, loaded from TOML and `--set`, validated before any work starts."""

from recsys.config.base import Section
from recsys.config.root import Config, load_config

__all__ = ["Config", "Section", "load_config"]
