"""The hyperparameter search over whole training runs."""
