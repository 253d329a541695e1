"""The roles of a PPO config as sizes: models on the meta device, and what of them is trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.config import PPOConfig
from rlhf_fast.engine.memory_activations import DecoderShape, adapted_names
from rlhf_fast.models.adapter_files import adapter_shape
from rlhf_fast.models.adapters import AdapterShape, SharedTrunk
from rlhf_fast.models.forward import ComputeDtype, compute_dtype
from rlhf_fast.models.meta import meta_model
from rlhf_fast.models.offload import StreamSizes, round_layer_weights, stream_sizes
from rlhf_fast.models.roles import freeze


@dataclass(frozen=True)
class ModelConfigs:
    """Configs of transformers by role; None: the role is made of another or absent.

    Args:
        actor: the policy, or with LoRA the trunk.
        reference: a reference of its own; None: a copy of the actor, or the trunk.
        critic: what the critic starts from; None: the actor.
        reward_model: a whole reward model; None: a function, or an adapter.
        given: roles whose models are objects, which keep their fp32 weights.
    """

    actor: Any
    reference: Any = None
    critic: Any = None
    reward_model: Any = None
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RolePlan:
    """What a role holds.

    Args:
        weights: parameters and buffers, on the meta device.
        trained: those of them that are trained.
        shape: of the decoder that it runs; None if it runs none of its own.
        casts: bytes of the bf16 copies that autocast makes of its weights in a forward.
        streamed: sizes, if it lives in host memory.
        rank, adapted: of its adapter, see `ForwardPlan`.
        module: the model, where the role has a whole one.
    """

    weights: tuple[Tensor, ...]
    trained: tuple[Tensor, ...] = ()
    shape: DecoderShape | None = None
    casts: int = 0
    streamed: StreamSizes | None = None
    rank: int = 0
    adapted: tuple[str, ...] = ()
    module: Any = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of parameters and buffers."""
        return sum(t.nbytes for t in self.weights)


def layout_key(config: PPOConfig) -> str:
    """Configs with equal keys have equal `role_plans`."""
    memory = config.memory
    places = memory.reference, memory.reward_model, memory.value_head
    return repr((config.run.dtype, config.algorithm.estimator, config.lora, places))


def role_plans(config: PPOConfig, models: ModelConfigs) -> dict[str, RolePlan]:
    """Every role by name; `trunk` first where there is one.

    Raises:
        ModelError: as `meta_model`, `stream_sizes` and adapters.
    """
    dtype: ComputeDtype = "bfloat16" if config.run.dtype == "bfloat16" else "float32"
    if config.lora.rank > 0:
        plans = _on_one_trunk(config, models, dtype)
    else:
        plans = {"actor": _trained(meta_model(models.actor, dtype=dtype))}
        if config.algorithm.estimator == "gae":
            plans["critic"] = _critic(config, models, dtype)
        reference = models.reference or models.actor
        plans["reference"] = _frozen(
            meta_model(reference, dtype=dtype),
            offload=config.memory.reference == "offload",
            rounded="reference" not in models.given,
        )
    if models.reward_model is not None:
        plans["reward_model"] = _frozen(
            meta_model(models.reward_model, dtype=dtype, classifier=True),
            offload=config.memory.reward_model == "offload",
            rounded="reward_model" not in models.given,
        )
    return plans


def _critic(config: PPOConfig, models: ModelConfigs, dtype: ComputeDtype) -> RolePlan:
    if config.memory.value_head == "actor":
        head = torch.empty(1, DecoderShape.of(models.actor).width, device="meta")
        return RolePlan((head,), (head,))
    return _trained(meta_model(models.critic or models.actor, dtype=dtype, classifier=True))


def _trained(module: nn.Module) -> RolePlan:
    parameters = tuple(module.parameters())
    return RolePlan(
        (*parameters, *module.buffers()),
        parameters,
        DecoderShape.of(module.config),
        _casts(module),
        module=module,
    )


def _frozen(module: nn.Module, *, offload: bool, rounded: bool) -> RolePlan:
    freeze(module)
    if rounded:
        round_layer_weights(module)
    return RolePlan(
        (*module.parameters(), *module.buffers()),
        shape=DecoderShape.of(module.config),
        streamed=stream_sizes(module) if offload else None,
        casts=_casts(module),
        module=module,
    )


def _casts(module: nn.Module) -> int:
    """Bytes of copies of the fp32 weights that are trained and enter bf16 products."""
    if compute_dtype(module) != "bfloat16":
        return 0
    trunk: Any = module
    layers = (m for m in trunk.base_model.modules() if isinstance(m, nn.Linear | Conv1D))
    # Autocast keeps copies of leaves that ask for a gradient; others die after their product.
    parameters = (p for layer in layers for p in layer.parameters() if p.requires_grad)
    return sum(2 * p.numel() for p in parameters if p.dtype == torch.float32)


def _on_one_trunk(
    config: PPOConfig, models: ModelConfigs, dtype: ComputeDtype
) -> dict[str, RolePlan]:
    lora = config.lora
    trunk = SharedTrunk(meta_model(models.actor, dtype=dtype))
    if dtype == "bfloat16":
        trunk.hold_in(torch.bfloat16)
    new = trunk.shape(lora.rank, lora.alpha, lora.targets)
    start = adapter_shape(lora.actor_adapter, trunk) if lora.actor_adapter else None
    judge = adapter_shape(lora.reward_adapter, trunk) if lora.reward_adapter else None
    model, width = trunk.model, DecoderShape.of(models.actor).width

    def adapter(shape: AdapterShape, *, trained: bool, head: bool) -> RolePlan:
        sizes = [*trunk.tensor_shapes(shape).values(), *([(1, width)] if head else [])]
        tensors = tuple(torch.empty(size, device="meta") for size in sizes)
        decoder = DecoderShape.of(models.actor)
        return RolePlan(
            tensors,
            tensors if trained else (),
            decoder,
            casts=_numel(tensors) * 2 if dtype == "bfloat16" and trained else 0,
            rank=shape.rank,
            adapted=adapted_names(shape.layers, decoder.layers),
        )

    plans = {"trunk": RolePlan((*model.parameters(), *model.buffers()), module=model)}
    plans["actor"] = adapter(start or new, trained=True, head=False)
    if config.algorithm.estimator == "gae":
        plans["critic"] = adapter(judge or new, trained=True, head=True)
    if models.reference is not None:
        plans["reference"] = _frozen(
            meta_model(models.reference, dtype=dtype),
            offload=config.memory.reference == "offload",
            rounded="reference" not in models.given,
        )
    elif start is not None:
        plans["reference"] = adapter(start, trained=False, head=False)
    else:
        plans["reference"] = RolePlan((), shape=DecoderShape.of(models.actor))
    if judge is not None:
        plans["reward_model"] = adapter(judge, trained=False, head=True)
    return plans


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)
