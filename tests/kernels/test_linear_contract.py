"""What the linear ops promise besides numbers: memory, messages, torch.library, torch.compile."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from rlhf_fast_kernels import linear_kl, linear_logprobs, linear_ppo_loss, reference
from rlhf_fast_kernels.linear_head import chunk_bounds
from tests.kernels.linear_cases import FAST, SETTINGS, close, doubles, draw, head, leaves, per_token

HIDDEN, WEIGHT, LABELS = head(6, 16, 40)
MASK = torch.tensor([True, False, True, True, True, False])
TENSORS = per_token(6, 40)
LOSS: dict[str, Any] = {"mask": MASK, "normalizer": 4.0, **SETTINGS, **TENSORS}


def loss(**changes: Any) -> Any:
    given = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **LOSS, **changes}
    return linear_ppo_loss(given.pop("hidden"), given.pop("weight"), given.pop("labels"), **given)


def logprobs(**changes: Any) -> Any:
    given = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **changes}
    return linear_logprobs(given.pop("hidden"), given.pop("weight"), given.pop("labels"), **given)


# ---- chunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "most"), [(0, 4), (1, 4), (8, 4), (9, 4), (513, 512), (4097, 4096)]
)
def test_chunks_cover_all_rows_in_nearly_equal_parts(rows, most):
    bounds = chunk_bounds(rows, 100, torch.device("cpu"), most)
    sizes = [b - a for a, b in pairwise(bounds)]
    assert bounds[0] == 0
    assert bounds[-1] == rows
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1


def test_no_tensor_of_all_logits_exists(monkeypatch):
    """Every tensor made during forward and backward is far smaller than [T, V]."""
    tokens, vocab = 64, 500
    hidden, weight, labels = head(tokens, 16, vocab)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else [result]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return result

    own = leaves(hidden, weight)
    with Watch():
        out, entropy = linear_logprobs(*own, labels, chunk_rows=8)
        (out + entropy).sum().backward()
        linear_ppo_loss(
            *own, labels, chunk_rows=8, mask=labels >= 0, normalizer=64.0,
            **SETTINGS, **per_token(tokens, vocab),
        ).loss.backward()  # fmt: skip
        linear_kl(*own, hidden, weight, chunk_rows=8).sum().backward()
    assert largest == weight.numel()  # 8,000; a chunk has 4,000, all logits 32,000


# ---- references ---------------------------------------------------------------------------------


def test_references_pass_gradcheck_in_fp64():
    hidden, weight, bias = leaves(
        HIDDEN[:, :5].double(), WEIGHT[:9, :5].double(), draw(9, seed=3).double()
    )
    labels = LABELS % 9
    ref = (draw(6, 4, seed=4).double(), draw(9, 4, seed=5).double(), None)

    def values(h, w, b):
        return reference.linear_logprobs(h, w, labels, bias=b, temperature=0.7, softcap=2.0)

    def divergence(h, w, b):
        return reference.linear_kl(h, w, *ref[:2], bias=b, mask=MASK, temperature=0.7)

    def objective(h, w, b):
        settings_ = {**SETTINGS, "kl_gradient": "own"}
        return reference.linear_ppo_loss(
            h, w, labels, bias=b, mask=MASK, normalizer=4.0, value_clip_eps=None, value_coef=1.0,
            values=None, old_values=None, returns=None, **settings_, **doubles(TENSORS),
        )[0]  # fmt: skip

    for function in (values, divergence, objective):
        assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_plain_pytorch_rows_serve_fp64():
    want = reference.linear_logprobs(HIDDEN.double(), WEIGHT.double(), LABELS)
    got = linear_logprobs(HIDDEN.double(), WEIGHT.double(), LABELS, impl="reference", chunk_rows=2)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float64
        close(a, b, 1e-12)


# ---- messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: logprobs(weight=WEIGHT[:, :3]),
            ValueError,
            r"hidden must be \[\.\.\., H\].*40, 3",
        ),
        (lambda: logprobs(labels=LABELS[:3]), ValueError, r"labels \(3,\) for hidden \(6, 16\)"),
        (lambda: logprobs(labels=LABELS.int()), TypeError, "labels must be int64, got torch.int32"),
        (lambda: logprobs(labels=LABELS + 40), ValueError, r"label \d+ of the 0-th .* \[0, 40\)"),
        (lambda: logprobs(vocab_size=1), ValueError, r"not in \[0, 1\)"),
        (lambda: logprobs(bias=draw(3)), ValueError, r"bias has shape \(3,\), expected \(40,\)"),
        (lambda: logprobs(hidden=HIDDEN.long()), TypeError, "hidden must be floating point"),
        (lambda: logprobs(temperature=0.0), ValueError, "temperature must be positive"),
        (lambda: logprobs(temperature=-torch.ones(6)), ValueError, "every temperature"),
        (lambda: logprobs(temperature=torch.ones(2)), ValueError, r"labels \(6,\).*got \(2,\)"),
        (lambda: logprobs(softcap=-1.0), ValueError, "softcap must be positive"),
        (lambda: logprobs(rows=torch.tensor([6])), ValueError, r"rows must lie in \[0, 6\)"),
        (lambda: logprobs(rows=torch.tensor([1, 1])), ValueError, "must not repeat"),
        (
            lambda: logprobs(rows=torch.tensor([0.5])),
            ValueError,
            "rows must be a 1-D int32 or int64",
        ),
        (lambda: logprobs(weight=WEIGHT[:0]), ValueError, "vocabulary .* is empty"),
        (lambda: logprobs(impl="cuda"), RuntimeError, "no such implementation"),
        (lambda: loss(advantages=draw(5)), ValueError, r"advantages has shape \(5,\)"),
        (lambda: loss(mask=MASK.int()), TypeError, "mask must be bool"),
        (lambda: loss(mask=MASK[:3]), ValueError, r"mask has \(3,\)"),
        (lambda: loss(normalizer=-1.0), ValueError, "normalizer must be finite"),
        (lambda: loss(ref_logprobs=None), ValueError, "ref_logprobs is absent"),
        (lambda: loss(kl_estimator="exact", ref_logprobs=None), ValueError, "go together with"),
        (lambda: loss(ref_hidden=HIDDEN), ValueError, "go together with kl_estimator='exact'"),
        (
            lambda: loss(weight=WEIGHT.clone().requires_grad_(), weight_out=draw(40, 3)),
            ValueError,
            "weight_out must be contiguous fp32",
        ),
        (
            lambda: linear_kl(HIDDEN, WEIGHT, HIDDEN[:2], WEIGHT),
            ValueError,
            r"ref_hidden \(2, 16\).*tokens of hidden \(6, 16\)",
        ),
        (
            lambda: linear_kl(HIDDEN, WEIGHT, HIDDEN, WEIGHT[:7]),
            ValueError,
            r"vocabulary of weight \(40, 16\)",
        ),
        (
            lambda: linear_kl(HIDDEN, WEIGHT, HIDDEN, WEIGHT, mask=MASK[:2]),
            ValueError,
            r"mask must be bool \(6,\)",
        ),
    ],
)
def test_bad_input_names_argument_and_shape(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_dtensor_is_refused_by_name():
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match="weight is a DTensor; pass its local shard"):
        linear_logprobs(HIDDEN, WEIGHT.as_subclass(DTensor), LABELS)


# ---- torch.library, torch.compile ---------------------------------------------------------------


def _objective(hidden, weight, bias):
    out, entropy = linear_logprobs(hidden, weight, LABELS, bias=bias, temperature=0.7)
    ppo = linear_ppo_loss(hidden, weight, LABELS, bias=bias, **LOSS)
    kl = linear_kl(hidden, weight, HIDDEN, WEIGHT, bias=bias, mask=MASK)
    return out.sum() + 0.1 * entropy.sum() + 2 * ppo.loss + kl.sum() + 0 * ppo.metrics["ratio"]


def test_torch_compile_without_graph_break_gives_the_same_gradients():
    eager, fused = (leaves(HIDDEN, WEIGHT, draw(40, seed=3)) for _ in range(2))
    _objective(*eager).backward()
    compiled = torch.compile(_objective, fullgraph=True, backend="aot_eager")
    compiled(*fused).backward()
    for a, b in zip(eager, fused, strict=True):
        close(b.grad, a.grad, 1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_torch_compile_of_the_loss_by_the_reference(exact):
    more = {"ref_hidden": HIDDEN + 0.1, "ref_weight": WEIGHT} if exact else {}
    options = {**LOSS, "grad_scale": 3.0, "entropy_coef": 0.1, "impl": "reference"}
    if exact:
        options |= {"ref_logprobs": None, "kl_estimator": "exact", "kl_coef": 0.2, **more}

    def run(hidden, weight):
        out = linear_ppo_loss(hidden, weight, LABELS, **options)
        return out.loss, out.logprobs, out.entropy, *out.metrics.values(), *out.extrema.values()

    eager, fused = (leaves(HIDDEN, WEIGHT) for _ in range(2))
    want = run(*eager)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*fused)
    for x, y in zip(got, want, strict=True):
        close(x.detach(), y.detach(), 1e-6)
    assert not any(x.requires_grad for x in got[1:])
    want[0].backward()
    got[0].backward()
    for x, y in zip(fused, eager, strict=True):
        close(x.grad, y.grad, 1e-6)


def test_torch_compile_with_dynamic_shapes():
    def function(hidden, weight, labels):
        out, _ = linear_logprobs(hidden, weight, labels)
        return out * 2.0

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 5, 6):
        got = compiled(HIDDEN[:tokens], WEIGHT, LABELS[:tokens])
        close(got, function(HIDDEN[:tokens], WEIGHT, LABELS[:tokens]), 1e-6)


def test_opcheck():
    hidden, weight, bias = leaves(HIDDEN, WEIGHT, draw(40, seed=3))
    head_ = (hidden, weight, bias)
    shape = (FAST, torch.float32, 0.9, None, None, 4)
    ops = torch.ops.rlhf_fast
    torch.library.opcheck(
        ops.linear_logprobs.default, (*head_, LABELS, None, None, -100, *shape, False)
    )
    torch.library.opcheck(
        ops.linear_kl.default, (*head_, HIDDEN, WEIGHT, None, MASK, None, None, *shape)
    )
    scalars = (0.2, 0.2, None, 0.01, 0.1, "k3", "k2", 20.0)
    tensors = [TENSORS[n] for n in ("old_logprobs", "advantages", "ref_logprobs", "weights")]
    count = torch.tensor(4.0, dtype=torch.float64)
    torch.library.opcheck(
        ops.linear_ppo_loss.default,
        (
            *(*head_, LABELS, MASK, None, None, *tensors, None, None, None, count, [True] * 3),
            *(*shape, 1.0, *scalars),
        ),
    )


# ---- graphs -------------------------------------------------------------------------------------


def test_compiled_metrics_and_log_probs_carry_no_gradient():
    hidden = HIDDEN.clone().requires_grad_()

    def run(hidden):
        out = linear_ppo_loss(hidden, WEIGHT, LABELS, **LOSS)
        return out.loss, out.logprobs, out.metrics["kl"]

    loss_, *constants = torch.compile(run, fullgraph=True, backend="aot_eager")(hidden)
    assert loss_.requires_grad
    assert not any(x.requires_grad for x in constants)


@pytest.mark.parametrize("which", ["ref_hidden", "weight"])
def test_a_change_of_what_backward_reads_is_noticed(which):
    tensors = {"weight": WEIGHT.clone().requires_grad_(), "ref_hidden": HIDDEN.clone()}
    kl = linear_kl(HIDDEN, tensors["weight"], tensors["ref_hidden"], WEIGHT)
    with torch.no_grad():
        tensors[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_per_token_tensors_of_any_float_dtype(dtype):
    wanted = loss()
    got = loss(**{name: x.to(dtype) for name, x in TENSORS.items()})
    close(got.loss, wanted.loss, 1e-7 if dtype == torch.float64 else 1e-2)


def test_backward_under_autocast_stays_in_the_dtype_of_forward():
    def gradient(wrap):
        own = leaves(HIDDEN, WEIGHT)
        out, _ = linear_logprobs(*own, LABELS)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=wrap):
            out.sum().backward()
        return own[1].grad

    assert torch.equal(gradient(True), gradient(False))
