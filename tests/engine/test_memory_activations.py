"""Predicted activations against what autograd saves on a CPU."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_fast.engine.memory_activations import (
    DecoderShape,
    ForwardPlan,
    adapted_names,
    runs_layer_ops,
)
from rlhf_fast.models.adapters import SharedTrunk
from rlhf_fast.models.dropout import disable_dropout
from rlhf_fast.models.forward import (
    enable_gradient_checkpointing,
    packed_hidden,
    set_compute_dtype,
)
from rlhf_fast.models.packed_attention import PackedLayout
from rlhf_fast.types import PackedSequences
from rlhf_fast_kernels.packed_attention import unsupported

EQUAL, RAGGED = [40, 40], [56, 24]


def config(kind, layers=3):
    sizes = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        more = {"n_embd": 64, "n_layer": layers, "n_head": 4, "n_positions": 128}
        return AutoConfig.for_model("gpt2", **sizes, **more)
    return AutoConfig.for_model(
        kind,
        **sizes,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32 if kind == "qwen3" else 16,
        max_position_embeddings=128,
    )


def sequences(lengths):
    return PackedSequences.from_lists([[1] * n for n in lengths])


def saved(module, packed):
    """Bytes of the storages that autograd saves: without weights, and without casts of them."""
    own = {t.untyped_storage()._cdata for t in [*module.parameters(), *module.buffers()]}
    shapes = {tuple(p.shape) for p in module.parameters() if p.dim() == 2}
    shapes |= {s[::-1] for s in shapes}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own and tuple(tensor.shape) not in shapes:
            storages[storage._cdata] = storage  # kept alive: an address must not come twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed_hidden(module, packed)
    return sum(storage.nbytes() for storage in storages.values())


def slots(packed):
    """Of the padded groups, where attention needs them; the widths of heads here are all alike."""
    if unsupported(torch.empty(1, 1, 16)) is None:
        return None
    groups = PackedLayout.build(packed, torch.device("cpu")).padded.groups
    return (
        None
        if groups[0].gather is None and len(groups) == 1
        else sum(g.count * g.width for g in groups)
    )


def plan(module, packed, dtype, **more):
    compute = 2 if dtype == "bfloat16" else 4
    shape = DecoderShape.of(module.config)
    lean = runs_layer_ops(shape, compute, "cpu")
    return ForwardPlan(shape, int(packed.ids.numel()), compute, slots(packed), lean=lean, **more)


@pytest.mark.parametrize("lengths", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_full_fine_tuning(kind, dtype, lengths):
    module = AutoModelForCausalLM.from_config(config(kind)).train()
    disable_dropout(module)
    set_compute_dtype(module, dtype)
    packed = sequences(lengths)
    found, predicted = saved(module, packed), plan(module, packed, dtype)
    assert predicted.shape.known
    assert predicted.saved() == pytest.approx(found, rel=0.02)
    assert predicted.recomputed() == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_segments_padded_into_groups(kind, dtype, monkeypatch):
    monkeypatch.setenv("RLHF_FAST_OPS", "reference")  # stock layers too
    assert slots(sequences(RAGGED)) == 112
    test_full_fine_tuning(kind, dtype, RAGGED)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("rank", [0, 4])
def test_gradient_checkpointing(kind, dtype, rank):
    module = AutoModelForCausalLM.from_config(config(kind, layers=6))
    disable_dropout(module)
    set_compute_dtype(module, dtype)
    packed = sequences(EQUAL)
    whole = plan(module, packed, dtype, rank=rank)
    if rank:
        trunk = trunk_of(module, dtype, rank, ["all-linear"], checkpointing=True)
        with trunk.adapter("actor"):
            found = saved(module, packed)
    else:
        enable_gradient_checkpointing(module.train())
        found = saved(module, packed)
    predicted = plan(module, packed, dtype, rank=rank, checkpointing=True)
    assert predicted.saved() == pytest.approx(found, rel=0.05)
    assert predicted.recomputed() == whole.saved_by_layer()


def trunk_of(module, dtype, rank, targets, *, checkpointing=False):
    trunk = SharedTrunk(module)
    trunk.add("actor", trunk.shape(rank, 8.0, targets), seed=0, trainable=True)
    if dtype == "bfloat16":
        trunk.hold_in(torch.bfloat16)
    trunk.prepare(torch.device("cpu"), gradient_checkpointing=checkpointing)
    return trunk


@pytest.mark.parametrize("lengths", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", ["all-linear"]),
        ("llama", ["q_proj", "v_proj"]),
        ("qwen3", ["all-linear"]),
        ("gpt2", ["all-linear"]),
    ],
)
def test_adapters(kind, targets, dtype, lengths):
    module = AutoModelForCausalLM.from_config(config(kind))
    disable_dropout(module)
    set_compute_dtype(module, dtype)
    trunk = trunk_of(module, dtype, 4, targets)
    packed = sequences(lengths)
    with trunk.adapter("actor"):
        found = saved(module, packed)
    names = adapted_names(trunk.shapes["actor"].layers, 3)
    assert plan(module, packed, dtype, rank=4, adapted=names).saved() == pytest.approx(
        found, rel=0.05
    )


def test_the_head_makes_the_logits_of_a_chunk():
    shape = DecoderShape.of(config("llama"))
    plan = ForwardPlan(shape, 8192, 2)
    gradients = 4 * 8192 * 64 + 4 * 97 * 64
    assert plan.head("cuda", trained=True) == 4096 * 97 * 6 + 97 * 64 * 2 + gradients
    assert plan.head("cpu", trained=False) == 512 * 97 * 4


def test_other_architectures_are_marked_as_estimates():
    assert not DecoderShape.of(AutoConfig.for_model("gemma2")).known
    assert DecoderShape.of(AutoConfig.for_model("gpt2")).inner == 3072
