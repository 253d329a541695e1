"""Bytes of parameters that a rank holds, of every role of PPO and in every phase of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlhf_fast.config import AlgorithmConfig, LoraConfig, MemoryConfig, RewardConfig
from rlhf_fast.config_distributed import DistributedConfig
from rlhf_fast.distributed.world import World
from rlhf_fast.engine.memory_held import role_models
from rlhf_fast.engine.memory_ledger import COPIES, PAGES
from rlhf_fast.stages.generation import engine_of
from rlhf_fast.stages.ppo import PPOTrainer
from tests.distributed.ranks import on_ranks
from tests.models.tiny import build_classifier, tokenizer
from tests.stages.killed_runs import ppo_config
from tests.stages.tiny_runs import demonstrations, model_directory, write_rows

Phase = Callable[[str], AbstractContextManager[None]]
# Wide enough for padding to be little.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
MOMENTS = {
    "build",
    *(f"{phase} {end}" for phase in ("generate", "score", "update") for end in ("begin", "end")),
    *("generate inside", "update inside"),
}
ROLES = {"actor", "critic", "reference", "reward_model"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held")
    model_directory(folder / "sft" / "model", **SIZES)
    build_classifier(**SIZES).save_pretrained(folder / "judge")
    tokenizer().save_pretrained(folder / "judge")
    write_rows(folder / "train.jsonl", demonstrations(12))
    prompts = [{"prompt": row["prompt"]} for row in demonstrations(12, seed=3)]
    write_rows(folder / "prompts.jsonl", prompts)
    return folder


def formula(module: nn.Module, shards: int) -> float:
    """Matrices in equal parts; vectors, and the one row of a scalar head, whole."""
    total = 0.0
    for name, parameter in module.named_parameters():
        whole = parameter.dim() < 2 or name.startswith(("score.", "classifier."))
        total += parameter.numel() * parameter.itemsize / (1 if whole else shards)
    return total


def _storages(tensors: Iterator[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """What is held of parameters: shards, and what FSDP has gathered of them."""
    for parameter in module.parameters():
        yield parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            yield from _gathered(unit)


def _gathered(unit: Any) -> Iterator[Tensor]:
    group = unit._get_fsdp_state()._fsdp_param_group
    for parameter in [] if group is None else group.fsdp_params:
        yield from parameter.all_gather_outputs
        unsharded = getattr(parameter, "_unsharded_param", None)
        if unsharded is not None:
            yield unsharded.detach()


class Watch:
    """Counts at the beginning, inside and at the end of the phases of a step."""

    def __init__(self, trainer: PPOTrainer, shards: int) -> None:
        self.trainer, self.shards = trainer, shards
        self.shares: dict[str, dict[str, float]] = {}
        self.copies: dict[str, int] = {}
        self.engine = engine_of(trainer.roles.generator)
        self.in_a_layer = 0.0
        actor: Any = trainer.roles.actor.module
        actor.model.layers[0].mlp.register_forward_hook(self._computing)
        for optimizer in (trainer.roles.actor_optimizer, trainer.roles.critic_optimizer):
            assert optimizer is not None
            optimizer.optimizer.register_step_pre_hook(lambda *_: self.sample("update inside"))
        self.sample("build")

    def _computing(self, *_: Any) -> None:
        module = self.trainer.roles.actor.module
        share = _storages(_tensors_of(module)) / formula(module, self.shards)
        self.in_a_layer = max(self.in_a_layer, share)

    def sample(self, moment: str) -> None:
        """Held bytes of each role against the formula, the worst of all samples of a moment."""
        worst = self.shares.setdefault(moment, {})
        for name, role in role_models(self.trainer.roles).items():
            share = _storages(_tensors_of(role.module)) / formula(role.module, self.shards)
            worst[name] = max(share, worst.get(name, share), key=lambda x: abs(x - 1))
        assert self.engine is not None
        assert self.engine.view is not None
        self.copies[moment] = max(self.engine.view.nbytes, self.copies.get(moment, 0))

    def around(self, phase: Phase) -> Phase:
        """As `MemoryWatch` has it, in whose place this is put."""

        @contextmanager
        def watched(name: str) -> Iterator[None]:
            with phase(name):
                self.sample(f"{name} begin")
                if name == "generate":
                    assert self.engine is not None
                    self.engine.on_progress = lambda _: self.sample("generate inside")
                yield
                self.sample(f"{name} end")

        return watched


def _step(world: World, base: str, weights: str) -> tuple[Any, Any, int, float]:
    config = ppo_config(Path(base), Path(base))
    out = str(Path(base) / f"{weights} {world.size}")
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, output_dir=out),
        reward=RewardConfig(model=str(Path(base) / "judge")),
        distributed=DistributedConfig(weights=weights),
        algorithm=AlgorithmConfig(ppo_epochs=1, minibatches=2),
        total_steps=1,
    )
    trainer = PPOTrainer(config, quiet=True, world=world)
    watch: Any = Watch(trainer, world.shards)
    trainer.memory_watch = watch
    trainer.train()
    whole = sum(4 * p.numel() for p in trainer.roles.actor.module.parameters())
    return watch.shares, watch.copies, whole, watch.in_a_layer


def _report(world: World, base: str, weights: str, lora: bool) -> tuple[list[Any], float, str]:
    config = ppo_config(Path(base), Path(base))
    out = str(Path(base) / f"report {weights} {world.size} {world.replicas} {lora}")
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, output_dir=out),
        reward=RewardConfig(model=str(Path(base) / "judge")),
        distributed=DistributedConfig(weights=weights, replicas=world.replicas),
        lora=LoraConfig(rank=8) if lora else config.lora,
        total_steps=2,  # the first one makes the moments
    )
    trainer = PPOTrainer(config, quiet=True, world=world)
    trainer.watch_memory()
    trainer.train()
    report = trainer.memory_report()
    rows = [r for r in report.rows() if max(r[2:]) > 4096 and r[1] != PAGES]
    return rows, report.worst(), str(report)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("ranks", "replicas", "weights"),
    [(2, 1, "tp"), (2, 1, "gather"), (2, 1, "layerwise"), (2, 2, "auto")],
)
def test_a_report_compares_a_rank_with_its_share_of_the_plan(
    base: Path, ranks: int, replicas: int, weights: str, lora: bool
) -> None:
    found = on_ranks(ranks, _report, str(base), weights, lora, replicas=replicas)
    for rows, _, text in found:
        assert text.startswith(f"each of {ranks} ranks")
        assert {"load", "generate", "score", "update"} == {phase for phase, *_ in rows}
        for phase, slot, predicted, held in rows:
            # Vectors are whole on every rank, which the plan does not count; of adapters in slices
            # it does not ask which side is cut.
            near = 0.3 if slot == COPIES and weights == "tp" else 0.02
            assert predicted == pytest.approx(held, rel=near), (phase, slot, text)


VOCABULARY = 600  # of which few are drawn: embedding and head are what the model is made of


def _read_in_bf16(world: World, base: str, tied: bool) -> dict[str, tuple[int, int]]:
    """Predicted and held bytes beside the shards while responses are drawn, by view."""
    found = {}
    for weights in ("tp", "gather", "layerwise"):
        config = ppo_config(Path(base), Path(base))
        run = dataclasses.replace(
            config.run, output_dir=str(Path(base) / f"{weights} {tied}"), dtype="bfloat16"
        )
        config = dataclasses.replace(
            config,
            actor=str(Path(base) / f"vocabulary {tied}"),
            run=run,
            reward=RewardConfig(function=f"{base}/length.py:length"),
            algorithm=AlgorithmConfig(estimator="grpo", ppo_epochs=1),
            distributed=DistributedConfig(weights=weights),
            total_steps=1,
        )
        trainer = PPOTrainer(config, quiet=True, world=world)
        trainer.watch_memory()
        trainer.train()
        rows = list(trainer.memory_report().rows())
        assert {phase for phase, slot, *_ in rows if slot == COPIES} == {"generate"}
        found[weights] = next(tuple(r[2:]) for r in rows if r[:2] == ("generate", COPIES))
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["two matrices", "tied"])
def test_embedding_and_head_that_bf16_reads(base: Path, tied: bool) -> None:
    """The embedding is gathered in fp32, and a head that is tied to it apart from it, in bf16."""
    sizes = {**SIZES, "vocab_size": VOCABULARY, "tie_word_embeddings": tied}
    model_directory(base / f"vocabulary {tied}", **sizes)
    (base / "length.py").write_text(
        "def length(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    for found in on_ranks(2, _read_in_bf16, str(base), tied):
        for weights, (predicted, held) in found.items():
            assert predicted == pytest.approx(held, rel=0.02), weights
        assert found["tp"][1] < found["layerwise"][1] < found["gather"][1]


def _report_of_offloaded(world: World, base: str) -> list[Any]:
    config = ppo_config(Path(base), Path(base))
    run = dataclasses.replace(config.run, output_dir=str(Path(base) / "offloaded"))
    config = dataclasses.replace(
        config,
        run=run,
        reward=RewardConfig(model=str(Path(base) / "judge")),
        memory=MemoryConfig(reference="offload", reward_model="offload"),
        total_steps=1,
    )
    trainer = PPOTrainer(config, quiet=True, world=world)
    trainer.watch_memory()
    trainer.train()
    return [row for row in trainer.memory_report().rows() if row[1].part == "weights"]


def test_offloaded_shards_are_counted_where_they_are(base: Path) -> None:
    for rows in on_ranks(2, _report_of_offloaded, str(base)):
        assert {slot.role for _, slot, *_ in rows if slot.place == "host"} == {
            *("reference", "reward_model")
        }
        for phase, slot, predicted, held in rows:
            near = 0.02 * held + (0 if held > 16384 else 512)  # padding to whole rows
            assert abs(predicted - held) <= near, (phase, slot, predicted, held)


@pytest.mark.parametrize(
    ("ranks", "weights"), [(2, "tp"), (4, "tp"), (2, "gather"), (2, "layerwise")]
)
def test_every_role_holds_its_share_in_every_phase(base: Path, ranks: int, weights: str) -> None:
    for shares, copies, whole, in_a_layer in on_ranks(ranks, _step, str(base), weights):
        assert set(shares) >= MOMENTS
        for moment in MOMENTS:
            assert set(shares[moment]) == ROLES
            for role, share in shares[moment].items():
                assert share == pytest.approx(1.0, abs=0.05), (moment, role)
        # Layers that are gathered to compute would be seen: they are, and are gone by the end.
        assert in_a_layer > 1.2
        # Beside them, the gathered weights and only while responses are drawn.
        inside = copies.pop("generate inside")
        assert set(copies.values()) == {0}
        if weights == "layerwise":
            assert 0 < inside < 0.6 * whole  # of two layers one, embedding and head
        else:
            assert inside == (0 if weights == "tp" else pytest.approx(whole, rel=0.05))
