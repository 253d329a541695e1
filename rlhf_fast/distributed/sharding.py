"""A Hugging Face model on the ranks of a world: parameters in shards, forwards as before.

`shard_module` cuts a model in place. `model.base_model` becomes the root of FSDP2, each of its
decoder layers a unit that is gathered for its own forward and backward; token embedding and head
are read by rows (`vocabulary_shards`); vectors are whole everywhere (`placement`). Gradients are
sums over the ranks of the shard axis, which hold other tokens each; `gradients` adds the rest.

Forwards are collective: all ranks of a shard axis run the same forwards and backwards in the same
order. `torch.inference_mode` is not for them: a first forward in it leaves FSDP unable to train.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from rlhf_fast.distributed.flat_shards import FlatShards, adjacent, around, lay_flat, local_part
from rlhf_fast.distributed.placement import (
    Cut,
    blocks_to_shard,
    cuts_of,
    vocabulary_modules,
    why_not_sliced,
)
from rlhf_fast.distributed.vocab_parallel import VocabParallel
from rlhf_fast.distributed.vocabulary_shards import (
    VocabularyRows,
    as_rows,
    read_by_rows,
    rows_of,
    why_not_parallel,
)
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import EnvironmentFault, ModelError

# Blocks whose gather is under way while one computes, in forward; backward looks one ahead itself.
PREFETCHED_BLOCKS = 2


@dataclass(frozen=True)
class BlockShards:
    """What a rank holds of one decoder layer.

    Args:
        name: of the layer in the model, "model.layers.3".
        flat: buffers in which the shards of its evenly cut parameters lie.
    """

    name: str
    flat: FlatShards


class ShardedModule:
    """A model after `shard_module`: what lies where, for optimizers, checkpoints and generation.

    Names are those of `module.named_parameters()`: a tied head goes by the embedding's, a layer
    under an adapter has `.base_layer` in its name. What a rank holds keeps its address for the life
    of the model, so that views taken once stay good; optimizer steps, forwards and checkpoints that
    are loaded write into that memory.

    Generation over tensor-parallel slices, if `why_not_tensor_parallel` is None, reads

        local(name)            its slice of a projection: q, k, v, gate, up weights [rows / k, in]
                               and biases [rows / k]; o and down weights [out, columns / k]
        adjacent(names)        q|k|v or gate|up of a block as one [rows, in] view, no copy
        local(name)            norms and the biases of o and down: whole, equal on all ranks
        embedding, head        the rows of the vocabulary that are here, and which they are

    Rank r of the shard axis has heads r * n / k to (r + 1) * n / k of each kind.

    Attributes:
        module: the model that was cut, in place.
        world: its ranks.
        cuts: how each parameter is spread, by name; empty in a world of one rank.
        blocks: the decoder layers in order; empty in a world of one rank.
        why_not_tensor_parallel: None if the shards of the blocks are tensor-parallel slices,
            otherwise the reason they are not.
        why_not_vocabulary_parallel: None if tokens are looked up in the rows of each rank,
            otherwise why a look-up gathers the embedding.
    """

    def __init__(
        self,
        module: nn.Module,
        world: World,
        cuts: Mapping[str, Cut],
        blocks: tuple[BlockShards, ...],
        why_not_tensor_parallel: str | None,
        why_not_vocabulary_parallel: str | None,
    ) -> None:
        self.module = module
        self.world = world
        self.cuts = dict(cuts)
        self.blocks = blocks
        self.why_not_tensor_parallel = why_not_tensor_parallel
        self.why_not_vocabulary_parallel = why_not_vocabulary_parallel
        self._parameters = dict(module.named_parameters())
        self._local = {name: local_part(p) for name, p in self._parameters.items()}

    def local(self, name: str) -> Tensor:
        """What this rank holds of a parameter, without a graph; the same memory at every call."""
        return self._local[name]

    def adjacent(self, names: list[str]) -> Tensor | None:
        """[sum of rows, ...] view over what this rank holds of parameters; None if not adjacent."""
        return adjacent([self._local[name] for name in names])

    @property
    def embedding(self) -> VocabularyRows | None:
        """Which rows of the token embedding `local` has; None in a world of one rank."""
        model: Any = self.module
        return rows_of(model.get_input_embeddings().weight)

    @property
    def head(self) -> VocabularyRows | None:
        """Which rows of the head `local` has; None of a classifier and in a world of one rank."""
        model: Any = self.module
        head = model.get_output_embeddings()
        return None if head is None else rows_of(head.weight)

    def sharded(self, name: str, local: Tensor) -> Tensor:
        """A tensor that is cut as a parameter is: its gradient, a moment of its optimizer.

        Args:
            name: of the parameter.
            local: this rank's part, of the shape of `local(name)`.

        Returns:
            a DTensor around `local`, without copy or communication; `local` itself if the parameter
            is whole on every rank.
        """
        like = self._parameters[name]
        return around(local, like) if isinstance(like, DTensor) else local

    def gather_full(self, name: str, local: Tensor | None = None) -> Tensor:
        """The whole of a parameter on this rank's device, without a graph.

        Collective over the shard axis; never within a forward or backward. Of a parameter that is
        whole on every rank it is the parameter's own memory.

        Args:
            name: of the parameter.
            local: as in `sharded`; None: the parameter.
        """
        part = self.sharded(name, self._local[name] if local is None else local)
        return part.full_tensor() if isinstance(part, DTensor) else part

    def reset(self) -> None:
        """Go back to shards after a forward or backward that raised, and drop all gradients.

        Every rank has to call it, whichever of them raised; microbatches of the step start anew.

        Raises:
            EnvironmentFault: RF7051, a PyTorch before 2.13, in which FSDP cannot go on.
        """
        for parameter in self._parameters.values():
            parameter.grad = None
        start_anew(self.module)

    @property
    def held_bytes(self) -> int:
        """Bytes of parameters on this rank, padding of buffers and uneven shards included."""
        storages = {
            local.untyped_storage().data_ptr(): local.untyped_storage().nbytes()
            for local in self._local.values()
        }
        return sum(storages.values())


# Layers whose shards lie in host memory.
_away: WeakSet[nn.Module] = WeakSet()


def shard_module(
    module: nn.Module,
    world: World,
    *,
    dtype: Literal["float32", "bfloat16"],
    offload: bool = False,
) -> ShardedModule:
    """Cut a model over the ranks of a world, in place; with one rank it is left as it is.

    Every rank starts from the parameters and buffers of rank 0, which arrive on the device a block
    at a time: there the whole model never exists. Keep it on the CPU of rank 0 and on the meta
    device (`rlhf_fast.models.meta.meta_model`) of the others, or load it alike everywhere.

    Cut first, then make optimizers and generators: parameters are new objects afterwards. Gradient
    checkpointing may be switched on before or after. Adapters have to be on the model already.

    Args:
        module: Hugging Face causal LM or sequence classifier; adapters of peft in it stay whole.
        world: the ranks; every one of them has to call this.
        dtype: what matrix products run in: with "bfloat16" the matrices of the blocks are gathered
            in bf16, which are the bits that autocast would make of the fp32 shards. Shards keep
            their own type, and gradients are summed in fp32.
        offload: keep the shards of the layers in host memory, from where each is copied when its
            layer is gathered; for a model that is only read. Embedding, head and vectors, which are
            read in place, stay on the device.

    Raises:
        ModelError: RF3080, an architecture that cannot be cut; RF3081, a model that is cut already.
    """
    if world.mesh is None:
        return ShardedModule(module, world, {}, (), "one rank holds the whole model", None)
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        raise ModelError(
            "RF3081",
            "the model is sharded already",
            where=type(module).__name__,
            expected="a model as it was loaded",
            remedy="call shard_module once",
        )
    compute = torch.bfloat16 if dtype == "bfloat16" else None
    return _Cutter(module, world, compute, offload=offload).cut()


def shards_on_host(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model whose shards `shard_module` has left in host memory."""
    for layer in (part for part in module.modules() if part in _away):
        yield from (p for p in layer.parameters() if isinstance(p, DTensor))


def forget_forwards(module: nn.Module) -> None:
    """After forwards without a backward of a cut model, on all ranks of a shard axis alike.

    FSDP notes every forward until a backward ends. Without this the notes of a model that is only
    read grow, and the next backward of a trained one gathers a layer too many. A PyTorch before
    2.13 has no way to drop them; a model that is not cut is left alone.
    """
    for root in _roots(module):
        reset = getattr(root, "reset_iter_state", None)
        if reset is not None:
            reset()


def start_anew(module: nn.Module) -> None:
    """Go back to shards after a forward or backward of a cut model that raised; drops gradients.

    Every rank has to call it, whichever of them raised. A model that is not cut loses its gradients
    alone.

    Raises:
        EnvironmentFault: RF7051, a PyTorch before 2.13, in which FSDP cannot go on.
    """
    # A unit that was in backward has its gathered parameters in place, and gradients on them.
    for parameter in module.parameters():
        parameter.grad = None
    for root in _roots(module):
        if not hasattr(root, "reset_iter_state"):
            raise EnvironmentFault(
                "RF7051",
                "a step of a sharded model failed, and this PyTorch cannot start it anew",
                where=f"torch {torch.__version__}",
                expected="torch 2.13 or later",
                remedy="resume from the last checkpoint, or update PyTorch",
            )
        root.reset_iter_state()


def _roots(module: nn.Module) -> Iterator[Any]:
    """The modules that FSDP's units of a model hang under."""
    inside: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, FSDPModule) and part not in inside:
            inside.update(part.modules())
            yield part


class _Cutter:
    def __init__(
        self, module: nn.Module, world: World, compute: torch.dtype | None, *, offload: bool
    ) -> None:
        model: Any = module
        self._module, self._world, self._trunk = module, world, model.base_model
        self._compute = compute
        self._away: OffloadPolicy | None = None
        if offload:
            self._away = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
        self._cuts = cuts_of(module, world.shards)
        names = {id(p): name for name, p in module.named_parameters()}
        # Objects come and go while the model is cut; modules and names stay.
        self._owners: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in self._cuts}
        for part in module.modules():
            for attribute, parameter in part.named_parameters(recurse=False):
                self._owners[names[id(parameter)]].append((part, attribute))
        self._left = dict.fromkeys(self._cuts)
        self._buffers_left = dict.fromkeys(module.modules())

    def cut(self) -> ShardedModule:
        layers = blocks_to_shard(self._module)
        names = {part: name for name, part in self._module.named_modules()}
        unparallel = why_not_parallel(vocabulary_modules(self._module)[0])
        blocks = []
        for layer in layers:
            self._bring(layer)
            self._shard(layer, self._compute, self._away)
            # What is only read through FSDP may lie anywhere.
            flat = lay_flat(layer) if self._away is None else FlatShards({}, ())
            if self._away is not None:
                _away.add(layer)
            blocks.append(BlockShards(names[layer], flat))
        self._bring(self._module)
        # Positions are added in fp32, as they are without shards.
        self._shard(self._trunk, None)
        embedding, *heads = vocabulary_modules(self._module)
        read_by_rows(embedding, lookup=unparallel is None)
        for head in heads:
            read_by_rows(head, lookup=False)
            # What makes the losses read the rows where they lie; see `HeadShards`.
            group, rows = self._world.shard_mesh.get_group(), head.weight.shape[0]
            shards: Any = VocabParallel.like_shard(group, rows)
            head.vocabulary_shards = shards
        self._settle(list(layers))
        return ShardedModule(
            self._module,
            self._world,
            self._cuts,
            tuple(blocks),
            why_not_sliced(self._module, self._world.shards),
            unparallel,
        )

    def _shard(
        self, part: nn.Module, compute: torch.dtype | None, away: OffloadPolicy | None = None
    ) -> None:
        inside = set(part.modules())
        cuts: dict[nn.Parameter, Cut] = {}
        for name, owners in self._owners.items():
            for owner, attribute in owners:
                if owner in inside:
                    cuts[getattr(owner, attribute)] = self._cuts[name]

        def placement(parameter: nn.Parameter) -> Shard | None:
            dim = cuts[parameter].dim
            return None if dim is None else Shard(dim)

        fully_shard(
            part,
            # The shards alone: replicas are summed once a step, not in every backward.
            mesh=self._world.shard_mesh,
            # The root too: what it kept after a forward without backward would be stale after the
            # next optimizer step.
            reshard_after_forward=True,
            shard_placement_fn=placement,
            # Rotary tables and the residual stream keep the type they have without shards.
            mp_policy=MixedPrecisionPolicy(
                param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            offload_policy=away or OffloadPolicy(),
            ignored_params={p for p, cut in cuts.items() if cut.holder != "fsdp"},
        )

    def _bring(self, part: nn.Module) -> None:
        """Take what is not on the device yet from rank 0: the same bits everywhere."""
        inside = set(part.modules())
        for name in list(self._left):
            owners = self._owners[name]
            if owners[0][0] not in inside:
                continue
            parameter: nn.Parameter = getattr(*owners[0])
            rows = self._cuts[name].holder == "vocabulary"
            arrived = self._rows(parameter) if rows else self._from_main(parameter)
            made = nn.Parameter(arrived, requires_grad=parameter.requires_grad)
            for owner, attribute in owners:
                setattr(owner, attribute, made)
            del self._left[name]
        for owner in [m for m in self._buffers_left if m in inside]:
            for attribute, buffer in list(owner.named_buffers(recurse=False)):
                setattr(owner, attribute, self._from_main(buffer))
            del self._buffers_left[owner]

    def _from_main(self, tensor: Tensor) -> Tensor:
        """A copy of rank 0's tensor on this rank's device."""
        # A copy even where it lies on the device already: what is given is not written to.
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._world.device)
        if self._world.is_main:
            copy.copy_(tensor.detach())
        self._world.broadcast([copy])
        return copy

    def _rows(self, weight: Tensor) -> Tensor:
        """This rank's rows of a vocabulary weight, which never lies on the device as a whole."""
        mesh = self._world.shard_mesh
        rows = VocabularyRows.on(mesh, weight.shape[0])
        parts = weight.detach().split(rows.run)
        local = torch.empty(0, weight.shape[1], dtype=weight.dtype, device=self._world.device)
        for owner, part in enumerate(parts):
            arrived = self._from_main(part)
            if owner == rows.rank:
                local = arrived
        return as_rows(local, mesh, weight.shape)

    def _settle(self, blocks: list[Any]) -> None:
        """What FSDP is told once all of its units exist."""
        trunk: Any = self._trunk
        for unit in (trunk, *blocks):
            # Sums, not means: losses are normalised by the global token count already. A factor
            # alone would be a reduction that gloo does not have.
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)
        for index, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + PREFETCHED_BLOCKS])
        in_blocks = {m for block in blocks for m in block.modules()}
        of_root = [
            part
            for part in trunk.modules()
            if part not in in_blocks
            and any(isinstance(p, DTensor) for p in part.parameters(recurse=False))
        ]
        # Nothing here writes into what a unit returns.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        # The gradient of a look-up needs no weight.
        if all(isinstance(part, nn.Embedding) for part in of_root):
            trunk.set_unshard_in_backward(False)
