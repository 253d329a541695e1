"""Models in host memory, read a layer at a time: the same bits, few bytes, nothing left over."""

import copy

import pytest
import torch

from rlhf_fast.errors import ModelError
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.models.offload import StreamedModule, round_layer_weights
from rlhf_fast.models.roles import Actor, Reference, RewardModel, freeze
from rlhf_fast.ppo.exact_kl import read_both
from tests.models.tiny import build, build_classifier, next_token_targets, random_sequences

CPU = torch.device("cpu")
LENGTHS = [5, 1, 9, 3]
SEQUENCES = random_sequences(LENGTHS)
TARGETS = next_token_targets(SEQUENCES)
ALIGNMENT = 256


def aligned(tensors) -> int:
    return sum(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in tensors)


def streamer(role) -> StreamedModule:
    return role._weights.__self__


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "gemma2", "opt", "mixtral"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_streamed_reference_gives_the_bits_of_the_resident_one(model_type, tied, dtype):
    model = build(model_type, tie_word_embeddings=tied, num_hidden_layers=3)
    set_compute_dtype(model, dtype)
    resident = Reference(copy.deepcopy(model))
    before = sum(p.nbytes for p in model.parameters())
    round_layer_weights(model)
    streamed = Reference(model, streamed_to=CPU)
    # GPT-2 has no nn.Linear; the experts of Mixtral are parameters of their own.
    halved = dtype == "bfloat16" and model_type != "gpt2"
    assert (streamer(streamed).host_bytes < before) == halved
    for _ in range(2):
        for found, expected in zip(
            streamed.logprobs(SEQUENCES, TARGETS, with_entropy=True),
            resident.logprobs(SEQUENCES, TARGETS, with_entropy=True),
            strict=True,
        ):
            assert torch.equal(found, expected)
    assert streamer(streamed).device_bytes == 0


def test_a_streamed_reward_model_scores_the_same_bits_over_several_forwards():
    model = build_classifier("llama", num_hidden_layers=3)
    resident = RewardModel(copy.deepcopy(model))
    streamed = RewardModel(model, streamed_to=CPU)
    expected = resident.score_sequences(SEQUENCES, token_budget=9)
    assert torch.equal(streamed.score_sequences(SEQUENCES, token_budget=9), expected)
    assert streamer(streamed).device_bytes == 0


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_two_layers_and_the_largest_other_weight_are_on_the_device_at_once(layers):
    model = build("llama", num_hidden_layers=layers)
    role = Reference(model, streamed_to=CPU)
    seen = []
    for part in model.modules():
        part.register_forward_pre_hook(lambda *_: seen.append(streamer(role).device_bytes))
        part.register_forward_hook(lambda *_: seen.append(streamer(role).device_bytes))
    role.logprobs(SEQUENCES, TARGETS)
    two = 2 * aligned(model.model.layers[0].parameters())
    assert max(seen) == two + aligned([model.model.embed_tokens.weight])
    assert streamer(role).host_bytes == sum(p.nbytes for p in model.parameters())


def test_layers_compute_on_copies_and_the_weights_return_to_the_host():
    model = build("llama", num_hidden_layers=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    role = Reference(model, streamed_to=CPU)
    host = {name: p.data_ptr() for name, p in model.named_parameters()}
    slots = []
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight
        layer.mlp.register_forward_pre_hook(lambda *_, w=weight: slots.append(w.data_ptr()))
    role.logprobs(SEQUENCES, TARGETS)
    assert slots[0] == slots[2] != slots[1]
    assert not {*slots} & {*host.values()}
    assert host == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("where", ["embed_tokens", "layers.0", "layers.1", "norm"])
def test_an_exception_inside_leaves_it_as_it_was(where):
    model = build("llama", num_hidden_layers=3)
    expected, _ = Reference(copy.deepcopy(model)).logprobs(SEQUENCES, TARGETS)
    role = Reference(model, streamed_to=CPU)
    host = [p.data_ptr() for p in model.parameters()]

    def fail(*_):
        raise KeyboardInterrupt

    hook = model.model.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        role.logprobs(SEQUENCES, TARGETS)
    hook.remove()
    assert streamer(role).device_bytes == 0
    assert host == [p.data_ptr() for p in model.parameters()]
    assert torch.equal(role.logprobs(SEQUENCES, TARGETS)[0], expected)


def test_hidden_states_and_head_outlive_the_forward_for_the_exact_kl():
    actor, model = Actor(build("llama", seed=1)), build("llama", seed=2)
    resident, streamed = Reference(copy.deepcopy(model)), Reference(model, streamed_to=CPU)
    ours = actor.head_rows(SEQUENCES)
    found = read_both(ours, streamed.head_rows(SEQUENCES), TARGETS, temperature=0.7)
    expected = read_both(ours, resident.head_rows(SEQUENCES), TARGETS, temperature=0.7)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    rows = streamed.head_rows(SEQUENCES)
    assert rows is not None
    assert rows.head.weight.data_ptr() != model.lm_head.weight.data_ptr()


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(ModelError, match=r"RF3070.*it is trained"):
        StreamedModule(build("llama"), CPU)
    shared = build("llama", num_hidden_layers=2)
    shared.model.layers[1] = shared.model.layers[0]
    freeze(shared)
    with pytest.raises(ModelError, match="share weights"):
        StreamedModule(shared, CPU)
    flat = build("llama", num_hidden_layers=0)
    freeze(flat)
    with pytest.raises(ModelError, match="no list of decoder layers"):
        StreamedModule(flat, CPU)


def test_reading_does_not_nest():
    model = build("llama")
    freeze(model)
    streamed = StreamedModule(model, CPU)
    with streamed.reading(), pytest.raises(RuntimeError, match="already"), streamed.reading():
        pass
    with streamed.reading():
        assert streamed.device_bytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_memory_returns_and_the_bits_are_those_of_the_resident_model():
    device = torch.device("cuda")
    model = build("llama", num_hidden_layers=6, hidden_size=64, intermediate_size=256)
    resident = Reference(copy.deepcopy(model).to(device))
    streamed = Reference(model, streamed_to=device)
    assert all(p.is_pinned() for p in model.parameters())
    expected, _ = resident.logprobs(SEQUENCES, TARGETS)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    for _ in range(20):
        assert torch.equal(streamed.logprobs(SEQUENCES, TARGETS)[0], expected)
    assert torch.cuda.memory_allocated() == held
