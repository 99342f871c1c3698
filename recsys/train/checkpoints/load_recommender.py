"""Loads a checkpoint on the CPU as a whole recommender or as a predictor."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from recsys.config import Config
from recsys.config.verb_settings import refuse_contradictions
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.model.recommender import Recommender, build_recommender
from recsys.model.text.queries import query_encoder_of
from recsys.predictor import Predictor, encode_catalogue
from recsys.store import Storage, private_folder
from recsys.train.checkpoints.manifest import CheckpointManifest, fetch_files, read_manifest
from recsys.train.engine import consolidate


def load_trained(storage: Storage, uri: str, scratch: str) -> tuple[CheckpointManifest, Config, Dataset, Recommender]:
    """Load a checkpoint, saved by any number of workers at any ZeRO stage, as a whole module on the CPU."""
    manifest = read_manifest(storage, uri)
    config = Config.model_validate(manifest.config).with_values({"run.scratch": scratch})
    dataset = Dataset.open(storage, manifest.dataset)
    recommender = build_recommender(config, dataset, torch.device("cpu"))
    recommender.load_state_dict(load_weights(storage, uri, manifest, scratch))
    return manifest, config, dataset, recommender.eval()


def load_weights(storage: Storage, uri: str, manifest: CheckpointManifest, scratch: str) -> dict[str, Tensor]:
    """Return a checkpoint's whole weights in float32."""
    folder = private_folder(Path(scratch) / "checkpoints" / f"whole-{manifest.attempt}")
    fetch_files(storage, uri, manifest, folder)
    weights = consolidate(folder)
    shutil.rmtree(folder)
    return weights


def with_given_ranking(trained: Config, config: Config) -> Config:
    """Return the config of a checkpoint with the section `ranking` that is given now, if any of it is."""
    is_given = any(key.startswith("ranking.") for key in config.given)
    return trained.model_copy(update={"ranking": config.ranking}) if is_given else trained


def build_predictor(config: Config, dataset: Dataset, recommender: Recommender) -> Predictor:
    """Build a predictor from a trained module; encodes the catalogue."""
    vectors = encode_catalogue(recommender.item_encoder, dataset.manifest.num_items, torch.device("cpu"))
    queries = query_encoder_of(config, dataset, recommender.item_encoder)
    return Predictor(config, dataset.manifest, recommender.catalogue, recommender.user_encoder, recommender.ranker, *vectors, queries)


def check_given(storage: Storage, config: Config, uri: str) -> CheckpointManifest:
    """Return a checkpoint's manifest; raise a UserError if keys given by the user contradict it."""
    manifest = read_manifest(storage, uri)
    refuse_contradictions(config, manifest.config, f"the checkpoint {uri}", "train with it under another run.name", manifest.run)
    if "data.dataset" in config.given:
        given = Dataset.open(storage, config.data.dataset)
        if given.manifest.fingerprint != manifest.dataset_fingerprint:
            raise UserError(
                f"data.dataset = {given.uri}: the checkpoint {uri} was trained on {manifest.dataset}; "
                "train on the other under another run.name, or leave the key out"
            )
    return manifest
