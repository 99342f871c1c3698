"""Less memory for more work: what a Transformer's layers compute is computed again in the backward pass instead of being kept."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from recsys.model.user_encoder import Block


def recompute_activations(module: nn.Module) -> None:
    """Have each layer of the language model and of the user encoder keep its input alone; losses and gradients stay the same to the bit."""
    for part in module.modules():
        enable = getattr(part, "gradient_checkpointing_enable", None)
        if isinstance(part, Block):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)  # type: ignore[method-assign]
        elif callable(enable):  # a model of transformers
            enable({"use_reentrant": False})
