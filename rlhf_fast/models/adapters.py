"""One frozen trunk that several roles share, each through a LoRA adapter of its own (peft).

The trunk is an ordinary Hugging Face causal LM whose linear layers peft has replaced in place. An
adapter adds `alpha / rank * B(A(x))` to a layer's output; B starts at 0, so a new adapter changes
no bit. Without an active adapter every layer is the base layer it wraps: the reference costs
nothing. No adapter is ever merged into the trunk: rounding would stay behind in it.

peft ties "active" to "trainable": its `set_adapter` rewrites `requires_grad`, so that selecting the
critic would freeze the actor between its forward and its optimizer step. Here the two are apart.
What trains is settled in `SharedTrunk.add`; `SharedTrunk.adapter` only selects.
"""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.config_lora import ALL_LINEAR
from rlhf_fast.errors import ModelError
from rlhf_fast.models.forward import enable_gradient_checkpointing
from rlhf_fast.models.heads import CALIBRATION_KEY
from rlhf_fast.models.packed_attention import recomputed_in
from rlhf_fast.models.sharded_export import whole

_SHOWN = 8
_BASE = ".base_layer"


@dataclass(frozen=True)
class AdapterShape:
    """What an adapter is before it holds numbers.

    Args:
        rank: of A and B in every layer.
        alpha: the output is scaled by alpha / rank, or alpha / sqrt(rank).
        layers: full names of the layers that have it.
        targets: how a peft config names these layers.
        rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023).
    """

    rank: int
    alpha: float
    layers: tuple[str, ...]
    targets: tuple[str, ...]
    rslora: bool = False

    def peft_config(self, **more: Any) -> Any:
        """The `peft.LoraConfig` of this shape; `more` are its other fields."""
        alpha: Any = self.alpha  # declared as int, and only ever divided by the rank
        return peft.LoraConfig(
            r=self.rank, lora_alpha=alpha, use_rslora=self.rslora, bias="none", **more
        )


class SharedTrunk:
    """A causal LM, frozen, with adapters by name.

    Args:
        model: Hugging Face causal LM as the loaders return it; its linear layers are replaced in
            place as adapters come, its weights never change.
        source: where it was loaded from, for exported adapters; may be empty.

    Attributes:
        model: what runs. Use it within `adapter(name)`.
        digest: SHA-256 of the weights as loaded, see `weights_digest`.

    Raises:
        ModelError: the model has adapters already (RF3065).
    """

    def __init__(self, model: nn.Module, *, source: str = "") -> None:
        if any(isinstance(m, LoraLayer) for m in model.modules()) or hasattr(model, "peft_config"):
            raise ModelError(
                "RF3065",
                "the model has adapters already",
                where=type(model).__name__,
                expected="a base model: the trunk that all roles share",
                remedy="pass the base model, and the adapter's directory as lora.actor_adapter",
            )
        model.requires_grad_(False)
        self.model: Any = model
        self.source = source
        self.digest = weights_digest(model)
        self.shapes: dict[str, AdapterShape] = {}
        self._trainable: dict[str, bool] = {}
        self._layers: list[Any] = []
        self._active: str | None = None

    # ---- adapters -------------------------------------------------------------------------------

    def shape(self, rank: int, alpha: float, targets: Sequence[str]) -> AdapterShape:
        """The shape of a new adapter.

        Args:
            rank, alpha: see `AdapterShape`.
            targets: ends of layer names, or "all-linear": every linear layer of the blocks.

        Raises:
            ModelError: a target that no linear layer bears (RF3063), or that is the vocabulary head
                (RF3064).
        """
        linear = self._linear_layers()
        if list(targets) == [ALL_LINEAR]:
            return AdapterShape(rank, alpha, tuple(linear), _short_names(linear))
        found = {t: [n for n in linear if _is_called(n, t)] for t in targets}
        head = self._name_of(self.model.get_output_embeddings())
        if any(_is_called(head, t) for t in targets):
            raise ModelError(
                "RF3064",
                f"an adapter on the vocabulary head {head}",
                where="lora.targets",
                expected="layers of the blocks: the head is shared, and read as one linear map",
                remedy="leave it out",
            )
        unknown = [t for t, names in found.items() if not names]
        if unknown:
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ModelError(
                "RF3063",
                f"{len(unknown)} of lora.targets name no linear layer: {', '.join(unknown)}",
                where=f"lora.targets, {type(self.model).__name__}",
                expected=f"{ALL_LINEAR}, or among {', '.join(known)}",
                remedy="correct them",
            )
        chosen = {n for names in found.values() for n in names}
        layers = tuple(n for n in linear if n in chosen)
        return AdapterShape(rank, alpha, layers, tuple(targets))

    def add(
        self,
        name: str,
        shape: AdapterShape,
        *,
        seed: int,
        trainable: bool,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put an adapter on the trunk: fp32, not active.

        Args:
            name: of the role.
            shape: which layers, and how wide.
            seed: A is drawn from it as nn.Linear draws (Kaiming uniform, a = sqrt(5)); B is 0. The
                global random state is left as it was.
            trainable: whether its parameters ask for a gradient, for good.
            tensors: numbers to start from, by the names of `tensors(name)`.
        """
        config = shape.peft_config(
            target_modules=list(shape.layers), fan_in_fan_out=self.is_transposed(shape)
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            peft.inject_adapter_in_model(config, self.model, name)
        self._layers = [layer for _, layer in self.named_layers()]
        self.shapes[name] = shape
        self._trainable[name] = trainable
        self._settle()
        parameters = self._parameters(name)
        assert {n.rpartition(".lora_")[0] for n in parameters} == set(shape.layers)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in parameters.items():
            start = torch.zeros(parameter.shape) if tensors is None else tensors[key].float()
            if tensors is None and key.endswith(".lora_A.weight"):
                nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            # In place of what peft made, which has the type of the trunk.
            parameter.data = start.to(parameter.device, copy=True)

    def is_transposed(self, shape: AdapterShape) -> bool:
        """Whether layers hold their weights as [in, out], as GPT-2's do; peft wants to be told."""
        return any(isinstance(self._bare(name), Conv1D) for name in shape.layers)

    def tensor_shapes(self, shape: AdapterShape) -> dict[str, tuple[int, ...]]:
        """Sizes of the tensors of such an adapter on this trunk, where it has such layers."""
        linear = set(self._linear_layers())
        sizes: dict[str, tuple[int, ...]] = {}
        for name in shape.layers:
            if name in linear:
                rows, columns = self._bare(name).weight.shape
                conv = isinstance(self._bare(name), Conv1D)
                inputs, outputs = (rows, columns) if conv else (columns, rows)
                sizes[f"{name}.lora_A.weight"] = (shape.rank, inputs)
                sizes[f"{name}.lora_B.weight"] = (outputs, shape.rank)
        return sizes

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The adapter's numbers: `<layer>.lora_A.weight` [rank, in], `.lora_B.weight` [out, rank].

        They alias the live weights.
        """
        return {key: parameter.detach() for key, parameter in self._parameters(name).items()}

    def role_module(self, name: str | None, *, head: bool = False) -> AdapterModule:
        """What optimizer and checkpoint see of a role; see `AdapterModule`."""
        return AdapterModule(self, name, head=head)

    # ---- selecting ------------------------------------------------------------------------------

    @property
    def active(self) -> str | None:
        """The active adapter; None: the bare trunk."""
        return self._active

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Run with one adapter, or with none; what was active is active again afterwards.

        Layers that are recomputed in backward are recomputed with the adapter of their forward.
        """
        with self._selected(name), recomputed_in(lambda: self._selected(name)):
            yield

    @contextmanager
    def _selected(self, name: str | None) -> Iterator[None]:
        if name is not None and name not in self.shapes:
            raise KeyError(f"no adapter {name!r}; there are {sorted(self.shapes)}")
        previous = self._active
        self._select(name)
        try:
            yield
        finally:
            self._select(previous)

    def _select(self, name: str | None) -> None:
        if name == self._active:
            return
        for layer in self._layers:
            self._apply_to(layer, name)
        self._active = name

    @staticmethod
    def _apply_to(layer: Any, name: str | None) -> None:
        # peft's own setters would rewrite requires_grad as well.
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]

    # ---- the trunk ------------------------------------------------------------------------------

    def hold_in(self, dtype: torch.dtype) -> None:
        """Keep the frozen weights in `dtype`; adapters stay fp32.

        Buffers keep their type: rotary frequencies lose positions in bf16.
        """
        for name, parameter in self.model.named_parameters():
            if not _of_adapter(name):
                parameter.data = parameter.data.to(dtype)

    def prepare(self, device: torch.device, *, gradient_checkpointing: bool) -> None:
        """Put trunk and adapters on a device. Train mode only matters for recomputation."""
        self.model.to(device)
        if gradient_checkpointing:
            enable_gradient_checkpointing(self.model)
        self.model.train(gradient_checkpointing)

    def merged(self, name: str) -> Any:
        """A copy of the base model with an adapter in its weights: fp32, on the CPU."""
        # Weights are taken to the CPU before the copy, which then never needs room on the device.
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to("cpu", torch.float32, copy=True), requires_grad=False)
            for p in self.model.parameters()
        }
        deltas = {
            path: layer.get_delta_weight(name).detach().float().cpu()
            for path, layer in self.named_layers()
            if name in layer.lora_A
        }
        merged = copy.deepcopy(self.model, memo).cpu()
        for path, _ in self.named_layers():
            base = merged.get_submodule(path).get_base_layer()
            if path in deltas:
                base.weight.data += deltas[path]
            parent, _, attribute = path.rpartition(".")
            setattr(merged.get_submodule(parent), attribute, base)
        if hasattr(merged, "peft_config"):
            del merged.peft_config
        return merged.eval()

    def named_layers(self) -> Iterator[tuple[str, Any]]:
        """peft's layers by the names of the layers that they wrap."""
        return ((n, m) for n, m in self.model.named_modules() if isinstance(m, LoraLayer))

    def _linear_layers(self) -> list[str]:
        """Names of the linear layers of the blocks: of all but the vocabulary head."""
        skipped = {id(self.model.get_output_embeddings())}
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear | Conv1D | LoraLayer)
            and not (_of_adapter(name) or name.endswith(_BASE))
            and id(module) not in skipped
        ]

    def _bare(self, name: str) -> Any:
        module = self.model.get_submodule(name)
        return module.get_base_layer() if isinstance(module, LoraLayer) else module

    def _name_of(self, wanted: nn.Module | None) -> str:
        return next((n for n, m in self.model.named_modules() if m is wanted), "")

    def _parameters(self, name: str) -> dict[str, nn.Parameter]:
        return {
            f"{path}.{kind}.weight": getattr(layer, kind)[name].weight
            for path, layer in self.named_layers()
            for kind in ("lora_A", "lora_B")
            if name in layer.lora_A
        }

    def _settle(self) -> None:
        """Undo what peft did when it put in an adapter: it activates it and lets it train."""
        for layer in self._layers:
            self._apply_to(layer, self._active)
        self.model.requires_grad_(False)
        for name, trainable in self._trainable.items():
            for parameter in self._parameters(name).values():
                parameter.requires_grad_(trainable)


class AdapterModule(nn.Module):
    """The parameters of one role on a shared trunk, as a module: its adapter, and its scalar head.

    Optimizers train, and checkpoints hold, exactly these. The trunk is not among them.

    Args:
        trunk: the shared trunk.
        name: adapter of the role; None has no parameters.
        head: also make a scalar head `score` of zeros.

    Attributes:
        config: the trunk's; with a head a copy of its own, which can carry a calibration.
    """

    def __init__(self, trunk: SharedTrunk, name: str | None, *, head: bool = False) -> None:
        super().__init__()
        self.trunk = trunk
        self.name = name
        self.config = trunk.model.config
        self.adapter = nn.Module()
        for path, layer in trunk.named_layers():
            if name in layer.lora_A:
                place = _nested(self.adapter, path)
                place.lora_A, place.lora_B = layer.lora_A[name], layer.lora_B[name]
        if head:
            embedding = trunk.model.get_input_embeddings().weight
            self.score = nn.Linear(embedding.shape[1], 1, bias=False, device=embedding.device)
            nn.init.zeros_(self.score.weight)
            self.config = copy.deepcopy(self.config)
            self.config.num_labels = 1
            setattr(self.config, CALIBRATION_KEY, None)

    def get_input_embeddings(self) -> Any:
        """The trunk's: a role reads the ids that the trunk reads."""
        return self.trunk.model.get_input_embeddings()


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a model's weights, adapters left out.

    The same before and after adapters were put on it, and however it is sharded: sharded weights
    are gathered one at a time, which is collective, and every rank computes the digest. Of a model
    on the meta device, which has sizes alone, it is empty.
    """
    if next(module.parameters()).is_meta:
        return ""
    digest = hashlib.sha256()
    named = base_tensors(module)
    for name in sorted(named):
        tensor = whole(named[name])
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state dict that a model has without its adapters: live tensors."""
    return {
        name.replace(_BASE, ""): tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if not _of_adapter(name)
    }


def _of_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _short_names(layers: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in layers}))


def _nested(root: nn.Module, path: str) -> Any:
    """The container at a dotted path below `root`, made where it is missing."""
    for part in path.split("."):
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root
