"""Config files and overrides: what is accepted, and the one message for what is not."""

import dataclasses
import math

import pytest
import yaml

import rlhf_fast
from rlhf_fast.config import (
    AlgorithmConfig,
    EvalConfig,
    MemoryConfig,
    OptimConfig,
    PPOConfig,
    PtxConfig,
    RewardConfig,
    RewardModelConfig,
    SFTConfig,
    leaves,
    to_dict,
)
from rlhf_fast.config_loading import documented_yaml, load_config, to_yaml
from rlhf_fast.config_rules import violations
from rlhf_fast.errors import ConfigError

KINDS = [SFTConfig, RewardModelConfig, PPOConfig, EvalConfig]
OK = ["reward.model=rm"]


def refused(path=None, overrides=(), kind=PPOConfig):
    with pytest.raises(ConfigError) as caught:
        load_config(kind, path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def write(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_section_can_be_imported_from_the_package(kind):
    sections = (getattr(kind(), field.name) for field in dataclasses.fields(kind))
    kinds = {type(section) for section in sections if dataclasses.is_dataclass(section)}
    for section in kinds | {kind}:
        assert section.__name__ in rlhf_fast.__all__
        assert getattr(rlhf_fast, section.__name__) is section


@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_is_documented_and_within_its_own_bounds(kind):
    for key, value, field in leaves(kind()):
        assert len(field.metadata["doc"]) > 3, key
        assert not isinstance(value, float) or math.isfinite(value)
    assert not [v for v in violations(kind()) if "both empty" not in v]


def test_defaults_lie_where_the_literature_puts_them():
    config = PPOConfig()
    assert config.algorithm.clip_eps_low == config.algorithm.clip_eps_high == 0.2
    assert config.kl.coef == 0.05
    assert 1 <= config.algorithm.ppo_epochs <= 4
    assert 256 <= config.rollout.prompts <= 1024
    assert 0.7 <= config.sampling.temperature <= 1.0
    assert 1e-6 <= config.actor_optim.lr <= 5e-6
    assert config.reward.normalize


@pytest.mark.parametrize("kind", KINDS)
def test_yaml_round_trip(kind, tmp_path):
    config = load_config(kind, None, OK if kind is PPOConfig else [])
    path = write(tmp_path, to_yaml(config))
    assert load_config(kind, path) == config


@pytest.mark.parametrize("kind", KINDS)
def test_the_documented_defaults_are_valid_yaml_of_the_defaults(kind):
    assert yaml.safe_load(documented_yaml(kind)) == to_dict(kind())


@pytest.mark.parametrize("text", ["1e-5", "'1e-5'", "0.00001", "1.0e-05"])
def test_numbers_are_typed_however_they_are_written(tmp_path, text):
    path = write(tmp_path, f"actor_optim:\n  lr: {text}\n")
    assert load_config(PPOConfig, path, OK).actor_optim.lr == 1e-5


def test_underscored_whole_numbers_lists_and_precedence(tmp_path):
    path = write(tmp_path, "total_steps: 1_000\nsampling: {stop: [a, b]}\nkl: {coef: 0.1}\n")
    config = load_config(PPOConfig, path, [*OK, "kl.coef=0.2", "sampling.stop=[c]"])
    assert config.total_steps == 1000
    assert config.sampling.stop == ["c"]
    assert config.kl.coef == 0.2
    assert load_config(EvalConfig, None, ["samples_per_prompt=8", "best_of=[1,8]"]).best_of == [
        1,
        8,
    ]


@pytest.mark.parametrize("text", [b"\xef\xbb\xbfkl:\r\n  coef: 0.1\r\n", b"kl: {coef: 0.1}\n"])
def test_bom_and_crlf_are_tolerated(tmp_path, text):
    assert load_config(PPOConfig, write(tmp_path, text), OK).kl.coef == 0.1


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load_config(PPOConfig, write(tmp_path, "# nothing\n"), OK) == load_config(
        PPOConfig, None, OK
    )


def test_unknown_keys_name_the_nearest_and_all_come_at_once(tmp_path):
    path = write(tmp_path, "kl: {coff: 0.1}\n")
    message = refused(path, [*OK, "total_step=3"])
    assert "RF1004: 2 config keys" in message
    assert f"{path}: unknown key kl.coff; did you mean kl.coef?" in message
    assert "unknown key total_step; did you mean total_steps?" in message


@pytest.mark.parametrize(
    ("override", "needle"),
    [
        ("kl.coef=abc", "expected a number"),
        ("total_steps=1.5", "expected a whole number"),
        ("run.overwrite=3", "expected true or false"),
        ("kl=3", "is a section"),
        ("kl.coef=[1]", "expected a number"),
    ],
)
def test_wrong_types(override, needle):
    assert needle in refused(None, [*OK, override])


@pytest.mark.parametrize("text", ["2026_11_26", "010", "1.10", "1e5", "no", "1:30", "true"])
def test_text_on_the_command_line_is_taken_as_it_is_written(text):
    config = load_config(PPOConfig, None, [*OK, f"run.output_dir={text}"])
    assert config.run.output_dir == text


@pytest.mark.parametrize(
    ("kind", "text", "key"),
    [
        (PPOConfig, "run: {output_dir: 2026_11_26}", "run.output_dir=20261126"),
        (PPOConfig, "sampling: {stop: [No]}", "sampling.stop=[False]"),
        (SFTConfig, "model: 1.10", "model=1.1"),
    ],
)
def test_text_that_yaml_reads_as_another_kind_is_refused(tmp_path, kind, text, key):
    message = refused(write(tmp_path, text), OK if kind is PPOConfig else (), kind)
    assert f"{key}: expected text: put it in quotes" in message


def test_text_in_quotes_is_text(tmp_path):
    path = write(tmp_path, 'sampling: {stop: ["No", "010"]}\nrun: {output_dir: "1.10"}\n')
    config = load_config(PPOConfig, path, OK)
    assert config.sampling.stop == ["No", "010"]
    assert config.run.output_dir == "1.10"


def test_whole_numbers_keep_all_their_digits():
    config = load_config(PPOConfig, None, [*OK, "run.seed=9007199254740993"])
    assert config.run.seed == 9007199254740993


@pytest.mark.parametrize(
    ("override", "needle"),
    [
        ("kl.coef=-1", "kl.coef=-1.0: expected at least 0"),
        ("algorithm.clip_eps_low=0", "expected more than 0"),
        ("algorithm.gamma=1.5", "expected at most 1"),
        ("sampling.temperature=0", "PPO needs samples"),
        ("actor_optim.lr=nan", "expected a finite number"),
        ("actor_optim.lr=inf", "expected a finite number"),
        ("rollout.max_batch=9223372036854775808", "at most 9223372036854775807 in size"),
        ("engine.kv_gb=1e300", "at most 3.4028234e+38 in size"),
        ("reward.missing_eos_value=-1e39", "at most 3.4028234e+38 in size"),
        ("kl.estimator=k4", "expected one of k1, k2, k3"),
        ("run.sinks=[tensorbord]", "unknown sink 'tensorbord'"),
        ("algorithm.ppo_epochs=0", "expected at least 1"),
        ("total_steps=0", "expected at least 1"),
        ("algorithm.estimator=rloo", "samples_per_prompt of at least 2"),
        ("algorithm.dual_clip=0.5", "expected 0 (off) or more than 1"),
        ("ptx.coef=1", "ptx.data is empty"),
        ("data.max_prompt_length=900", "exceeds data.max_length=1024"),
    ],
)
def test_values_out_of_range_or_in_conflict(override, needle):
    assert needle in refused(None, [*OK, override])


def test_contradictions_of_the_memory_section_are_listed_at_once():
    config = PPOConfig(
        critic="c",
        reward=RewardConfig(function="f.py:f"),
        algorithm=AlgorithmConfig(target_kl=0.1, minibatches=4),
        ptx=PtxConfig(coef=1.0, data="d"),
        memory=MemoryConfig(reward_model="offload", value_head="actor", step_in_backward=True),
    )
    faults = violations(config)
    wanted = [
        "memory.value_head=actor excludes critic",
        "memory.reward_model=offload without reward.model",
        "needs actor_optim.max_grad_norm=0, got 1.0",
        "512 samples in algorithm.minibatches=4 of up to 1024 tokens each are up to 131072 tokens, "
        "microbatch_tokens=8192",
        "excludes algorithm.target_kl",
        "excludes ptx.coef",
    ]
    assert len(faults) == len(wanted)
    assert all(want in fault for want, fault in zip(wanted, faults, strict=True))
    # The critic's clip matters where the critic has an optimizer; a critic-free run has no head.
    separate = dataclasses.replace(config.memory, value_head="separate")
    faults = violations(dataclasses.replace(config, memory=separate))
    assert any("needs critic_optim.max_grad_norm=0" in fault for fault in faults)
    rloo = AlgorithmConfig(estimator="rloo")
    faults = violations(dataclasses.replace(config, algorithm=rloo))
    assert any("algorithm.estimator=rloo, which has no critic" in fault for fault in faults)


def test_a_memory_section_that_saves_all_it_can_is_valid():
    config = PPOConfig(
        reward=RewardConfig(model="m"),
        actor_optim=OptimConfig(max_grad_norm=0.0),
        algorithm=AlgorithmConfig(minibatches=64),
        memory=MemoryConfig(
            reference="offload",
            reward_model="offload",
            optimizer_state="offload",
            optimizer="adamw8bit",
            step_in_backward=True,
            value_head="actor",
        ),
    )
    assert violations(config) == []


def test_all_violations_are_listed_at_once():
    message = refused(None, ["kl.coef=-1", "algorithm.gamma=2", "sampling.top_p=7"])
    for key in ("kl.coef", "algorithm.gamma", "sampling.top_p", "reward.model"):
        assert key in message


def test_an_indivisible_batch_names_the_numbers_and_two_choices():
    message = refused(None, [*OK, "rollout.prompts=100", "algorithm.minibatches=7"])
    assert "minibatches=7 does not divide rollout.prompts=100" in message
    assert "take 4 or 5" in message


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("a: 1\na: 2\n", "duplicate key"),
        ("kl:\n\tcoef: 1\n", "cannot start any token"),
        ("x: !!python/object/apply:os.system ['true']\n", "constructor"),
        ("- 1\n- 2\n", "config is a list"),
        ("a: [1, 2\n", "not valid YAML"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ("a: &a [x]\n" + "".join(f"b{i}: *a\n" for i in range(200)), "200 YAML aliases"),
        ("[" * 5000, "config"),
    ],
)
def test_broken_yaml_is_refused_with_its_place(tmp_path, text, needle):
    path = write(tmp_path, text)
    message = refused(path)
    assert "RF1002" in message
    assert needle in message
    assert str(path) in message


def test_a_huge_config_a_directory_and_a_missing_file(tmp_path):
    assert "bytes" in refused(write(tmp_path, "#" * 1_000_001))
    assert "is a directory" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "none.yaml")


def test_overrides_of_the_wrong_form():
    for override in ("kl.coef", "=3", "kl.coef={"):
        assert "RF1003" in refused(None, [override])


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPOConfig().total_steps = 3


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_words_that_yaml_takes_for_booleans_are_choices(tmp_path, word):
    path = tmp_path / "ppo.yaml"
    path.write_text(f"engine:\n  overlap_scoring: {word}\n", encoding="utf-8")
    assert load_config(PPOConfig, path, OK).engine.overlap_scoring == word
    given = load_config(PPOConfig, None, [*OK, f"engine.overlap_scoring={word}"])
    assert given.engine.overlap_scoring == word
    (tmp_path / "again.yaml").write_text(to_yaml(given), encoding="utf-8")
    assert load_config(PPOConfig, tmp_path / "again.yaml") == given
