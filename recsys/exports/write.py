"""Writes an export, in formats that run no code when they are loaded."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file
from torch import Tensor

from recsys.arrays import Integers
from recsys.data.items import ITEM_INDEX, CatalogueSource
from recsys.data.manifest import Dataset
from recsys.data.sequences import HISTORY_COLUMNS
from recsys.exports.golden import golden_answers
from recsys.exports.load import USERS_FILE
from recsys.exports.profiles import ArrowProfiles, write_profiles
from recsys.model.text.queries import TOKENIZER_AND_BACKBONE
from recsys.predictor import Predictor
from recsys.schema import CATALOGUE_SCHEMA, USER_ID


def write_export(predictor: Predictor, weights: dict[str, Tensor], dataset: Dataset, folder: Path, num_golden: int) -> None:
    """Write the files that `load_export` reads."""
    (folder / "config.json").write_text(predictor.config.model_dump_json(indent=1), encoding="utf-8")
    (folder / "dataset.json").write_text(dataset.manifest.model_dump_json(indent=1), encoding="utf-8")
    _write_catalogue(dataset, predictor.catalogue.train_count.numpy(), folder / "catalogue.parquet")
    write_profiles(dataset.read_users([USER_ID, *HISTORY_COLUMNS]), folder / USERS_FILE)
    if predictor.query_encoder is not None:
        predictor.query_encoder.save(folder / TOKENIZER_AND_BACKBONE)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("item_encoder.text_encoder.")}
    save_file({name: tensor.float().contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    vectors = {"item_vectors": predictor.item_vectors, "text_vectors": predictor.text_vectors}
    save_file({name: tensor.contiguous() for name, tensor in vectors.items() if tensor is not None}, folder / "item_vectors.safetensors")
    golden = golden_answers(predictor, ArrowProfiles.open(folder / USERS_FILE), num_golden)
    (folder / "golden.json").write_text(json.dumps(golden), encoding="utf-8")


def _write_catalogue(dataset: Dataset, train_count: Integers, path: Path) -> None:
    """Write the catalogue part by part, with the training interactions of all versions counted, (I + 1,)."""
    column = CATALOGUE_SCHEMA.get_field_index("train_count")
    with pq.ParquetWriter(path, CATALOGUE_SCHEMA) as writer:
        for part in CatalogueSource.of_dataset(dataset).sorted_rows(CATALOGUE_SCHEMA.names[1:]):
            counts = pa.array(train_count[part[ITEM_INDEX].to_numpy()], pa.int64())
            writer.write_table(part.set_column(column, "train_count", counts).cast(CATALOGUE_SCHEMA))
