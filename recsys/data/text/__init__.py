"""Text as training data: the corpus that the language model is pretrained on, pairs of items, and queries."""
