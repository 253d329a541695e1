"""A whole decoder layer as one op: values and gradients against fp64, isolation, misuse."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from rlhf_fast_kernels import LayerSettings, LayerWeights, decoder_layer, native

pytestmark = pytest.mark.skipif(
    native.missing("swiglu", "packed_attention_backward") is not None, reason="no compiled module"
)

H, INNER, QUERIES, KEYS, HEAD = 32, 48, 4, 2, 8
ROWS = (QUERIES * HEAD, KEYS * HEAD, KEYS * HEAD)
CU = torch.tensor([0, 5, 5, 20, 37], dtype=torch.int32)
TOKENS = 37
SETTINGS = LayerSettings(head_dim=HEAD, eps=1e-6, scale=HEAD**-0.5)


class Layer:
    """Weights and inputs of one layer in fp64, drawn from a seed.

    Args:
        biases, norms: of q, k, v and o; of the heads of q and k.
        adjacent: q, k and v are views of one matrix, as the engine lays them out.
    """

    def __init__(
        self, *, biases: bool = False, norms: bool = False, adjacent: bool = False, seed: int = 0
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.adjacent = adjacent
        shapes = dict.fromkeys(LayerWeights._fields, (0,)) | {
            "input_norm": (H,),
            "post_norm": (H,),
            "o": (H, QUERIES * HEAD),
            "gate": (INNER, H),
            "up": (INNER, H),
            "down": (H, INNER),
        }
        shapes |= {name: (rows, H) for name, rows in zip("qkv", ROWS, strict=True)}
        shapes |= {f"{name}_bias": (rows,) for name, rows in zip("qkv", ROWS, strict=True)}
        shapes |= {"o_bias": (H,), "q_norm": (HEAD,), "k_norm": (HEAD,)}
        absent = set() if biases else {"q_bias", "k_bias", "v_bias", "o_bias"}
        absent |= set() if norms else {"q_norm", "k_norm"}
        self.weights = {n: None if n in absent else self.normal(*s) for n, s in shapes.items()}
        self.x, self.above = 5 * self.normal(TOKENS, H), self.normal(TOKENS, H)
        self.cos, self.sin = self.normal(TOKENS, HEAD), self.normal(TOKENS, HEAD)

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return drawn / shape[-1] ** 0.5

    def leaves(self, dtype: torch.dtype) -> LayerWeights:
        """Parameters of this dtype."""
        cast = {n: None if w is None else w.to(dtype, copy=True) for n, w in self.weights.items()}
        if self.adjacent:
            for suffix in ("", "_bias"):
                names = [f"{name}{suffix}" for name in "qkv"]
                parts = [cast[name] for name in names]
                if all(part is not None for part in parts):
                    views = torch.cat(parts).split(ROWS)  # type: ignore[arg-type]
                    cast |= dict(zip(names, views, strict=True))
        return LayerWeights(**{n: None if w is None else nn.Parameter(w) for n, w in cast.items()})

    def run(
        self, dtype: torch.dtype, impl: str, settings: LayerSettings = SETTINGS
    ) -> dict[str, Tensor]:
        """Result and all gradients by name."""
        weights, x = self.leaves(dtype), self.x.to(dtype, copy=True).requires_grad_()
        cos, sin = self.cos.to(dtype), self.sin.to(dtype)
        out = decoder_layer(x, weights, cos, sin, CU, settings, impl=impl)
        out.backward(self.above.to(dtype))
        assert x.grad is not None
        grads = {n: w.grad for n, w in weights._asdict().items() if w is not None}
        return {"out": out.detach(), "x": x.grad, **grads}


def forward(layer: Layer, x: Tensor, weights: LayerWeights, **options: Any) -> Tensor:
    tables = layer.cos.float(), layer.sin.float()
    return decoder_layer(x, weights, *tables, CU, SETTINGS, **options)


@pytest.mark.parametrize("window", [None, 2, 6])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("adjacent", [False, True])
def test_no_further_from_fp64_than_eager(
    window: int | None, biases: bool, norms: bool, adjacent: bool
) -> None:
    layer = Layer(biases=biases, norms=norms, adjacent=adjacent)
    settings = dataclasses.replace(SETTINGS, window=window)
    exact = layer.run(torch.float64, "reference", settings)
    peer = layer.run(torch.float32, "reference", settings)
    got = layer.run(torch.float32, "cpu", settings)
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        error, allowed = (float((a[name] - want).abs().max()) for a in (got, peer))
        unit = torch.finfo(torch.float32).eps
        assert error <= 2 * allowed + 4 * unit * float(want.abs().max()), name


def test_without_gradients_the_same_bits() -> None:
    layer = Layer(biases=True, norms=True)
    weights, x = layer.leaves(torch.float32), layer.x.float()
    with_graph = forward(layer, x, weights)
    with torch.no_grad():
        without = forward(layer, x, weights)
    assert with_graph.requires_grad
    assert not without.requires_grad
    assert torch.equal(with_graph, without)


@pytest.mark.parametrize("trained", [("q",), ("v", "v_bias"), ("down", "input_norm"), ("o_bias",)])
def test_frozen_weights_get_no_gradient(trained: tuple[str, ...]) -> None:
    layer = Layer(biases=True)
    whole, weights = layer.run(torch.float32, "cpu"), layer.leaves(torch.float32)
    for name, weight in weights._asdict().items():
        if weight is not None:
            weight.requires_grad_(name in trained)
    x = layer.x.float().requires_grad_()
    forward(layer, x, weights).backward(layer.above.float())
    torch.testing.assert_close(x.grad, whole["x"], rtol=0, atol=0)
    for name, weight in weights._asdict().items():
        if name in trained:
            torch.testing.assert_close(weight.grad, whole[name], rtol=0, atol=0)
        else:
            assert weight is None or weight.grad is None


def test_segments_do_not_see_each_other() -> None:
    layer = Layer()
    weights, x = layer.leaves(torch.float32), layer.x.float()
    clean = forward(layer, x, weights).detach()
    x = x.clone()
    x[5:20] = torch.nan
    x.requires_grad_()
    out = forward(layer, x, weights)
    assert torch.equal(out[:5], clean[:5])
    assert torch.equal(out[20:], clean[20:])
    out[20:].sum().backward()
    assert x.grad is not None
    assert not x.grad[20:].isnan().any()


def test_strided_rows_and_gradients() -> None:
    layer = Layer()
    weights, wide = layer.leaves(torch.float32), layer.x.float().repeat(1, 2).requires_grad_()
    out = forward(layer, wide[:, :H], weights)
    out.backward(layer.above.float().repeat(1, 2)[:, H:])
    want = layer.run(torch.float32, "cpu")
    assert wide.grad is not None
    torch.testing.assert_close(wide.grad[:, :H], want["x"], rtol=0, atol=0)
    assert (wide.grad[:, H:] == 0).all()


def test_no_token_is_legal() -> None:
    layer = Layer()
    weights = layer.leaves(torch.float32)
    none = torch.zeros(0, HEAD)
    x, cu = torch.zeros(0, H, requires_grad=True), torch.zeros(1, dtype=torch.int32)
    out = decoder_layer(x, weights, none, none, cu, SETTINGS)
    out.sum().backward()
    assert out.shape == (0, H)
    assert weights.gate.grad is not None
    assert (weights.gate.grad == 0).all()


def test_recomputed_under_checkpointing_the_same_bits() -> None:
    layer = Layer(norms=True)
    want = layer.run(torch.float32, "cpu")
    weights, x = layer.leaves(torch.float32), layer.x.float().requires_grad_()
    out = checkpoint(lambda rows: forward(layer, rows, weights), x, use_reentrant=False)
    out.backward(layer.above.float())
    assert x.grad is not None
    torch.testing.assert_close(x.grad, want["x"], rtol=0, atol=0)
    torch.testing.assert_close(weights.gate.grad, want["gate"], rtol=0, atol=0)


@pytest.mark.parametrize("saved", ["as they are", "through hooks"])
def test_a_second_backward_is_refused(saved: str) -> None:
    layer = Layer()
    with save_on_cpu() if saved == "through hooks" else nullcontext():
        out = forward(layer, layer.x.float().requires_grad_(), layer.leaves(torch.float32))
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward of one graph"):
        out.sum().backward()


@pytest.mark.parametrize("norms", [False, True])
def test_autocast_and_defaults_around_change_nothing(norms: bool) -> None:
    layer = Layer(norms=norms)
    want = layer.run(torch.float32, "cpu")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = layer.run(torch.float32, "cpu")
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("bias", ["q_bias", "k_bias", "v_bias"])
def test_one_bias_alone_counts(bias: str) -> None:
    layer = Layer(biases=True, adjacent=True)
    for name in ("q_bias", "k_bias", "v_bias"):
        if name != bias:
            layer.weights[name] = None
    want, got = layer.run(torch.float32, "reference"), layer.run(torch.float32, "cpu")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    layer = Layer()
    out = forward(layer, layer.x.float().requires_grad_(), layer.leaves(torch.float32))
    with pytest.raises(RuntimeError, match="create_graph"):
        out.sum().backward(create_graph=True)


def test_weights_that_changed_since_forward_are_noticed() -> None:
    layer = Layer()
    weights = layer.leaves(torch.float32)
    out = forward(layer, layer.x.float().requires_grad_(), weights)
    with torch.no_grad():
        weights.gate.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_compiled_is_the_reference() -> None:
    layer = Layer()
    weights, x = layer.leaves(torch.float32), layer.x.float()
    compiled = torch.compile(lambda rows: forward(layer, rows, weights), backend="eager")
    torch.testing.assert_close(compiled(x), forward(layer, x, weights))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(1, TOKENS, H)}, ValueError, r"x is .*expected \[N, H\]"),
        ({"q": torch.zeros(ROWS[0] + 4, H)}, ValueError, "multiples of head_dim 8"),
        ({"k": torch.zeros(3 * HEAD, H), "v": torch.zeros(3 * HEAD, H)}, ValueError, "of k's"),
        ({"q_norm": torch.ones(HEAD)}, ValueError, "one of q_norm and k_norm is missing"),
        ({"down": torch.zeros(INNER, H).t()}, ValueError, "down is .*expected contiguous"),
        ({"up": torch.zeros(INNER + 1, H)}, ValueError, r"up is \[49, 32\]"),
        ({"gate": torch.zeros(INNER, H).double()}, TypeError, "gate is torch.float64"),
        ({"cos": torch.zeros(TOKENS, HEAD + 2)}, ValueError, "cos is"),
        ({"cu": torch.tensor([0, 9, 5, 37], dtype=torch.int32)}, ValueError, "rise from 0 to 37"),
        ({"cu": torch.tensor([0, 36], dtype=torch.int32)}, ValueError, "rise from 0 to 37"),
        ({"cu": torch.tensor([0, 37])}, TypeError, "cu_seqlens"),
    ],
)
def test_arguments_that_do_not_fit(
    change: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    layer = Layer()
    given = {"x": layer.x.float(), "cos": layer.cos.float(), "sin": layer.sin.float(), "cu": CU}
    weights = layer.leaves(torch.float32)
    given |= {name: tensor for name, tensor in change.items() if name in given}
    weights = weights._replace(**{n: t for n, t in change.items() if n not in given})
    with pytest.raises(error, match=message):
        decoder_layer(given["x"], weights, given["cos"], given["sin"], given["cu"], SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"), [({"window": 0}, "window is 0"), ({"scale": float("nan")}, "scale nan")]
)
def test_settings_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    layer = Layer()
    given = (layer.x.float(), layer.leaves(torch.float32), layer.cos.float(), layer.sin.float(), CU)
    with pytest.raises(ValueError, match=message):
        decoder_layer(*given, dataclasses.replace(SETTINGS, **change))


NARROW = """
import torch
from rlhf_fast_kernels import LayerSettings, LayerWeights, decoder_layer

settings = LayerSettings(head_dim=2, eps=1e-6, scale=1.0)
cu, cos, sin = torch.tensor([0, 3], dtype=torch.int32), torch.randn(3, 2), torch.randn(3, 2)
for hidden, inner in ((1, 5), (4, 1), (1, 1), (4, 0)):
    shapes = ((hidden,), (2, hidden), (2, hidden), (2, hidden), (hidden, 2), (hidden,))
    shapes += ((inner, hidden), (inner, hidden), (hidden, inner))
    results = []
    for impl in ("cpu", "reference"):
        torch.manual_seed(0)
        leaves = [torch.randn(s).requires_grad_() for s in ((3, hidden), *shapes)]
        weights = LayerWeights(*leaves[1:])
        out = decoder_layer(leaves[0], weights, cos, sin, cu, settings, impl=impl)
        out.sin().sum().backward()
        with torch.no_grad():
            again = decoder_layer(leaves[0], weights, cos, sin, cu, settings, impl=impl)
        results.append([out, again, *(x.grad for x in leaves)])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
"""


def test_narrow_layers_by_the_blas_of_pytorch() -> None:
    """Of a matrix with one row or column both strides are 1; BLAS refuses a wrong one silently."""
    root = Path(__file__).resolve().parents[2]
    environment = {"RLHF_FAST_ISA": "avx512", "PYTHONPATH": str(root / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", NARROW],
        env=os.environ | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "incorrect" not in done.stdout + done.stderr
