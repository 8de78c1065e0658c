"""Keeps the libraries underneath quiet: what they say to each other is not for the person who runs a command."""

import logging
import os
import warnings


def calm() -> None:
    """Call before the first heavy import. ``TRANSFORMERS_VERBOSITY`` and the like, where set, are left as they are."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # TRL's trainers would report model, GPU and number of processes: hardware facts do not leave a node.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for library in ("transformers", "peft", "trl", "torch", "bitsandbytes", "accelerate"):
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
