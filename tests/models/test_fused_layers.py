"""Packed training with our layer ops: the loss and gradients of transformers' modules, scoped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from rlhf_fast.models.dropout import disable_dropout
from rlhf_fast.models.forward import enable_gradient_checkpointing, packed_hidden
from rlhf_fast.models.fused_layers import FUSED_FAMILIES, OPS, fused_layers
from rlhf_fast.models.packed_attention import packed_attention_forward, packed_attention_mode
from rlhf_fast.types import PackedSequences
from rlhf_fast_kernels import native
from rlhf_fast_kernels.matmul import tiles
from tests.models.tiny import build, random_sequences

pytestmark = pytest.mark.skipif(
    native.missing("swiglu", "rotary", "rms_norm_backward") is not None, reason="no compiled module"
)
STOCK = ",".join(f"{op}=reference" for op in OPS)
LENGTHS = [9, 1, 30, 4]


def replaced(model: nn.Module) -> list[str]:
    return sorted(name for name, child in model.named_modules() if "forward" in vars(child))


def gradients(model: nn.Module, sequences: PackedSequences) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    hidden = packed_hidden(model, sequences)
    loss = (hidden * torch.linspace(-1, 1, hidden.shape[1], dtype=hidden.dtype)).square().sum()
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {name: p.grad for name, p in named if p.grad is not None}


def kinds(model: nn.Module) -> set[str]:
    layers = fused_layers(model, packed_attention_forward)
    return {
        type(child).__name__.removeprefix(FUSED_FAMILIES[model.config.model_type])
        for child, _ in layers
    }  # type: ignore[union-attr,index]


def watch_projections(model: nn.Module) -> None:
    """A hook that changes nothing, on one projection of every layer."""
    for name, child in model.named_modules():
        if name.endswith("o_proj"):
            child.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("family", sorted(FUSED_FAMILIES))
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parts", ["whole layers", "watched parts"])
def test_gradients_no_further_from_fp64_than_stock(
    family: str, checkpointing: bool, parts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sequences = build(family).train(), random_sequences(LENGTHS)
    disable_dropout(model)
    if checkpointing:
        enable_gradient_checkpointing(model)
    if parts == "watched parts":
        watch_projections(model)
        on_tiles = {"Linear"} if tiles() else set()
        assert kinds(model) == {"RMSNorm", "MLP", "Attention"} | on_tiles
    else:
        assert kinds(model) == {"RMSNorm", "DecoderLayer"}
    loss, ours = gradients(model, sequences)
    exact_loss, exact = gradients(copy.deepcopy(model).double(), sequences)
    monkeypatch.setenv("RLHF_FAST_OPS", STOCK)
    assert fused_layers(model, packed_attention_forward) == ()
    stock_loss, stock = gradients(model, sequences)
    unit = torch.finfo(torch.float32).eps
    assert abs(loss - exact_loss) <= abs(stock_loss - exact_loss) + 8 * unit * abs(exact_loss)
    assert ours.keys() == stock.keys() == exact.keys()
    for name, want in exact.items():
        error, allowed = (float((x[name] - want).abs().max()) for x in (ours, stock))
        assert error <= 2 * allowed + 16 * unit * float(want.abs().max()), name


def test_forwards_are_put_back() -> None:
    model = build("llama")

    def fail_inside() -> None:
        with packed_attention_mode(model):
            assert "model.norm" in replaced(model)
            with packed_attention_mode(model):  # blocks nest
                pass
            assert "model.norm" in replaced(model)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert replaced(model) == []


def test_what_is_not_transformers_own_is_left_alone() -> None:
    model = build("llama")

    class Other(type(model.model.norm)):  # type: ignore[misc]
        pass

    model.model.norm.__class__ = Other
    theirs = model.model.layers[0].mlp
    theirs.forward = theirs.forward  # as hooks of other libraries do
    with packed_attention_mode(model):
        assert "model.norm" not in replaced(model)
        assert theirs.forward.__func__ is type(theirs).forward
    assert replaced(model) == ["model.layers.0.mlp"]


@pytest.mark.parametrize(
    "what", ["an adapter", "a bias of the MLP", "a backward hook", "dropout", "strides"]
)
def test_a_layer_that_is_not_plain_keeps_its_parts(what: str) -> None:
    model = build("llama", attention_dropout=0.1 if what == "dropout" else 0.0).train()
    layer: Any = model.model.layers[0]
    if what == "an adapter":
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["down_proj"]), layer)
    elif what == "a bias of the MLP":
        layer.mlp.up_proj.bias = nn.Parameter(torch.ones(layer.mlp.up_proj.out_features))
    elif what == "strides":
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.t().contiguous().t()
    elif what == "a backward hook":
        layer.self_attn.register_full_backward_hook(lambda *_: None)
    names = {child: name for name, child in model.named_modules()}
    found = {names[child] for child, _ in fused_layers(model, packed_attention_forward)}
    assert "model.layers.0" not in found
    assert {"model.layers.0.mlp", "model.layers.0.self_attn"} <= found
    assert ("model.layers.1" in found) == (what != "dropout")


@pytest.mark.parametrize("part", ["mlp", "self_attn", "input_layernorm"])
def test_a_derived_part_computes_what_its_class_says(part: str) -> None:
    model, sequences = build("llama"), random_sequences(LENGTHS)
    stock = packed_hidden(model, sequences)
    child = getattr(model.model.layers[0], part)
    kind = type(child)

    class Doubled(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = kind.forward(self, *args, **kwargs)
            return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    child.__class__ = Doubled
    ours = packed_hidden(model, sequences)
    assert not torch.allclose(ours, stock)
    child.__class__ = kind
    child.register_forward_hook(
        lambda _, __, out: (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out
    )
    torch.testing.assert_close(packed_hidden(model, sequences), ours)


def test_adapters_of_a_layer_beside_whole_ones_learn() -> None:
    model, sequences = build("llama"), random_sequences(LENGTHS)
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model.model.layers[0])
    _, grads = gradients(model, sequences)
    assert grads
    assert all("lora_" in name for name in grads)


def test_hooks_of_a_whole_layer_run() -> None:
    model, sequences = build("llama"), random_sequences(LENGTHS)
    seen: list[tuple[int, ...]] = []
    model.model.layers[1].register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape)))
    packed_hidden(model, sequences)
    assert seen == [(1, sum(LENGTHS), model.config.hidden_size)]


def test_bf16_autocast_and_other_families_stay_stock() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_layers(build("llama"), packed_attention_forward) == ()
    assert fused_layers(build("gpt2"), packed_attention_forward) == ()
    assert fused_layers(build("llama").bfloat16(), packed_attention_forward) == ()
