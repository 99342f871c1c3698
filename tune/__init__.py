"""The hyperparameter search over full training runs."""
