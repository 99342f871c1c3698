"""A plain PyTorch loop with our model and loss over batches in memory: the upper limit for a training loop."""

import itertools
import json
import sys
import time

import torch

from recsys.config import load_config
from recsys.data.manifest import Dataset
from recsys.model.text.catalogue_text import SINGLE_PROCESS
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from tests.benchmarks.run import bare_step

WARM_UP_STEPS = 2


def main() -> None:
    """Run the same steps for each line of standard input."""
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["num_threads"])
    config = load_config(None, options["settings"])
    dataset = Dataset.open(Storage.from_config(config.storage), config.data.dataset)
    config = dataset.complete(config)
    trained = NextItem(config, dataset, torch.device("cpu"), SINGLE_PROCESS)
    steps = itertools.chain.from_iterable(trained.steps(epoch) for epoch in itertools.count())
    batches = [batch for (batch,) in itertools.islice(steps, options["num_steps"])]
    optimizer = torch.optim.AdamW(trained.module.parameters(), lr=config.optimizer.learning_rate)
    for batch in batches[:WARM_UP_STEPS]:
        bare_step(trained.module, optimizer, batch, trained.weights)
    print("ANSWER {}", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        for batch in batches:
            bare_step(trained.module, optimizer, batch, trained.weights)
        seconds = time.perf_counter() - begin
        print("ANSWER " + json.dumps({"num_samples": sum(len(batch.sample_ids) for batch in batches), "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
