"""The slow imports of the ranks; `distributed.py` forks its ranks from a process that has imported this module."""

import importlib
import os

os.environ["DS_ACCELERATOR"] = "cpu"

for name in ("deepspeed", "peft", "transformers.models.bert.modeling_bert", "recsys.train.loop"):
    importlib.import_module(name)
