"""Writes and loads an export's files, in formats that run no code on loading, and checks them against golden answers."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file
from torch import Tensor

from recsys.arrays import Integers
from recsys.config import Config
from recsys.data.items import ITEM_INDEX, CatalogueSource, ItemFeatures
from recsys.data.manifest import Dataset, DatasetManifest
from recsys.data.sequences import HISTORY_COLUMNS, Sequences
from recsys.data.text.queries import EVALUATION_VARIANT, drop_words
from recsys.errors import UserError
from recsys.exports.profiles import ArrowProfiles, ProfileStore, write_profiles
from recsys.model.ranker import Ranker, build_regression
from recsys.model.text.queries import TOKENIZER_AND_BACKBONE, QueryEncoder
from recsys.model.user_encoder import UserEncoder
from recsys.predictor import Predictor
from recsys.schema import CATALOGUE_SCHEMA, LISTED_SCHEMA, PROFILE_COLUMNS, USER_ID

PROJECTION = "item_encoder.sources.text."
USERS_FILE = "users.arrow"
USERS_FILE_0_1 = "users.parquet"
"""The file that release 0.1 wrote, which is loaded into memory."""

ONLY_TRAINED = ("ranker.display_bias",)
"""Weights that a version is not served with."""

FILES = ("config.json", "dataset.json", "catalogue.parquet", "item_vectors.safetensors", "model.safetensors", "golden.json")
"""Files of every export, also of release 0.1."""

TOLERANCE = 1e-4
SPARE_ITEMS = 10
"""Items below a golden list that are compared, too: rounding may change which of almost equal ones is the last."""


@dataclass(frozen=True)
class Export:
    """A loaded version: its predictor, and its users' histories."""

    predictor: Predictor
    profiles: ArrowProfiles


def write_export(predictor: Predictor, weights: dict[str, Tensor], dataset: Dataset, folder: Path, num_golden: int) -> None:
    """Write the files that `load_export` reads."""
    (folder / "config.json").write_text(predictor.config.model_dump_json(indent=1), encoding="utf-8")
    (folder / "dataset.json").write_text(dataset.manifest.model_dump_json(indent=1), encoding="utf-8")
    _write_catalogue(dataset, predictor.catalogue.train_count.numpy(), folder / "catalogue.parquet")
    write_profiles(_stored_users(dataset, predictor.reads_profiles), folder / USERS_FILE)
    if predictor.query_encoder is not None:
        predictor.query_encoder.save(folder / TOKENIZER_AND_BACKBONE)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("item_encoder.text_encoder.")}
    served = {name: tensor for name, tensor in weights.items() if name not in ONLY_TRAINED}
    save_file({name: tensor.float().contiguous() for name, tensor in served.items()}, folder / "model.safetensors")
    vectors = {"item_vectors": predictor.item_vectors, "text_vectors": predictor.text_vectors}
    save_file({name: tensor.contiguous() for name, tensor in vectors.items() if tensor is not None}, folder / "item_vectors.safetensors")
    golden = golden_answers(predictor, ArrowProfiles.open(folder / USERS_FILE), num_golden)
    (folder / "golden.json").write_text(json.dumps(golden), encoding="utf-8")


def _stored_users(dataset: Dataset, has_profiles: bool) -> pa.Table:
    """Read the users with their histories; with profiles also the users of the users table who have no history."""
    if not has_profiles:
        return dataset.read_users([USER_ID, *HISTORY_COLUMNS])
    users = dataset.read_users([USER_ID, *HISTORY_COLUMNS, *PROFILE_COLUMNS])
    listed = pa.concat_tables([LISTED_SCHEMA.empty_table(), *(dataset.read_shard(shard) for shard in dataset.manifest.listed_shards)])
    rows = pa.table([listed[USER_ID], pa.array(np.arange(listed.num_rows))], [USER_ID, "row"])
    newest = listed.take(rows.group_by(USER_ID, use_threads=False).aggregate([("row", "max")])["row_max"])
    new = newest.filter(pc.invert(pc.is_in(newest[USER_ID], value_set=users[USER_ID].combine_chunks())))
    nothing = {name: pa.array([[]] * new.num_rows, users.schema.field(name).type) for name in HISTORY_COLUMNS}
    columns = {name: nothing[name] if name in nothing else new[name] for name in users.column_names}
    return pa.concat_tables([users, pa.table(columns)])


def _write_catalogue(dataset: Dataset, train_count: Integers, path: Path) -> None:
    """Write the catalogue in parts, with `train_count` (I + 1,) over all versions."""
    column = CATALOGUE_SCHEMA.get_field_index("train_count")
    with pq.ParquetWriter(path, CATALOGUE_SCHEMA) as writer:
        for part in CatalogueSource.of_dataset(dataset).sorted_rows(CATALOGUE_SCHEMA.names[1:]):
            counts = pa.array(train_count[part[ITEM_INDEX].to_numpy()], pa.int64())
            writer.write_table(part.set_column(column, "train_count", counts).cast(CATALOGUE_SCHEMA))


def load_export(folder: Path, scratch: Path | None = None) -> Export:
    """Load a version whose files the registry has verified; with `scratch`, the processes of a node share the catalogue.

    Raises:
        UserError: the export has another format or lacks a file, or the loaded model does not reproduce the golden scores that it was
            published with.
    """
    if missing := [name for name in FILES if not (folder / name).exists()]:
        raise UserError(f"export: has no {missing[0]}; publish it again")
    config = Config.model_validate_json((folder / "config.json").read_bytes())
    manifest = DatasetManifest.parse((folder / "dataset.json").read_bytes(), str(folder / "dataset.json"))
    catalogue = ItemFeatures.read_file(folder / "catalogue.parquet", manifest, scratch)
    vectors, weights = load_file(folder / "item_vectors.safetensors"), load_file(folder / "model.safetensors")

    def weights_of(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): weight.float() for name, weight in weights.items() if name.startswith(prefix)}

    user_encoder = UserEncoder(config, manifest)
    ranker = Ranker(config.model, manifest.tasks, "text_vectors" in vectors, regression=build_regression(config.model, manifest))
    user_encoder.load_state_dict(weights_of("user_encoder."))
    ranker.load_state_dict(weights_of("ranker."))
    has_queries = config.model.has_queries
    queries = QueryEncoder.load(folder / TOKENIZER_AND_BACKBONE, config, weights_of(PROJECTION)) if has_queries else None
    predictor = Predictor(config, manifest, catalogue, user_encoder.eval(), ranker.eval(), **vectors, query_encoder=queries)
    if (folder / USERS_FILE).exists():
        profiles = ArrowProfiles.open(folder / USERS_FILE)
    else:
        profiles = ArrowProfiles.of_users(pq.read_table(folder / USERS_FILE_0_1))
    check_golden(predictor, profiles, json.loads((folder / "golden.json").read_bytes()))
    return Export(predictor, profiles)


def golden_answers(predictor: Predictor, profiles: ArrowProfiles, num_users: int, k: int = 10) -> list[dict[str, Any]]:
    """Return the recommendations for some users. A model with queries answers each user once more, for words of the last item's text."""
    users = list(islice(profiles.items(), num_users))
    asked: list[tuple[str, str | None, Sequences]] = [(user_id, None, history) for user_id, history in users]
    if predictor.query_encoder is not None:
        taken = [(user_id, item, history) for user_id, history in users for item in history.items[-1:].tolist()]
        texts = predictor.catalogue.texts
        asked += [(user_id, drop_words(texts[item], item, EVALUATION_VARIANT), history) for user_id, item, history in taken]
    if not asked:
        return []
    user_ids, queries, histories = zip(*asked, strict=True)
    rankings = predictor.recommend(histories, k, [history.items for history in histories], queries)
    return [
        {"user_id": user_id, "query": query, "items": ranking.items.tolist(), "scores": ranking.scores.tolist()}
        for user_id, query, ranking in zip(user_ids, queries, rankings, strict=True)
    ]


def check_golden(predictor: Predictor, profiles: ProfileStore, golden: list[dict[str, Any]]) -> None:
    """Compare the predictor's scores with the published answers.

    Raises:
        UserError: a user is missing, or a score differs by more than `TOLERANCE`.
    """
    for row in golden:
        history = profiles.find(str(row["user_id"]))
        if history is None:
            raise UserError(f"export: user {row['user_id']} of its golden answers is missing; publish it again")
        (ranking,) = predictor.recommend([history], len(row["items"]) + SPARE_ITEMS, [history.items], [row.get("query")])
        found = dict(zip(ranking.items.tolist(), ranking.scores.tolist(), strict=True))
        scores = [found.get(item, np.nan) for item in row["items"]]  # by item, since items with almost equal scores may change places
        if not np.allclose(scores, row["scores"], rtol=TOLERANCE, atol=TOLERANCE):
            raise UserError(f"export: user {row['user_id']} gets different scores than when it was published; publish it again")
