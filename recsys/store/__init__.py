"""Object storage: local folders and S3 behind one class, `Storage`."""

from recsys.store.backends import ObjectInfo, ReplacedError
from recsys.store.storage import Storage, fixed_part, join, private_folder, sha256_of

__all__ = ["ObjectInfo", "ReplacedError", "Storage", "fixed_part", "join", "private_folder", "sha256_of"]
