"""The one module that is trained: item encoder, user encoder, ranker, and the losses of a batch."""

from pathlib import Path

import torch
from torch import Tensor, nn

from recsys.config import Config
from recsys.data.batch import Batch
from recsys.data.item_features import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.model import losses
from recsys.model.catalogue_text import ALONE, Ranks, catalogue_tokens, frozen_vectors
from recsys.model.item_encoder import ItemEncoder, ItemText
from recsys.model.ranker import Ranker
from recsys.model.text_encoder import TextEncoder, load_backbone, locate_backbone
from recsys.model.user_encoder import UserEncoder

RETRIEVAL = "retrieval"


class Recommender(nn.Module):
    """Batch -> losses by name. Shapes: B samples, L positions, D distinct items, N valid targets, W width."""

    def __init__(self, config: Config, dataset: Dataset, catalogue: ItemFeatures, text: ItemText) -> None:
        super().__init__()
        manifest = dataset.manifest
        self.catalogue = catalogue
        self.tasks = manifest.tasks
        self.is_sampled = config.model.loss.kind == "sampled"
        self.item_encoder = ItemEncoder(config.model, catalogue, text)
        self.user_encoder = UserEncoder(config.model, config.data.max_history, len(manifest.event_kinds), manifest.has_time)
        self.ranker = Ranker(config.model.width, len(self.tasks))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sum of each loss over the batch's valid targets."""
        items = self.item_encoder(batch.items)  # (D, W)
        states = self.user_encoder(items[batch.history], batch.events, batch.gaps)  # (B, L, W)
        is_target = batch.targets != 0
        users, targets = states[is_target], batch.targets[is_target]  # (N, W), (N,)
        scores = self.ranker(users, items[targets])
        result = losses.task_losses(self.tasks, scores, batch.labels[is_target], batch.label_mask[is_target])
        if self.is_sampled:
            result[RETRIEVAL] = losses.sampled_softmax(users, items, targets, batch.negatives, batch.negatives_log_q)
        else:
            result[RETRIEVAL] = losses.full_softmax(users, items, targets)
        return result


def read_item_text(config: Config, dataset: Dataset, catalogue: ItemFeatures, device: torch.device, ranks: Ranks = ALONE) -> ItemText:
    """Read or compute what the item encoder needs of the text; all of `ranks` must call this."""
    text, scratch = config.model.text, Path(config.run.scratch)
    if text.mode == "off" or not bool(catalogue.has_text.any()):
        return ItemText()
    folder = locate_backbone(text, dataset, scratch)
    if text.mode == "frozen":
        return ItemText(vectors=frozen_vectors(folder, text, catalogue, dataset, scratch, device, ranks))
    tokens, lengths = catalogue_tokens(folder, text, catalogue, dataset, scratch)
    return ItemText(tokens=tokens, lengths=lengths, encoder=TextEncoder(load_backbone(folder, text), text.pooling))


def build_recommender(config: Config, dataset: Dataset, device: torch.device, ranks: Ranks = ALONE) -> Recommender:
    """Build the recommender with weights that depend on the seed alone; `ranks` share the work on the catalogue's text.

    The catalogue is mapped from files below `run.scratch`, so that the processes of a node hold it once.
    """
    catalogue = ItemFeatures.read(dataset, Path(config.run.scratch))
    torch.manual_seed(config.training.seed)  # for LoRA's adapters
    text = read_item_text(config, dataset, catalogue, device, ranks)
    torch.manual_seed(config.training.seed)  # again: whoever computed frozen vectors may have drawn numbers
    return Recommender(config, dataset, catalogue, text)
