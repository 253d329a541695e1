"""Models as sizes alone: built on the meta device from config.json, without weights.

Nothing is downloaded, no weight file is opened and no code of a model repository is run.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlhf_fast.errors import ModelError
from rlhf_fast.models.attention_mode import keep_softcap
from rlhf_fast.models.directory import read_config_file, resolve
from rlhf_fast.models.forward import ComputeDtype, set_compute_dtype
from rlhf_fast.models.heads import require_classifier
from rlhf_fast.models.loading import quiet_transformers


def model_config(path: str | Path) -> Any:
    """The transformers config of a directory, a hub name in the cache, or a JSON file.

    Raises:
        ModelError: no such place, no config there, or an architecture that transformers does not
            contain (RF3010 to RF3013); values that it refuses (RF3025).
    """
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        file = resolve(path) / "config.json"
    fields = read_config_file(file)
    try:
        with quiet_transformers():
            return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    except Exception as error:  # each architecture checks its fields in its own way
        raise _unusable(error, str(file)) from error


def meta_model(config: Any, *, dtype: ComputeDtype, classifier: bool = False) -> Any:
    """A model without numbers, in the types the loaders give: fp32 parameters.

    Args:
        config: of transformers; not changed.
        dtype: what matrix products run in.
        classifier: with a scalar head instead of the vocabulary head.

    Raises:
        ModelError: RF3025, transformers cannot build it; RF3028, it has no such classifier.
    """
    config = copy.deepcopy(config)
    maker: Any = AutoModelForCausalLM
    if classifier:
        require_classifier(type(config), str(config.model_type))
        config.num_labels = 1
        maker = AutoModelForSequenceClassification
    try:
        with quiet_transformers(), torch.device("meta"):
            module = maker.from_config(config, dtype=torch.float32)
    except Exception as error:  # sizes that contradict each other fail in all manners
        raise _unusable(error, str(config.model_type)) from error
    set_compute_dtype(module, dtype)
    keep_softcap(module)
    return module.eval()


def _unusable(error: Exception, where: str) -> ModelError:
    # Validators name the field only in their second line.
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ModelError(
        "RF3025",
        f"transformers cannot build the model: {reason}",
        where=where,
        expected="the config.json of a causal language model",
        remedy="check the fields that the message names",
    )
