"""Loads an export's folder, whose files the registry has verified."""

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from safetensors.torch import load_file

from recsys.config import Config
from recsys.data.items import ItemFeatures
from recsys.data.manifest import DatasetManifest
from recsys.exports.golden import check_golden
from recsys.exports.profiles import ArrowProfiles
from recsys.model.ranker import Ranker, build_regression
from recsys.model.text.queries import TOKENIZER_AND_BACKBONE, QueryEncoder
from recsys.model.user_encoder import UserEncoder
from recsys.predictor import Predictor

PROJECTION = "item_encoder.sources.text."
USERS_FILE = "users.arrow"
USERS_FILE_0_1 = "users.parquet"
"""What release 0.1 wrote; it is read into memory."""


@dataclass(frozen=True)
class Export:
    """A version that is loaded to answer: its predictor, and what its users did."""

    predictor: Predictor
    profiles: ArrowProfiles


def load_export(folder: Path, scratch: Path | None = None) -> Export:
    """Load a version; with `scratch` the processes of a node share the catalogue.

    Raises:
        UserError: the export is of another format, or the loaded model does not give the golden scores that it was published with.
    """
    config = Config.model_validate_json((folder / "config.json").read_bytes())
    manifest = DatasetManifest.parse((folder / "dataset.json").read_bytes(), str(folder / "dataset.json"))
    catalogue = ItemFeatures.read_file(folder / "catalogue.parquet", manifest, scratch)
    user_encoder = UserEncoder(config, manifest)
    vectors = load_file(folder / "item_vectors.safetensors")
    ranker = Ranker(config.model, manifest.tasks, "text_vectors" in vectors, regression=build_regression(config.model, manifest))
    weights = load_file(folder / "model.safetensors")
    for name, module in (("user_encoder.", user_encoder), ("ranker.", ranker)):
        module.load_state_dict({key.removeprefix(name): value.float() for key, value in weights.items() if key.startswith(name)})
    queries = None
    if config.model.has_queries:
        projection = {key.removeprefix(PROJECTION): value.float() for key, value in weights.items() if key.startswith(PROJECTION)}
        queries = QueryEncoder.load(folder / TOKENIZER_AND_BACKBONE, config, projection)
    predictor = Predictor(config, manifest, catalogue, user_encoder.eval(), ranker.eval(), **vectors, query_encoder=queries)
    profiles = _profiles(folder)
    check_golden(predictor, profiles, json.loads((folder / "golden.json").read_bytes()))
    return Export(predictor, profiles)


def _profiles(folder: Path) -> ArrowProfiles:
    if (folder / USERS_FILE).exists():
        return ArrowProfiles.open(folder / USERS_FILE)
    return ArrowProfiles.of_users(pq.read_table(folder / USERS_FILE_0_1))
