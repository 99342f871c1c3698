"""Steps per second of a language model trained with LoRA: each distinct item of a step encoded once, compared with every position.

`python -m tests.benchmarks.item_encoding ML_100K`, where ML_100K is a folder with MovieLens 100K in RecBole's files. Both variants use the
same model and samples, alternating; a step is forward, backward and AdamW. The gradients are compared without dropout, in training
precision and in float64, where a difference would not be rounding.
"""

import argparse
import copy
import csv
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recsys.config import Config, load_config
from recsys.data.batch import Batch, Collator
from recsys.data.manifest import Dataset, DatasetManifest
from recsys.data.sequences import Sequences
from recsys.model.item_encoder import ItemText
from recsys.model.recommender import Recommender
from recsys.model.text.backbones import load_backbone, load_tokenizer
from recsys.model.text.encoder import TextEncoder, locate_backbone, tokenize
from recsys.schema import CATALOGUE_SCHEMA, TIE_RULE
from recsys.store import Storage
from tests.backbones import save_backbone
from tests.benchmarks.tiny import add_tiny, write_movies
from tests.datasets import features_of


@dataclasses.dataclass(frozen=True)
class Movies:
    """Titles by catalogue index minus one, and each user's items, oldest first."""

    titles: list[str]
    histories: list[list[int]]


def main() -> None:
    """Print a table to stderr and one JSON line to stdout."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tiny:
            arguments.folder, arguments.backbone = str(write_movies(Path(folder))), save_backbone(Path(folder) / "backbone", "bert")
            arguments.users = 8
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Measure both variants and print the results."""
    values = ["model.text.mode=lora", "model.loss.kind=sampled", f"model.text.backbone={arguments.backbone}", *arguments.overrides]
    config = load_config(None, [*values, f"data.max_history={arguments.positions}"])
    movies = read_movies(Path(arguments.folder))
    model, manifest = build(config, movies)
    batches = sample_batches(manifest, config, movies, arguments)
    differences = gradient_differences(model, batches[0])
    seconds = time_in_turn(model, batches, config)
    ratios = [every / once for once, every in zip(*seconds.values(), strict=True)]
    result = {
        "users": arguments.users,
        "positions": arguments.positions,
        "encoded_once": statistics.mean(len(batch.items) for batch in batches),
        "encoded_every_position": statistics.mean(len(encode_every_position(batch).items) for batch in batches),
        **{f"{name}_steps_per_second": 1 / statistics.median(times) for name, times in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        **differences,
    }
    for name, value in result.items():
        print(f"{name:<36}{value:>12.4g}", file=sys.stderr)
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?")
    add_tiny(parser)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--users", type=int, default=128)
    parser.add_argument("--positions", type=int, default=50)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each, after one that is not")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="section.key=value")
    return parser.parse_args()


def read_movies(folder: Path) -> Movies:
    items, events = (_read_columns(folder / f"{folder.name}.{kind}") for kind in ("item", "inter"))
    index = {item: number for number, item in enumerate(items["item_id"], start=1)}
    histories: dict[str, list[int]] = {}
    by_time = sorted(zip(map(float, events["timestamp"]), events["user_id"], events["item_id"], strict=True), key=lambda event: event[0])
    for _, user, item in by_time:
        histories.setdefault(user, []).append(index[item])
    return Movies(items["movie_title"], [histories[user] for user in sorted(histories)])


def _read_columns(path: Path) -> dict[str, list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    return {name.partition(":")[0]: [row[column] for row in rows] for column, name in enumerate(names)}


def build(config: Config, movies: Movies) -> tuple[Recommender, DatasetManifest]:
    """Build a model with ids and titles, and the manifest of a dataset without files."""
    counts = np.bincount([item for history in movies.histories for item in history], minlength=len(movies.titles) + 1)
    empty = {"categories": [], "numbers": [], "vector": []}
    rows = [
        {"item_index": index, "item_id": str(index), "title": title, "text": title, "train_count": int(counts[index]), **empty}
        for index, title in enumerate(movies.titles, start=1)
    ]
    manifest = DatasetManifest(
        fingerprint="",
        inputs=(),
        data_config={},
        tie_rule=TIE_RULE,
        num_users=len(movies.histories),
        num_items=len(rows),
        num_interactions=int(counts.sum()),
        num_targets=0,
        rejected={},
        event_kinds=("interaction",),
        tasks=(),
        value_mean=0.0,
        value_std=1.0,
        has_time=False,
        num_streams=1,
        category_vocabulary=(),
        number_columns=(),
        vector_size=0,
        train_shards=(),
        users_shards=(),
        catalogue_shards=(),
    )
    dataset = Dataset(Storage(str(Path(config.run.scratch).absolute())), "", manifest)
    folder = locate_backbone(config.model.text, dataset, Path(config.run.scratch))
    tokens, mask = tokenize(load_tokenizer(folder), ["", *movies.titles], config.model.text.max_tokens)
    torch.manual_seed(config.training.seed)
    encoder = TextEncoder(load_backbone(folder, config.model.text), config.model.text.pooling)
    text = ItemText(tokens=tokens.int(), lengths=mask.sum(1).int(), encoder=encoder)
    catalogue = features_of(pa.Table.from_pylist(rows, CATALOGUE_SCHEMA), num_categories=0)
    return Recommender(config, dataset, catalogue, text), manifest


def sample_batches(manifest: DatasetManifest, config: Config, movies: Movies, arguments: argparse.Namespace) -> list[Batch]:
    """Draw one batch per step and one for warm-up: users with full histories, cut from their beginning."""
    length = arguments.positions + 1
    generator = np.random.default_rng(0)
    long = np.array([history[:length] for history in movies.histories if len(history) >= length], np.int32)
    collate, num_negatives = Collator(manifest, takes_whole_catalogue=False), config.model.loss.num_negatives
    batches = []
    for _ in range(1 + arguments.steps):
        chosen = generator.choice(len(long), arguments.users, replace=False)
        offsets, ones = np.arange(arguments.users + 1) * length, np.ones(arguments.users, np.int64)
        rows = Sequences.of_offsets({"items": long[chosen].reshape(-1)}, offsets, sample_id=chosen.astype(np.int64), first_target=ones)
        negatives = torch.from_numpy(generator.integers(1, manifest.num_items + 1, num_negatives))
        batches.append(collate(rows, negatives, torch.full((num_negatives,), 1 / manifest.num_items).log()))
    return batches


def encode_every_position(batch: Batch) -> Batch:
    """Replace each history position, negative and last target by a separate item to encode, without changing the losses.

    A target that equals the next item of its history shares that position's vector, as in a plain sequence model.
    """
    places = batch.histories.items
    after = (batch.target_places + 1).clamp(max=len(places) - 1)
    is_after = places[after] == batch.targets
    items = torch.cat(
        [torch.zeros(1, dtype=torch.long), *(batch.items[part] for part in (places, batch.targets[~is_after], batch.negatives))]
    )
    own_targets, num_own = 1 + len(places), int((~is_after).sum())
    targets = 1 + after
    targets[~is_after] = torch.arange(own_targets, own_targets + num_own)
    return dataclasses.replace(
        batch,
        items=items,
        items_on_host=items.numpy(),
        histories=dataclasses.replace(batch.histories, items=torch.where(places == 0, 0, torch.arange(1, 1 + len(places)))),
        targets=targets,
        negatives=torch.arange(own_targets + num_own, len(items)),
    )


def gradient_differences(model: Recommender, batch: Batch) -> dict[str, float]:
    """Compare the gradients of both variants in float32 and in float64, and each float32 gradient with the float64 gradient."""
    variants, exact = (batch, encode_every_position(batch)), copy.deepcopy(model).double()
    once, every = (_gradients(model, variant) for variant in variants)
    exact_once, exact_every = (_gradients(exact, variant) for variant in variants)
    return {
        "gradient_difference": _difference(once, every),
        "gradient_difference_float64": _difference(exact_once, exact_every),
        "once_from_exact": _difference(once, exact_every),
        "every_position_from_exact": _difference(every, exact_every),
    }


def _gradients(model: Recommender, batch: Batch) -> dict[str, Tensor]:
    model.eval().zero_grad()
    _loss(model, batch).backward()
    model.train()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference relative to the largest entry of each parameter's gradient."""
    return max(float((ours[name] - other).abs().max() / other.abs().max().clamp(min=1e-12)) for name, other in theirs.items())


def _loss(model: Recommender, batch: Batch) -> Tensor:
    return sum(model(batch).values(), torch.zeros(())) / len(batch.targets)


def time_in_turn(model: Recommender, batches: Sequence[Batch], config: Config) -> dict[str, list[float]]:
    """Return the seconds of each step of both variants, without the first."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.backbone_learning_rate)
    seconds: dict[str, list[float]] = {"once": [], "every_position": []}
    for number, batch in enumerate(batches):
        for name, variant in (("once", batch), ("every_position", encode_every_position(batch))):
            begin = time.perf_counter()
            optimizer.zero_grad()
            _loss(model, variant).backward()
            optimizer.step()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


if __name__ == "__main__":
    main()
