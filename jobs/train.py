"""Train one model: a config in, the best checkpoint out. Submitting the same command again goes on where it stopped."""

from recsys.command import run_verb
from recsys.launch import launch

if __name__ == "__main__":
    run_verb(launch, __doc__)
