"""The language model over item text: its files, tokens and embeddings, its pretraining, and free-text queries."""
