"""Writes an export: everything that a service needs to answer, in formats that run no code when they are loaded."""

import json
from pathlib import Path

import pyarrow.parquet as pq
from safetensors.torch import save_file
from torch import Tensor

from recsys.data.manifest import Dataset
from recsys.predictor import Predictor


def write_export(predictor: Predictor, weights: dict[str, Tensor], dataset: Dataset, folder: Path, num_golden: int) -> None:
    """Write the files that `Predictor.from_export` reads; `predictor` must remember the dataset's users."""
    (folder / "config.json").write_text(predictor.config.model_dump_json(indent=1), encoding="utf-8")
    (folder / "dataset.json").write_text(dataset.manifest.model_dump_json(indent=1), encoding="utf-8")
    pq.write_table(dataset.catalogue, folder / "catalogue.parquet")
    pq.write_table(dataset.read_users(["user_id", "items", "events", "timestamps"]), folder / "users.parquet")
    save_file({name: tensor.float().contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    save_file({"item_vectors": predictor.item_vectors.contiguous()}, folder / "item_vectors.safetensors")
    golden = predictor.golden(num_golden)
    (folder / "golden.json").write_text(json.dumps(golden), encoding="utf-8")
