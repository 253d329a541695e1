"""`rlhf-fast plan`: figures of real models, what fits, advice that holds, and mistakes."""

import dataclasses
import json

import pytest
from transformers import AutoConfig, LlamaConfig

from rlhf_fast.cli import main
from rlhf_fast.config import PPOConfig
from rlhf_fast.config_loading import load_config
from rlhf_fast.engine.memory_ledger import PHASES, RESERVED, Slot
from rlhf_fast.engine.memory_models import ModelConfigs
from rlhf_fast.engine.memory_plan import plan_memory
from rlhf_fast.engine.memory_sharded import Sharding
from rlhf_fast.errors import ConfigError, EnvironmentFault, GenerationError
from rlhf_fast.stages.plan import parse_memory, run_plan
from rlhf_fast.stages.plan_text import plan_as_json

GB = 1e9
BF16 = "run.dtype=bfloat16"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """config.json of Llama-2-7B: 6.74e9 parameters. There are no weights."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """config.json of 1.5e9 parameters with tied embeddings and two key/value heads."""
    folder = tmp_path_factory.mktemp("small")
    AutoConfig.for_model(
        "qwen2",
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    return str(folder)


def resident(result, phase):
    """GB on the device, without keys and values and what a rollout copies."""
    plan = result.plan
    return (plan.resident(phase) - plan.pages(phase) - plan.copies(phase)) / GB


@pytest.mark.parametrize(
    ("changes", "update", "sampling"),
    [
        ([], 252, 196),
        (["memory.reference=offload", "memory.reward_model=offload"], 224, 168),
        (["memory.optimizer_state=offload"], 252, 84),
        (["memory.value_head=actor", "memory.optimizer=adamw8bit"], 98.2, 70.2),
    ],
)
def test_a_7b_model_takes_what_the_page_says(llama, changes, update, sampling):
    """The page's figures are for 7e9 parameters and 2 bytes throughout for frozen models."""
    result = run_plan(None, [BF16, *changes], model=llama)
    scale = result.plan.parameters / 7e9
    assert result.plan.parameters == 6_738_415_616
    assert resident(result, "update") == pytest.approx(update * scale, rel=0.02)
    assert resident(result, "generate") == pytest.approx(sampling * scale, rel=0.02)
    assert resident(result, "score") == resident(result, "generate")


def test_four_roles_on_one_7b_trunk_take_19_gb(llama):
    config = load_config(
        PPOConfig, None, [f"actor={llama}", BF16, "lora.rank=64"], objects=["reward"]
    )
    trunk = AutoConfig.from_pretrained(llama)
    plan = plan_memory(config, ModelConfigs(trunk))
    adapter = plan.held["load"][Slot("actor", "weights")]
    assert adapter == 4 * 159_907_840
    # The reward model would be one more frozen adapter.
    update, generate = (plan.resident(p) - plan.pages(p) + adapter for p in ("update", "generate"))
    assert update / GB == pytest.approx(19.4, rel=0.02)
    assert generate / GB == pytest.approx(18.2, rel=0.02)


@pytest.mark.parametrize(
    ("path", "word"),
    [("auto", None), ("padded", "padded batches"), ("transformers", "not counted")],
)
def test_a_note_says_what_of_generation_is_not_known(small, path, word):
    pytest.importorskip("transformers", "5.17")
    notes = run_plan(None, [f"engine.path={path}"], model=small).plan.notes
    assert [word in note for note in notes] == ([] if word is None else [True])


GRPO = ["algorithm.estimator=grpo", "rollout.samples_per_prompt=4"]


@pytest.mark.parametrize(
    ("names", "memory", "rest"),
    [("llama small", "24GB", []), ("llama small", "80GB", GRPO), ("small", "24GB", GRPO)],
)
def test_advice_makes_it_fit_and_is_a_valid_config(request, names, memory, rest):
    for model in map(request.getfixturevalue, names.split()):
        result = run_plan(None, [BF16, *rest], model=model, gpu_memory=memory)
        if result.fits:
            assert result.advice is None
            continue
        advice = result.advice
        assert advice.fits
        changes = [*advice.overrides().split(), f"reward.model={model}"]
        again = run_plan(None, [BF16, *rest, *changes], model=model, gpu_memory=memory)
        assert again.fits
        assert again.plan.kv.samples == advice.plan.kv.samples >= 1


@pytest.mark.parametrize(
    "rest",
    [
        ["memory.value_head=actor"],
        ["memory.reference=offload", "memory.optimizer=adamw8bit"],
        ["ptx.coef=0.1"],
    ],
)
def test_lora_is_advised_whatever_of_full_fine_tuning_was_asked_for(llama, rest):
    result = run_plan(None, [BF16, *rest], model=llama, gpu_memory="24GB")
    assert result.advice.fits
    assert result.advice.changes["lora.rank"] == 64
    changes = [*result.advice.overrides().split(), f"reward.model={llama}"]
    assert run_plan(None, [BF16, *rest, *changes], model=llama, gpu_memory="24GB").fits


def test_no_change_that_was_named_is_superfluous(llama):
    result = run_plan(None, [BF16], model=llama, gpu_memory="141GB")
    changes = result.advice.overrides().split()
    assert "lora.rank=64" not in changes
    together = ("step_in_backward", "max_grad_norm", "minibatches")
    for change in changes:
        if any(name in change for name in together):
            continue
        fewer = [c for c in changes if c != change]
        found = run_plan(
            None, [BF16, *fewer, f"reward.model={llama}"], model=llama, gpu_memory="141GB"
        )
        assert not found.fits, change


def test_what_cannot_fit_is_said(llama, capsys):
    assert main(["plan", "--model", llama, "--gpu-memory", "8GB", BF16]) == 0
    out = capsys.readouterr().out
    assert "does not fit by changes of the config" in out


def test_samples_that_decode_side_by_side_follow_from_what_is_left(llama):
    result = run_plan(
        None, [BF16, "lora.rank=64", "gradient_checkpointing=true"], model=llama, gpu_memory="80GB"
    )
    plan = result.plan
    free = 80e9 - RESERVED - resident(result, "generate") * GB - plan.copies("generate")
    assert plan.kv.token_bytes == 4 * 32 * 32 * 128
    assert plan.kv.sample_bytes == 1024 * plan.kv.token_bytes
    assert plan.kv.samples == int(0.8 * free) // plan.kv.sample_bytes
    assert plan.pages("generate") <= plan.kv.budget + plan.kv.token_bytes * 256
    assert plan.pages("update") == 0
    fixed = run_plan(None, [BF16, "engine.kv_gb=3"], model=llama, gpu_memory="80GB")
    assert fixed.plan.kv.samples == 3_000_000_000 // plan.kv.sample_bytes


@pytest.mark.parametrize("path", ["auto", "fused", "modules"])
def test_the_copy_that_generation_reads_leaves_less_for_keys_and_values(small, path):
    plan = run_plan(None, [BF16, f"engine.path={path}"], model=small, gpu_memory="80GB").plan
    copy = 0 if path == "modules" else 2 * plan.parameters
    assert plan.copies("generate") == pytest.approx(copy, rel=1e-3)
    assert plan.copies("score") == plan.copies("update") == 0
    assert (plan.passes["generate"]["generator"]["casts"] > 0) == (path == "modules")
    free = 80e9 - RESERVED - plan.resident("generate") + plan.pages("generate")
    assert plan.kv.budget == pytest.approx(0.8 * free)


def test_roles_that_score_during_generation_count_there(small):
    plans = {
        wish: run_plan(
            None,
            [BF16, f"engine.overlap_scoring={wish}", "memory.reference=offload"],
            model=small,
        ).plan
        for wish in ("on", "off", "auto")
    }
    beside = plans["on"].transient("generate") - plans["off"].transient("generate")
    assert beside == plans["off"].transient("score") > 0
    assert plans["auto"].transient("generate") == plans["on"].transient("generate")


def test_kept_memory_is_there_in_every_phase_and_given_up_first(small):
    given = [BF16, "engine.keep_memory=true"]
    plan = run_plan(None, [*given, "engine.kv_gb=2"], model=small).plan
    for phase in ("score", "update"):
        assert plan.copies(phase) == plan.copies("generate") > 0
        assert plan.pages(phase) == plan.pages("generate") > 0
    # All of the GPU that a rollout leaves free is then held while the update runs.
    result = run_plan(None, [*given, f"reward.model={small}"], model=small, gpu_memory="100GB")
    assert not result.fits
    assert result.advice.fits
    assert result.advice.overrides() == "engine.keep_memory=false"


def test_directories_of_other_roles_count(llama, small):
    given = [f"reward.model={small}", f"critic={small}", f"reference={small}", BF16]
    held = run_plan(None, given, model=llama).plan.held["load"]
    sizes = {slot.role: size for slot, size in held.items()}
    assert sizes["actor"] / GB == pytest.approx(26.95, rel=0.01)
    assert sizes["critic"] / GB == pytest.approx(6.18, rel=0.01)
    assert sizes["reference"] == pytest.approx(sizes["reward_model"], rel=0.01)
    assert sizes["reference"] < sizes["critic"]
    reward = run_plan(None, [f"reward.model={small}", BF16], model=llama).plan.held["load"]
    assert reward[Slot("critic", "weights")] == held[Slot("critic", "weights")]


def test_the_exact_kl_has_the_reference_beside_the_actor(small):
    base = run_plan(None, [BF16], model=small).plan
    given = [BF16, "kl.estimator=exact"]
    for phase, more in (("score", []), ("update", ["kl.placement=loss"])):
        exact = run_plan(None, [*given, *more], model=small).plan
        assert exact.transient(phase) > base.transient(phase)


def test_several_gpus_share_all_but_adapters_and_gathered_blocks(llama, capsys):
    one = run_plan(None, [BF16], model=llama, gpu_memory="80GB")
    eight = run_plan(None, [BF16], model=llama, gpu_memory="80GB", gpus=8)
    plan, sharding = eight.plan, eight.sharding
    assert sharding == Sharding(8, "tp")
    share = resident(eight, "generate") / 8
    assert share == pytest.approx(196 / 8 * plan.parameters / 7e9, rel=0.02)
    embedding = 32000 * 4096  # in fp32: looked up where it lies, or gathered as it is
    assert sharding.generation_weights(plan) == 2 * (plan.parameters - embedding) // 8
    gathered = Sharding(8, "gather").generation_weights(plan)
    assert gathered == 2 * plan.parameters + 2 * embedding
    assert one.sharding.generation_weights(plan) == 0
    assert Sharding.over(8, 1, "auto", sliced=False) == Sharding(8, "gather")
    update = plan.resident("update") // 8 + 12 * plan.parameters // 32 + plan.transient("update")
    assert sharding.device(plan, "update") == pytest.approx(update, abs=64)  # rounded by slots
    lora = run_plan(None, [BF16, "lora.rank=16"], model=llama, gpu_memory="80GB", gpus=8)
    adapters = sum(
        size for slot, size in lora.plan.held["update"].items() if slot.role in ("actor", "critic")
    )
    others = lora.plan.resident("update") - adapters
    assert lora.sharding.held(lora.plan, "update") == pytest.approx(adapters + others // 8, abs=64)
    assert lora.sharding.generation_weights(lora.plan) == 0
    tight = run_plan(None, [BF16], model=llama, gpu_memory="24GB", gpus=8)
    assert tight.advice is not None
    assert "memory.step_in_backward" not in tight.advice.changes  # several processes refuse it
    assert main(["plan", "--model", llama, "--gpus", "8", "--gpu-memory", "80GB"]) == 0
    assert "8 GPUs, weights view tp" in capsys.readouterr().out


def on_eight(model, *overrides):
    return run_plan(None, [BF16, *overrides], model=model, gpus=8)


def test_replicas_divide_the_gpus_that_hold_a_model(llama):
    four = run_plan(None, [BF16], model=llama, gpus=4)
    twice = on_eight(llama, "distributed.replicas=2")
    assert (twice.sharding.shards, twice.sharding.view) == (4, "tp")
    for phase in ("load", "score", "update"):
        pages = four.plan.pages(phase)
        assert pages == 0
        assert twice.sharding.device(twice.plan, phase) == four.sharding.device(four.plan, phase)
    one, whole = run_plan(None, [BF16], model=llama), on_eight(llama, "distributed.replicas=8")
    for phase in ("load", "score", "update"):
        assert whole.sharding.device(whole.plan, phase) == one.plan.device(phase)
    plan, sharding = whole.plan, whole.sharding
    assert sharding.generation_weights(plan) == 0
    held = plan.resident("generate") - plan.pages("generate")  # with the copies of one GPU
    assert sharding.held(plan, "generate") == held + plan.pages("generate") // 8


def test_gradients_that_are_whole_on_every_gpu_are_summed_in_a_copy(llama):
    whole = on_eight(llama, "distributed.replicas=8")
    nothing_runs = {phase: {} for phase in whole.plan.passes}
    plan, sharding = dataclasses.replace(whole.plan, passes=nothing_runs), whole.sharding
    embedding = 4 * 32000 * 4096  # larger than a bucket, so alone
    assert sharding.device(plan, "update") == sharding.held(plan, "update") + embedding
    assert sharding.device(plan, "score") == sharding.held(plan, "score")
    shards = Sharding(8, "tp")
    assert shards.device(plan, "update") > shards.held(plan, "update") + embedding  # blocks
    lora = on_eight(llama, "distributed.replicas=8", "lora.rank=1")
    plan = dataclasses.replace(lora.plan, passes=nothing_runs)
    adapters = plan.held["update"][Slot("critic", "gradients")]
    assert sharding.device(plan, "update") == sharding.held(plan, "update") + adapters


def test_several_gpus_compute_in_the_type_of_the_run(llama):
    plan = run_plan(None, ["run.dtype=float32"], model=llama, gpus=8).plan
    assert Sharding(8, "gather").generation_weights(plan) == 4 * plan.parameters
    assert Sharding(8, "tp").generation_weights(plan) == 0  # read where they lie
    update = Sharding(8, "tp").device(plan, "update") - Sharding(8, "tp").held(plan, "update")
    assert update == 20 * plan.parameters // 32 + plan.transient("update")


def test_every_gpu_has_keys_and_values_of_its_own(llama):
    many = ["rollout.prompts=512", "rollout.max_batch=512", "engine.kv_gb=2"]
    for gpus in (1, 8):
        found = run_plan(None, [BF16, *many], model=llama, gpus=gpus)
        assert found.plan.pages("generate") // gpus == pytest.approx(2e9, rel=0.01)


def test_several_gpus_read_weights_as_the_config_and_the_model_have_it(llama, tmp_path):
    assert on_eight(llama, "distributed.weights=gather").sharding.view == "gather"
    layers = on_eight(llama, "distributed.weights=layerwise")
    plan = layers.plan
    outside = 2 * 32000 * 4096
    blocks = 2 * (plan.parameters - outside) // 32
    assert layers.sharding.generation_weights(plan) == 2 * (blocks + outside) + outside
    assert on_eight(llama, "engine.path=modules").sharding.view == "gather"
    sizes = {"vocab_size": 96, "num_hidden_layers": 2}
    odd = {"hidden_size": 64, "intermediate_size": 132, "num_attention_heads": 8}
    LlamaConfig(**sizes, **odd).save_pretrained(tmp_path / "odd")
    AutoConfig.for_model("gpt2", **sizes, n_embd=64, n_head=8).save_pretrained(tmp_path / "gpt2")
    for name in ("odd", "gpt2"):  # 132 columns of the MLP; no slices are known
        assert on_eight(str(tmp_path / name)).sharding.view == "gather"
        with pytest.raises(GenerationError, match="RF4037"):
            on_eight(str(tmp_path / name), "distributed.weights=tp")


def test_several_gpus_plan_what_several_processes_do(llama):
    assert "actor" not in on_eight(llama).plan.passes["generate"]  # scored after the rollout
    alone = ["memory.step_in_backward=true", "algorithm.minibatches=64"]
    alone += [f"{name}_optim.max_grad_norm=0" for name in ("actor", "critic")]
    for overrides in (["engine.overlap_scoring=on"], ["side_by_side=2"], alone):
        with pytest.raises(ConfigError, match="RF1045"):
            on_eight(llama, *overrides)
    with pytest.raises(EnvironmentFault, match="RF7050"):
        on_eight(llama, "distributed.replicas=3")


def test_json_has_every_number(llama, capsys):
    assert main(["plan", "--model", llama, "--gpu-memory", "80GB", BF16, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is False
    assert report["advice"]["fits"] is True
    assert report["advice"]["overrides"]
    assert set(report["phases"]) == set(PHASES)
    for phase in report["phases"].values():
        held = [e for e in phase["entries"] if not e["while_running"] and e["place"] == "device"]
        running = {}
        for entry in phase["entries"]:
            if entry["while_running"]:
                running[entry["role"]] = running.get(entry["role"], 0) + entry["bytes"]
        total = sum(e["bytes"] for e in held) + running.pop("generator", 0)
        total += max(running.values(), default=0)
        assert total == phase["device"]
    several = run_plan(None, [BF16], model=llama, gpu_memory="80GB", gpus=2)
    assert plan_as_json(several)["sharding"]["view"] == "tp"


def test_a_config_file_alone_is_enough(llama, tmp_path, capsys):
    yaml = tmp_path / "ppo.yaml"
    yaml.write_text(f"actor: {llama}/config.json\nlora: {{rank: 16}}\n", encoding="utf-8")
    assert main(["plan", "--config", str(yaml), "lora.rank=64"]) == 0
    out = capsys.readouterr().out
    assert "6.74 billion parameters" in out
    assert "trunk" in out


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80e9), ("79.6 GiB", 79.6 * 2**30), ("512mb", 512e6), ("1TB", 1e12)],
)
def test_amounts_of_memory(text, size):
    assert parse_memory(text) == int(size)


@pytest.mark.parametrize("text", ["80XB", "GB", "", "-4GB", "0GB", "80", "8e3GB", "9" * 400 + "GB"])
def test_other_words_are_no_amounts(text):
    with pytest.raises(ConfigError, match="RF1050"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--gpu-memory", "80XB"], "RF1050"),
        (["actor=elsewhere"], "RF1051"),
        (["--gpus", "0"], "RF1052"),
        (["--gpus", "two"], "RF1006"),
        (["--config", "missing.yaml"], "RF1001"),
        (["memory.refrence=offload"], "RF1004"),
        (["memory.reference=offload", "lora.rank=4"], "RF1005"),
        (["critic=x", "memory.value_head=actor"], "RF1005"),
        (["reward.model=nowhere"], "RF3010"),
        (["sampling.max_new_tokens=9000", "data.max_length=10000"], "RF3022"),
        (["lora.rank=4", "lora.targets=[nothing]"], "RF3063"),
        (["lora.rank=4", "lora.actor_adapter=nowhere"], "RF3060"),
    ],
)
def test_mistakes(llama, capsys, arguments, code):
    try:
        status = main(["plan", "--model", llama, *arguments])
    except SystemExit as left:
        status = left.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.startswith(code)
    assert "to do:" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "RF3011"),
        ("{", "RF3012"),
        ("[1]", "RF3012"),
        ('{"model_type": "nope"}', "RF3012"),
        ('{"model_type": "nope", "auto_map": {}}', "RF3013"),
        ('{"model_type": "t5"}', "RF3025"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "RF3025"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "RF3025"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "RF3072"),
        ('{"model_type": "mamba"}', "RF3072"),
    ],
)
def test_configs_that_no_model_can_have(tmp_path, capsys, content, code):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    assert main(["plan", "--model", str(tmp_path), "--gpu-memory", "80GB"]) == 2
    assert capsys.readouterr().err.startswith(code)
    assert main(["plan", "--model", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("RF3010")
    assert main(["plan"]) == 2
    assert capsys.readouterr().err.startswith("RF1031")


@pytest.mark.parametrize("kind", ["gemma2", "opt", "gpt_neox", "mixtral", "phi3"])
def test_other_architectures_are_planned_with_a_note(tmp_path, kind, capsys):
    AutoConfig.for_model(kind, num_hidden_layers=2).save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--gpu-memory", "80GB"]) == 0
    assert "activations of this architecture are estimates" in capsys.readouterr().out
