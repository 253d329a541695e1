"""Data: readers, column conventions, chat templates, tokenisation, packing and resumable order."""

from rlhf_fast.data.collate import (
    PackedBatch,
    PreferenceBatch,
    collate_preferences,
    collate_prompts,
    collate_sft,
    pack_preferences,
    pack_sft,
    pad_sequences,
)
from rlhf_fast.data.dataset import (
    LoadedData,
    load_preferences,
    load_prompts,
    load_sft,
    warn_overlap,
)
from rlhf_fast.data.encoding import TextEncoder, resolve_pad_id
from rlhf_fast.data.examples import LoadOptions, PreferenceExample, PromptExample, SFTExample
from rlhf_fast.data.loader import (
    EpochSampler,
    epoch_permutation,
    rank_slice,
    sequential_batches,
)
from rlhf_fast.data.packing import pack_best_fit, pack_by_tokens
from rlhf_fast.data.readers import fingerprint_source, read_rows
from rlhf_fast.data.report import BadRowPolicy, DataReport
from rlhf_fast.data.templates import ChatTemplate

__all__ = [
    "BadRowPolicy",
    "ChatTemplate",
    "DataReport",
    "EpochSampler",
    "LoadOptions",
    "LoadedData",
    "PackedBatch",
    "PreferenceBatch",
    "PreferenceExample",
    "PromptExample",
    "SFTExample",
    "TextEncoder",
    "collate_preferences",
    "collate_prompts",
    "collate_sft",
    "epoch_permutation",
    "fingerprint_source",
    "load_preferences",
    "load_prompts",
    "load_sft",
    "pack_best_fit",
    "pack_by_tokens",
    "pack_preferences",
    "pack_sft",
    "pad_sequences",
    "rank_slice",
    "read_rows",
    "resolve_pad_id",
    "sequential_batches",
    "warn_overlap",
]
