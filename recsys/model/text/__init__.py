"""The language model over item text: its files, its tokens and vectors, its pretraining, and free-text queries."""
