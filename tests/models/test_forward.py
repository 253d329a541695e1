"""The packed forward equals the stock forward of every sequence by itself."""

from __future__ import annotations

import copy
import importlib.machinery
import itertools
import sys
import types
from collections.abc import Iterator

import pytest
import torch
import torch.nn.attention.varlen

from rlhf_fast.errors import ModelError
from rlhf_fast.models import packed_attention
from rlhf_fast.models.dropout import disable_dropout
from rlhf_fast.models.forward import (
    PACKED_MODEL_TYPES,
    compute_dtype,
    enable_gradient_checkpointing,
    packed_hidden,
    runs_packed,
    set_compute_dtype,
)
from rlhf_fast.types import PackedSequences
from tests.models.tiny import build, random_sequences

MIXED = [5, 1, 9, 3]
# One long and many short segments: more than one padded group.
SKEWED = [40, 2, 3, 1, 2, 5, 4, 2, 3]


def stock_hidden(model: torch.nn.Module, sequences: PackedSequences) -> torch.Tensor:
    """Every sequence alone through the untouched backbone, in eval mode."""
    model = copy.deepcopy(model).eval()
    bounds = sequences.cu_seqlens.tolist()
    rows = [
        model.base_model(input_ids=sequences.ids[None, a:b], use_cache=False).last_hidden_state[0]
        for a, b in itertools.pairwise(bounds)
        if b > a
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("model_type", sorted(PACKED_MODEL_TYPES))
@pytest.mark.parametrize("lengths", [MIXED, SKEWED, [4, 4, 4], [7]], ids=str)
def test_packed_hidden_equals_each_sequence_alone(model_type: str, lengths: list[int]) -> None:
    model, sequences = build(model_type), random_sequences(lengths)
    disable_dropout(model)
    assert runs_packed(model)
    with torch.no_grad():
        ours, stock = packed_hidden(model, sequences), stock_hidden(model, sequences)
    # Either is up to 4e-6 from fp64.
    torch.testing.assert_close(ours, stock, rtol=2e-6, atol=6e-6)


@pytest.mark.parametrize("model_type", ["opt", "gemma2"])
def test_other_architectures_run_right_padded(model_type: str) -> None:
    model, sequences = build(model_type), random_sequences(MIXED)
    disable_dropout(model)
    assert not runs_packed(model)
    with torch.no_grad():
        ours, stock = packed_hidden(model, sequences), stock_hidden(model, sequences)
    torch.testing.assert_close(ours, stock, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "phimoe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_longrope_follows_each_sequence(model_type: str, checkpointing: bool) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.5],
        "long_factor": [3.0, 5.0],
        "original_max_position_embeddings": 16,
        **({"short_mscale": 1.0, "long_mscale": 1.25} if model_type == "phimoe" else {}),
    }
    extra = {"original_max_position_embeddings": 16} if model_type.startswith("phi") else {}
    # Below, at and above the limit, an empty one among them.
    sequences = random_sequences([10, 30, 0, 16, 17, 5])
    model = build(model_type, rope_parameters=rope, **extra)
    disable_dropout(model)
    stock = stock_hidden(model, sequences)
    if checkpointing:
        enable_gradient_checkpointing(model)
    model.train(checkpointing)
    ours = packed_hidden(model, sequences)
    torch.testing.assert_close(ours, stock, rtol=2e-5, atol=2e-5)
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("window", [1, 3, 8, 100])
def test_sliding_window(window: int) -> None:
    model, sequences = build("mistral", sliding_window=window), random_sequences(SKEWED)
    with torch.no_grad():
        ours, stock = packed_hidden(model, sequences), stock_hidden(model, sequences)
    torch.testing.assert_close(ours, stock, rtol=2e-6, atol=6e-6)


def reference_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: list[int],
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    """Attention by its definition, [T, heads, dim], one segment and one head at a time.

    `window` is (left, right) as in the flash kernels: -1 is without limit.
    """
    out = torch.zeros_like(q)
    for a, b in itertools.pairwise(bounds):
        distance = torch.arange(b - a)[:, None] - torch.arange(b - a)[None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if window[0] >= 0:
            seen &= distance <= window[0]
        if window[1] >= 0:
            seen &= distance >= -window[1]
        for head in range(q.shape[1]):
            source = head // (q.shape[1] // k.shape[1])
            scores = q[a:b, head] @ k[a:b, source].T * scale
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            out[a:b, head] = weights @ v[a:b, source]
    return out


def fake_flash_attn() -> types.ModuleType:
    """A stand-in with the calling convention of flash_attn_varlen_func."""

    def flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size
    ):  # type: ignore[no-untyped-def]
        assert cu_q.dtype == torch.int32
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k == int(cu_q.diff().max())
        right = 0 if causal else window_size[1]
        return reference_varlen(q, k, v, cu_q.tolist(), softmax_scale, (window_size[0], right))

    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


def fake_torch_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):  # type: ignore[no-untyped-def]
    """A stand-in with the calling convention of torch.nn.attention.varlen.varlen_attn."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert max_q == max_k == int(cu_q.diff().max())
    return reference_varlen(q, k, v, cu_q.tolist(), scale, window_size)


@pytest.fixture(params=["flash_attn", "torch"])
def varlen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packed attention as on CUDA in bf16, with the kernel's definition in the kernel's place."""
    packed_attention._flash_attn_kernel.cache_clear()
    packed_attention._torch_varlen_kernel.cache_clear()
    if request.param == "flash_attn":
        monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
    else:
        monkeypatch.setitem(sys.modules, "flash_attn", None)
        monkeypatch.setattr(packed_attention, "_flash_attn_kernel", lambda: None)
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", fake_torch_varlen)
    kernel = packed_attention._varlen_kernel("cuda", torch.bfloat16, 64)
    assert kernel is not None
    monkeypatch.setattr(packed_attention, "_varlen_kernel", lambda *_: kernel)
    yield
    monkeypatch.undo()
    packed_attention._flash_attn_kernel.cache_clear()
    packed_attention._torch_varlen_kernel.cache_clear()


@pytest.mark.usefixtures("varlen")
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {}), ("gpt2", {}), ("granite", {}), ("mistral", {"sliding_window": 4})],
)
def test_variable_length_kernels_are_called_as_they_ask(
    model_type: str, settings: dict[str, int]
) -> None:
    model, sequences = build(model_type, **settings), random_sequences(SKEWED)
    disable_dropout(model)
    with torch.no_grad():
        ours, stock = packed_hidden(model, sequences), stock_hidden(model, sequences)
    torch.testing.assert_close(ours, stock, rtol=5e-6, atol=5e-6)


def test_variable_length_kernels_are_for_cuda_in_half_precision() -> None:
    choose = packed_attention._varlen_kernel
    assert choose("cpu", torch.bfloat16, 64) is None
    assert choose("cuda", torch.float32, 64) is None
    assert choose("cuda", torch.bfloat16, 512) is None
    assert choose("cuda", torch.bfloat16, 20) is None


def test_gradients_equal_those_of_each_sequence_alone() -> None:
    model, sequences = build("qwen2"), random_sequences(SKEWED)
    weight = torch.randn(int(sequences.ids.numel()), 16)
    (packed_hidden(model, sequences) * weight).sum().backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    bounds = sequences.cu_seqlens.tolist()
    for a, b in itertools.pairwise(bounds):
        hidden = model.base_model(input_ids=sequences.ids[None, a:b]).last_hidden_state[0]
        (hidden * weight[a:b]).sum().backward()
    stock = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == stock.keys()
    for name, grad in stock.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))


def test_a_segment_does_not_depend_on_its_neighbours() -> None:
    model = build("llama")
    alone = random_sequences([6], seed=3)
    parts = [*random_sequences([9], seed=1).ids.split(9), alone.ids]
    with torch.no_grad():
        together = packed_hidden(model, PackedSequences.from_lists(parts))
        torch.testing.assert_close(together[9:], packed_hidden(model, alone), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("lengths", [[6, 2, 3], SKEWED], ids=str)
def test_nan_in_one_segment_stays_there(lengths: list[int]) -> None:
    model = build("llama", tie_word_embeddings=False)
    sequences = random_sequences(lengths)
    ids = torch.where(sequences.ids == 36, 5, sequences.ids)
    ids[0] = 36
    with torch.no_grad():
        model.get_input_embeddings().weight[36] = float("nan")
    with torch.no_grad():
        hidden = packed_hidden(
            model, PackedSequences(ids, sequences.positions, sequences.cu_seqlens)
        )
    assert hidden[: lengths[0]].isnan().all()
    assert hidden[lengths[0] :].isfinite().all()


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_empty_segments_and_empty_batches(model_type: str) -> None:
    model = build(model_type)
    disable_dropout(model)
    with torch.no_grad():
        some = packed_hidden(model, random_sequences([0, 5, 0, 2]))
        dense = packed_hidden(model, random_sequences([5, 2]))
        torch.testing.assert_close(some, dense, rtol=2e-6, atol=2e-6)
        assert packed_hidden(model, random_sequences([])).shape == (0, 16)
        assert packed_hidden(model, random_sequences([0, 0])).shape == (0, 16)


def test_attention_is_stock_again_after_success_and_after_an_exception() -> None:
    model = build("llama")
    packed_hidden(model, random_sequences(MIXED))
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {
        "sdpa"
    }
    bad = random_sequences(MIXED)
    bad.ids[3] = 1000
    with pytest.raises(IndexError):
        packed_hidden(model, bad)
    assert model.config._attn_implementation == "sdpa"
    prompt = random_sequences([4]).ids[None]
    tokens = model.eval().generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > 4


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_gradient_checkpointing_gives_the_same_gradients(model_type: str) -> None:
    sequences = random_sequences(SKEWED)
    gradients = []
    for checkpointing in (False, True):
        model = build(model_type)
        disable_dropout(model)
        if checkpointing:
            enable_gradient_checkpointing(model)
            # A copy recomputes with its own configs, not with the original's.
            model = copy.deepcopy(model)
        model.train()
        packed_hidden(model, sequences).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-6, atol=1e-6)


def test_foreign_gradient_checkpointing_is_refused() -> None:
    model = build("llama")
    model._set_gradient_checkpointing(True)
    with pytest.raises(ModelError, match="RF3002"):
        packed_hidden(model.train(), random_sequences(MIXED))
    with torch.no_grad():
        packed_hidden(model.eval(), random_sequences(MIXED))


def test_bfloat16_is_autocast_over_fp32_masters() -> None:
    model, sequences = build("llama"), random_sequences(MIXED)
    with torch.no_grad():
        exact = packed_hidden(model, sequences)
        set_compute_dtype(model, "bfloat16")
        rounded = packed_hidden(model, sequences)
    assert compute_dtype(model) == "bfloat16"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    error = (rounded.float() - exact).abs().max()
    assert 1e-5 < error < 0.2
    with pytest.raises(ModelError, match="RF3001"):
        set_compute_dtype(model, "float16")  # type: ignore[arg-type]
