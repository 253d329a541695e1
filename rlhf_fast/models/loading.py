"""Load Hugging Face directories as fp32 masters, strictly.

Everything that stock loading reports in a log line and carries on from (missing, left-over and
mis-shaped weights, a head made of random numbers) is an error here, found before any training.
Nothing is downloaded, no pickle is opened and no code of a model repository is run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as hf_logging

from rlhf_fast.errors import ModelError
from rlhf_fast.models.attention_mode import keep_softcap
from rlhf_fast.models.checks import check_finite
from rlhf_fast.models.directory import read_config, resolve, weight_files
from rlhf_fast.models.dropout import disable_dropout
from rlhf_fast.models.forward import ComputeDtype, compute_dtype, set_compute_dtype
from rlhf_fast.models.heads import require_classifier, scalar_head

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def load_causal_lm(path: str | Path, *, dtype: ComputeDtype) -> Any:
    """Load a causal language model.

    Args:
        path: local directory, or a hub name that is already in the cache.
        dtype: what matrix products run in. "bfloat16" is autocast over fp32 masters, "float32" is
            plain. Parameters are fp32 in both, whatever the file holds.

    Returns:
        A `transformers` module in eval mode, dropout off, parameters fp32 on the CPU.

    Raises:
        ModelError: anything about the directory or its weights that is not exactly right.
    """
    directory = resolve(path)
    module, report = _load(AutoModelForCausalLM, directory, {})
    report.require_clean(directory)
    return _prepare(module, dtype, str(directory))


def load_sequence_classifier(
    path: str | Path, *, init_head: bool, dtype: ComputeDtype, seed: int = 0
) -> Any:
    """Load a sequence classifier with one label: a reward model.

    Args:
        path: as for `load_causal_lm`; a causal LM directory if `init_head`.
        init_head: where the directory has no scalar head, make one with weights from
            N(0, 1/sqrt(d+1)) (Stiennon et al. 2020) and no bias; otherwise that is an error.
        dtype: as for `load_causal_lm`.
        seed: the new head is a function of it.

    Returns:
        A `transformers` module in eval mode, dropout off, parameters fp32 on the CPU.

    Raises:
        ModelError: as for `load_causal_lm`, and a missing head without `init_head`.
    """
    directory = resolve(path)
    module, had_head = _load_classifier(directory)
    if not had_head:
        if not init_head:
            raise ModelError(
                "RF3018",
                "the model has no reward head",
                where=str(directory),
                expected="a sequence-classification directory with a `score` layer",
                remedy="give the model that `rlhf-fast rm` exports; to train a new head on this "
                "one, run `rlhf-fast rm` with init_head=true",
            )
        init_reward_head(module, seed)
    return _prepare(module, dtype, str(directory))


def load_critic(path: str | Path, *, dtype: ComputeDtype) -> Any:
    """Load a critic: a whole reward model, or a causal LM with a value head of zeros.

    Arguments, result and errors as for `load_sequence_classifier`.
    """
    directory = resolve(path)
    module, had_head = _load_classifier(directory)
    if not had_head:
        zero_head(module)
    return _prepare(module, dtype, str(directory))


def adopt_module(module: nn.Module, *, dtype: ComputeDtype, role: str) -> None:
    """Bring a module made elsewhere, in place, to what the loaders return.

    transformers loads a checkpoint in the type it was saved in, bf16 for most; trained as it is,
    such a model stays where it is under a small learning rate.

    Args:
        module: a Hugging Face model.
        dtype: as for `load_causal_lm`.
        role: what to call it in the message.

    Raises:
        ModelError: a weight is NaN or Inf.
    """
    _prepare(module.float(), dtype, role)


def critic_from(module: nn.Module) -> Any:
    """A trainable critic from a model in memory; shares no storage with it.

    Args:
        module: a sequence classifier, which is copied whole (calibration included), or a causal
            LM, whose backbone is copied under a value head of zeros.
    """
    if hasattr(module, "score"):
        critic = copy.deepcopy(module)
    else:
        source: Any = module
        require_classifier(type(source.config), type(module).__name__)
        config = copy.deepcopy(source.config)
        config.num_labels = 1
        critic = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        critic.base_model.load_state_dict(source.base_model.state_dict())
        critic.to(next(module.parameters()).device)
        zero_head(critic)
    return _prepare(critic.requires_grad_(True), compute_dtype(module), "critic")


def classifier_over(module: nn.Module, head: nn.Linear) -> Any:
    """A classifier made of a causal LM's trunk and a scalar head, for export: it copies nothing.

    Args:
        module: causal LM.
        head: maps its last hidden states to one number.
    """
    source: Any = module
    config = copy.deepcopy(source.config)
    config.num_labels = 1
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    classifier.base_model.load_state_dict(source.base_model.state_dict(), assign=True)
    classifier.score = head
    return classifier


def init_reward_head(module: nn.Module, seed: int) -> None:
    """Draw the scalar head from N(0, 1/sqrt(d+1)), d its input width; its bias, if any, is 0."""
    head = scalar_head(module)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(drawn)
        if head.bias is not None:
            head.bias.zero_()


def zero_head(module: nn.Module) -> None:
    """Make every value 0, so that an untrained critic is the constant baseline 0."""
    head = scalar_head(module)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer of a model directory, without a download.

    Raises:
        ModelError: no such directory, or no tokenizer that transformers can build in it.
    """
    directory = resolve(path)
    read_config(directory)  # transformers reads it as well, and would blame the tokenizer
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            "RF3019",
            "the directory holds no tokenizer",
            where=str(directory),
            expected=f"one of {', '.join(_TOKENIZER_FILES)}",
            remedy="copy the tokenizer files of the base model beside the weights",
        )
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # tokenizers raises bare Exception on a broken file
            raise ModelError(
                "RF3019",
                f"the tokenizer cannot be loaded: {_first_line(error)}",
                where=str(directory),
                remedy="copy the tokenizer files of the base model again",
            ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off transformers' progress bars and warnings, and put both back afterwards."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@dataclass(frozen=True)
class _Report:
    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]

    def without(self, missing: str, unexpected: tuple[str, ...]) -> _Report:
        """The report less missing and unexpected names that start so."""
        return _Report(
            [n for n in self.missing if not n.startswith(missing)],
            [n for n in self.unexpected if not n.startswith(unexpected)],
            self.misshaped,
        )

    def require_clean(self, directory: Path) -> None:
        found = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mis-shaped": self.misshaped,
        }
        wrong = {kind: names for kind, names in found.items() if names}
        if wrong:
            counts = ", ".join(f"{len(names)} {kind}" for kind, names in wrong.items())
            first = "; ".join(f"{kind}: {', '.join(n[:5])}" for kind, n in wrong.items())
            raise ModelError(
                "RF3017",
                f"the weights do not fit the architecture: {counts}",
                where=f"{directory}: {first}",
                expected="exactly the weights that config.json describes",
                remedy="check that config.json and weights are of one model",
            )


def _load_classifier(directory: Path) -> tuple[Any, bool]:
    kind = read_config(directory)["model_type"]
    require_classifier(CONFIG_MAPPING[kind], str(directory))
    module, report = _load(AutoModelForSequenceClassification, directory, {"num_labels": 1})
    had_head = not any(name.startswith("score.") for name in report.missing)
    if not had_head:
        # A causal LM brings an output layer instead, `embed_out` in GPT-NeoX.
        report = report.without("score.", ("lm_head.", "embed_out."))
    report.require_clean(directory)
    return module, had_head


def _load(auto_class: Any, directory: Path, changes: dict[str, Any]) -> tuple[Any, _Report]:
    read_config(directory)
    weight_files(directory)
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, **changes
            )
            module, info = auto_class.from_pretrained(
                directory,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # configs are checked by classes with errors of their own
            raise ModelError(
                "RF3025",
                f"transformers cannot load the model: {_first_line(error)}",
                where=str(directory),
                remedy="check that it is a causal language model this transformers knows",
            ) from error
    misshaped = [
        f"{name} {list(found)} instead of {list(wanted)}"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    return module, _Report(sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), misshaped)


def _prepare(module: Any, dtype: ComputeDtype, where: str) -> Any:
    check_finite(module, where)
    _own_memory(module)
    disable_dropout(module)
    set_compute_dtype(module, dtype)
    keep_softcap(module)
    for child in module.modules():
        if isinstance(child, nn.Embedding):
            # It would keep the pad token's embedding from learning; with pad == eos, that of eos.
            # Packed batches hold no padding, so there is nothing to protect.
            child.padding_idx = None
    return module.eval()


def _own_memory(module: nn.Module) -> None:
    """Move the weights out of the memory-mapped file into allocations of their own.

    In the file they lie at any multiple of 8 bytes, and matrix products at such addresses take
    other code paths: results then differ in the last bit from those of a run resumed from a
    checkpoint. The file may be replaced under a mapping, too.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.clone()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
