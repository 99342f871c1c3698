"""RecTools' SASRec on sequences from a file: trains for some seconds on each request, and ranks. Runs in its own environment."""

import json
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

WARM_UP_STEPS = 2
TRAINING, TEST = 0, 2


@dataclass
class Clock(Callback):
    """Counts the sequences of complete steps after a warm-up, and stops training after `limit_seconds`."""

    limit_seconds: float
    num_steps: int = 0
    num_sequences: int = 0
    begin: float = 0.0
    seconds: float = 0.0

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: dict[str, torch.Tensor], batch_index: int) -> None:
        """Count a complete step: its batch, forward, backward and update."""
        self.num_steps += 1
        if self.num_steps <= WARM_UP_STEPS:
            self.begin = time.perf_counter()
            return
        self.num_sequences += len(batch["x"])
        self.seconds = time.perf_counter() - self.begin
        trainer.should_stop = self.seconds >= self.limit_seconds


class Peer:
    """Holds the sequences and trains models on them."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        with np.load(options["data"]) as arrays:
            table = pd.DataFrame({name: arrays[name] for name in ("user", "item", "position", "part")})
        names = {"user": Columns.User, "item": Columns.Item, "position": Columns.Datetime}
        table = table.rename(columns=names).assign(**{Columns.Weight: 1.0})
        table[Columns.Datetime] = pd.to_datetime(table[Columns.Datetime], unit="s")
        kept = [Columns.User, Columns.Item, Columns.Datetime, Columns.Weight]
        self._training = Dataset.construct(table.loc[table["part"] == TRAINING, kept])
        self._known = Dataset.construct(table.loc[table["part"] < TEST, kept])

    def train(self, seconds: float) -> tuple[SASRecModel, Clock]:
        """Train a new model for some seconds of steps; return it and its clock."""
        options = self._options
        seed_everything(options["seed"], verbose=False)

        def make_trainer() -> Trainer:
            quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
            return Trainer(max_epochs=-1, accelerator="cpu", devices=1, callbacks=[Clock(seconds)], **quiet)

        model = SASRecModel(
            n_factors=options["width"],
            n_blocks=options["num_layers"],
            n_heads=options["num_heads"],
            dropout_rate=options["dropout"],
            session_max_len=options["max_history"],
            loss=options["loss"],
            n_negatives=options["num_negatives"],
            lr=options["learning_rate"],
            batch_size=options["batch_size"],
            get_trainer_func=make_trainer,
        )
        model.fit(self._training)
        # fit uses a copy of the trainer, and so a copy of its clock.
        return model, next(callback for callback in model.fit_trainer.callbacks if isinstance(callback, Clock))

    def rank(self, model: SASRecModel, users: list[int], k: int) -> dict[int, list[int]]:
        """Rank each user's unseen items, best first, from the history before the test split; only items of the training data are ranked."""
        found = model.recommend(np.array(users), self._known, k=k, filter_viewed=True, on_unsupported_targets="warn")
        found = found.sort_values([Columns.User, Columns.Rank])
        return {int(user): rows.tolist() for user, rows in found.groupby(Columns.User)[Columns.Item]}


def main() -> None:
    """Answer each request, one JSON object per line of standard input."""
    warnings.simplefilter("ignore")
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["num_threads"])
    peer = Peer(options)
    print("ANSWER " + json.dumps({"version": __import__("rectools").__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.perf_counter()
        model, clock = peer.train(request["seconds"])
        answer: dict[str, Any] = {"num_sequences": clock.num_sequences, "seconds": clock.seconds, "num_steps": clock.num_steps}
        answer["wall_seconds"] = time.perf_counter() - begin
        if request.get("users"):
            answer["lists"] = list(peer.rank(model, request["users"], request["k"]).items())
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
