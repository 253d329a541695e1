"""verl without packages that it takes to be beside it, in every process of a run.

    VERL_USE_EXTERNAL_MODULES=rlhf_fast.integrations.verl,bench.integrations.verl_alone

For tests and benches alone.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch


def _with_eager_attention(load: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return load(*args, **options | {"attn_implementation": "eager"})


def leave_alone() -> None:
    """Let this process do without flash-attn and TRL."""
    # verl's critic names flash-attn, whatever its config says.
    critics = importlib.import_module("transformers").AutoModelForTokenClassification
    critics.from_pretrained = partial(_with_eager_attention, critics.from_pretrained)
    # Its models would be patched in a TRL beside it, of which it knows another version (0.27).
    available = importlib.import_module("verl.utils.import_utils").is_trl_available
    available.cache_clear()
    with patch("importlib.util.find_spec", return_value=None):
        available()  # remembered


if __name__ in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
    leave_alone()
