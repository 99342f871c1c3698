"""A decoder with 0.6 billion weights as text encoder, trained in bf16 on one GPU: tokens per second, MFU, waiting times.

`python -m tests.benchmarks.gpu_training`. The backbone has the shape of a Qwen3 and random weights; it is trained with LoRA, then fully.
Ours is the complete loop; between blocks of its steps, the bare engine runs on the same batches. Without a GPU it measures nothing and
reports that; `--tiny` runs everything on a CPU with a decoder of two small layers, to test the benchmark itself.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.launch.head import free_port
from recsys.model.text.catalogue_text import Ranks
from recsys.objectives.next_item import NextItem
from recsys.objectives.objective import MicroBatch
from recsys.store import Storage
from recsys.train.engine import Engine
from recsys.train.loop import Trainer
from recsys.train.monitoring.flops import flops_per_token, peak_flops
from recsys.train.monitoring.reporter import Metrics
from tests.benchmarks.reading import show
from tests.datasets import make_dataset
from tests.reporters import LocalReporter

QWEN_600M = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 512,
}
WARM_UP_BLOCKS = 1
CHECKPOINT_EVERY = 100


def main() -> None:
    """Measure both modes; print a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--users", type=int, default=16, help="of a step; with it the tokens of a batch of items grow")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=25, help="of each loop in a block")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        print("not run: this machine has no GPU that PyTorch can use", file=sys.stderr)
        print(json.dumps({"result": "not run", "reason": "no GPU"}))
        return
    device = "CPU" if arguments.tiny else torch.cuda.get_device_name()
    backend = "gloo" if arguments.tiny else "nccl"
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_decoder(folder / "decoder", TINY if arguments.tiny else QWEN_600M)
        dataset = make_dataset(Storage(str(folder / "store")), num_users=4000, num_items=2000)
        rows = [
            {"mode": mode, **measure(config_of(arguments, folder, dataset, mode), dataset, arguments.steps)} for mode in ("lora", "full")
        ]
    dist.destroy_process_group()
    show(f"a decoder as text encoder, {device}", rows)
    print(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}))


def make_decoder(folder: Path, shape: dict[str, int]) -> None:
    """Save a Qwen3 with random weights, and a tokenizer with one token per byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    Qwen3Model(Qwen3Config(**shape)).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate([*alphabet, "<pad>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>").save_pretrained(folder)


def config_of(arguments: argparse.Namespace, folder: Path, dataset: Dataset, mode: str) -> Config:
    """Return the config of a run with as many steps as all blocks together."""
    values = {
        "storage.root": dataset.storage.root,
        "run.scratch": str(folder / "scratch"),
        "run.name": mode,
        "data.dataset": dataset.uri,
        "data.max_history": 10,
        "model.loss.kind": "sampled",
        "model.loss.negatives": "in_batch",
        "model.text.mode": mode,
        "model.text.backbone": str(folder / "decoder"),
        "model.text.pooling": "last",
        "training.use_gpu": not arguments.tiny,
        "training.num_workers": 1,
        "training.zero_stage": 1,
        "training.precision": "bf16",
        "training.global_batch_size": arguments.users,
        "training.micro_batch_size": arguments.users,
        "training.max_steps": arguments.blocks * arguments.steps,
        "training.epochs": 1000,
        "checkpoint.every_steps": CHECKPOINT_EVERY,
    }
    return load_config().with_values(values)


def measure(config: Config, dataset: Dataset, steps_per_block: int) -> dict[str, float | None]:
    """Train, with the bare engine between blocks of steps."""
    beside = Beside(config, dataset, steps_per_block)
    trainer = Trainer(config, dataset, beside, NextItem)
    beside.trainer = trainer
    state = trainer.run()
    pairs = list(zip(beside.seconds["ours"], beside.seconds["bare"], strict=True))[WARM_UP_BLOCKS:]
    tokens, per_text = sum(beside.tokens[WARM_UP_BLOCKS:]), beside.mean_tokens
    seconds = sum(ours for ours, _ in pairs)
    between = CHECKPOINT_EVERY * seconds / (len(pairs) * steps_per_block)
    backbone = next(part for part in trainer.objective.module.modules() if hasattr(part, "backbone")).backbone
    peak = peak_flops(torch.cuda.get_device_name()) if config.training.use_gpu else 0.0
    return {
        "weights_millions": sum(getattr(weight, "ds_numel", weight.numel()) for weight in backbone.parameters()) / 1e6,
        "tokens_a_batch": tokens / (len(pairs) * steps_per_block),
        "tokens_per_second": tokens / seconds,
        "mfu_percent": 100 * tokens / seconds * flops_per_token(backbone, per_text) / peak if peak else None,
        "data_wait_percent": 100 * state.data_wait_seconds / state.train_seconds,
        "checkpoint_stall_percent": 100 * statistics.median(beside.stalls) / between if beside.stalls else None,
        "bare_over_ours": statistics.median(bare / ours for ours, bare in pairs),
    }


class Beside(LocalReporter):
    """Times blocks of our steps, and as many steps of the bare engine on the same batches."""

    trainer: Trainer

    def __init__(self, config: Config, dataset: Dataset, steps_per_block: int) -> None:
        super().__init__()
        self._device = torch.device("cuda", torch.cuda.current_device()) if config.training.use_gpu else torch.device("cpu")
        bare = NextItem(config, dataset, self._device, Ranks(0, 1, dist.barrier))
        counts = bare.module.item_encoder.token_counts.double()
        self.mean_tokens = float(counts.square().sum() / counts.sum())  # length of a token's text, averaged over all tokens
        self._engine = Engine(bare.module, config, self._device)
        self._engine.train()
        self._num_tokens, self._steps_per_block = bare.num_tokens, steps_per_block
        self._batches: list[Sequence[MicroBatch]] = []
        self.seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        self.tokens: list[int] = []
        self.stalls: list[float] = []
        self._stalled = 0.0
        self._begin = time.perf_counter()

    def step(self, step: int, losses: Metrics, batches: Sequence[MicroBatch]) -> None:
        """Keep the step's batches; after each block, time the bare engine on them."""
        self._batches.append(batches)
        stalled = self.trainer.state.checkpoint_stall_seconds
        if stalled > self._stalled:
            self.stalls.append(stalled - self._stalled)
            self._stalled = stalled
        if len(self._batches) < self._steps_per_block:
            return
        self._note("ours")
        self.tokens.append(sum(self._num_tokens(batch) for held in self._batches for batch in held))
        for held in self._batches:
            self._bare_step(held)
        self._note("bare")
        self._batches = []

    def _note(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name].append(time.perf_counter() - self._begin)
        self._begin = time.perf_counter()

    def _bare_step(self, batches: Sequence[MicroBatch]) -> None:
        for batch in batches:
            counts = batch.valid_counts().clamp(min=1).to(self._device)
            sums = self._engine.forward(batch.to(self._device))
            self._engine.backward(torch.stack([total / count for total, count in zip(sums.values(), counts, strict=True)]).sum().float())
        self._engine.update()


if __name__ == "__main__":
    main()
