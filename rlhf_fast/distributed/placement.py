"""Where each parameter of a sharded model lies, and why.

A parameter has one of three holders:

    fsdp        a matrix of the trunk: cut over the shard axis by FSDP2, gathered a block at a time
    vocabulary  the token embedding and the head: cut by rows, read by operations of their own
    everyone    vectors (norms, biases), adapters, scalar heads: whole on every rank

Vectors are a thousandth of a model, so holding them whole costs nothing and spares generation the
only gathers it would need. Where the sizes divide, FSDP cuts the matrices of a block so that the
shard of a rank IS its tensor-parallel slice: rows of the projections that read the residual stream
(and their biases, which are cut with them), columns of those that write to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from rlhf_fast.errors import ModelError

Holder = Literal["fsdp", "vocabulary", "everyone"]

# Architectures whose blocks the tensor-parallel slices are known for.
SLICED_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# Projections of one input lie side by side in a rank's memory, in this order.
ADJACENT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ROWS = frozenset(name for names in ADJACENT for name in names)
COLUMNS = frozenset({"o_proj", "down_proj"})
_BASE = ".base_layer"


@dataclass(frozen=True)
class Cut:
    """How one parameter is spread over the shard axis.

    Args:
        holder: see the text of the module.
        dim: that is cut, in runs of ceil(size / shards), the last ones shorter or empty; None: the
            parameter is whole on every rank.
        sliced: whether the shard of a rank is its tensor-parallel slice.
    """

    holder: Holder
    dim: int | None
    sliced: bool = False

    def local_shape(self, shape: Iterable[int], shards: int, rank: int) -> tuple[int, ...]:
        """Shape of the shard of one rank."""
        sizes = list(shape)
        if self.dim is not None:
            run = -(-sizes[self.dim] // shards)
            sizes[self.dim] = max(0, min(sizes[self.dim] - rank * run, run))
        return tuple(sizes)


EVERYONE = Cut("everyone", None)


def decoder_layers(trunk: nn.Module) -> nn.ModuleList | None:
    """The list of decoder layers: of all lists in the trunk the one with the most weights."""
    lists = [m for m in trunk.modules() if isinstance(m, nn.ModuleList)]
    sizes = [sum(p.numel() for p in part.parameters()) for part in lists]
    return lists[sizes.index(max(sizes))] if lists and max(sizes) > 0 else None


def why_not_by_layers(layers: nn.ModuleList | None) -> str:
    """Empty if a model can be taken apart into `decoder_layers`, otherwise why not."""
    if layers is None:
        return "it has no list of decoder layers"
    of_layers = [p for layer in layers for p in layer.parameters()]
    return "two of its layers share weights" if len(set(of_layers)) != len(of_layers) else ""


def blocks_to_shard(module: nn.Module) -> nn.ModuleList:
    """The decoder layers of a model that can be sharded.

    Raises:
        ModelError: there are none, or two of them share weights (RF3080).
    """
    model: Any = module
    layers = decoder_layers(model.base_model)
    problem = why_not_by_layers(layers)
    if layers is None or problem:
        raise ModelError(
            "RF3080",
            f"the model cannot be sharded: {problem}",
            where=type(module).__name__,
            expected="a list of decoder layers, each with weights of its own",
            remedy="train this architecture in a single process",
        )
    return layers


def why_not_sliced(module: nn.Module, shards: int) -> str | None:
    """None if shards of the blocks can be tensor-parallel slices, otherwise why not."""
    model: Any = module
    config = model.config
    if config.model_type not in SLICED_MODEL_TYPES:
        return f"no tensor-parallel slices are known for {config.model_type}"
    sizes = {
        "attention heads": config.num_attention_heads,
        "key/value heads": config.num_key_value_heads,
        "intermediate features": config.intermediate_size,
    }
    for what, size in sizes.items():
        if size % shards:
            return f"{size} {what} cannot be dealt to {shards} ranks"
    return None


def cuts_of(module: nn.Module, shards: int) -> dict[str, Cut]:
    """How every parameter is cut, by its name; tied ones under the first of theirs.

    Args:
        module: Hugging Face causal LM or sequence classifier, not sharded yet; it may have peft
            adapters, and may be on the meta device.
        shards: ranks that hold one model between them.
    """
    model: Any = module
    trunk = {id(p) for p in model.base_model.parameters()}
    vocabulary = {id(m.weight) for m in vocabulary_modules(module)}
    sliced = why_not_sliced(module, shards) is None
    cuts = {}
    for name, parameter in module.named_parameters():
        if id(parameter) in vocabulary:
            cuts[name] = Cut("vocabulary", 0)
        elif id(parameter) not in trunk or ".lora_" in name:
            cuts[name] = EVERYONE
        else:
            cuts[name] = _cut_in_trunk(name, parameter.dim(), sliced)
    return cuts


def vocabulary_modules(module: nn.Module) -> list[Any]:
    """The token embedding, and the head of a causal LM."""
    model: Any = module
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [part for part in parts if part is not None]


def projection(name: str) -> str:
    """Which layer of a block a parameter belongs to, without what peft puts between."""
    return name.replace(_BASE, "").split(".")[-2]


def _cut_in_trunk(name: str, dims: int, sliced: bool) -> Cut:
    layer = projection(f".{name}")
    if sliced and layer in ROWS:
        return Cut("fsdp", 0, sliced=True)
    if sliced and layer in COLUMNS and dims == 2:
        return Cut("fsdp", 1, sliced=True)
    return Cut("fsdp", 0) if dims >= 2 else EVERYONE
