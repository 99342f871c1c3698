"""The config: frozen sections, read from TOML and `--set`, every key and every pair of keys checked before any work."""

from recsys.config.base import Section
from recsys.config.tree import Config, load_config

__all__ = ["Config", "Section", "load_config"]
