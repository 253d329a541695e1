"""A tiny model, prompts and a reward for verl's own trainer, and its config with our rollout."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

PAD, BOS, EOS, WORDS = 0, 1, 2, 60
VOCAB = WORDS + 4
PROMPT, RESPONSE = 8, 8
REWARD = """def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return len(set(solution_str.split())) / 16
"""
# Of a conversation in turns: the last word of what the model says is looked up, until it says none.
CALLS = """import json
from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser

@ToolParser.register("last_word")
class LastWord(ToolParser):
    async def extract_tool_calls(self, responses_ids, tools=None):
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        arguments = [json.dumps({"word": word}) for word in text.split()[-1:]]
        return text, [FunctionCall(name="look_up", arguments=a) for a in arguments]
"""
TOOLS = """from verl.tools.function_tool import function_tool

@function_tool
def look_up(word: str) -> str:
    \"\"\"The words after a word.

    Args:
        word: the word before them.
    \"\"\"
    return f"w{(int(word[1:]) + 1) % 60} w{(int(word[1:]) + 2) % 60}"
"""
FP32 = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"


def build_model(seed: int = 5, **options: Any) -> nn.Module:
    """A causal LM whose log-probs are far from uniform, and some of whose answers end."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    wide = {"initializer_range": 0.2}
    config = LlamaConfig(vocab_size=VOCAB, **sizes, **heads, **ids, **wide | options)
    return LlamaForCausalLM(config).float().eval()


def write_model(directory: Path, model: nn.Module) -> Path:
    """Model and a tokenizer of whole words, as `from_pretrained` reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": 3}
    vocab |= {f"w{i}": i + 4 for i in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_run(directory: Path) -> None:
    """Prompts of three to six words, and a reward."""
    pandas = importlib.import_module("pandas")
    rows = [
        {
            "prompt": [
                {"role": "user", "content": " ".join(f"w{i + k}" for k in range(3 + i % 4))}
            ],
            "data_source": "toy",
            "reward_model": {"style": "rule", "ground_truth": "none"},
            "extra_info": {"index": i},
        }
        for i in range(8)
    ]
    pandas.DataFrame(rows).to_parquet(directory / "prompts.parquet")
    (directory / "reward.py").write_text(REWARD)
    (directory / "last_word.py").write_text(CALLS)
    (directory / "tools.py").write_text(TOOLS)


def overrides(directory: Path, model: Path, device: str = "cpu") -> list[str]:
    """Of `main_ppo`: two steps of GRPO with FSDP2 in fp32."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return [
        # The three lines of the docs.
        f"{rollout}.name=rlhf_fast",
        f"{rollout}.tensor_model_parallel_size=1",
        f"{rollout}.calculate_log_probs=True",
        f"{rollout}.dtype=float32",
        f"{rollout}.n=2",
        f"{rollout}.max_num_seqs=16",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=4",
        f"{rollout}.agent.num_workers=1",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        f"{actor}.strategy=fsdp2",
        f"{actor}.ppo_mini_batch_size=4",
        f"{actor}.ppo_micro_batch_size_per_gpu=4",
        f"{actor}.use_torch_compile=False",
        f"{actor}.fsdp_config.use_torch_compile=False",
        f"+{actor}.fsdp_config.mixed_precision={FP32}",
        f"{actor}.optim.lr=1e-2",
        "algorithm.adv_estimator=grpo",
        f"data.train_files={directory / 'prompts.parquet'}",
        f"data.val_files={directory / 'prompts.parquet'}",
        "data.train_batch_size=4",
        f"data.max_prompt_length={PROMPT}",
        f"data.max_response_length={RESPONSE}",
        "data.dataloader_num_workers=0",
        "reward.num_workers=1",
        f"reward.custom_reward_function.path={directory / 'reward.py'}",
        f"trainer.device={device}",
        "trainer.n_gpus_per_node=1",
        "trainer.total_training_steps=2",
        'trainer.logger=["console"]',
        "trainer.val_before_train=False",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={directory / 'checkpoints'}",
        f"trainer.rollout_data_dir={directory / 'rollouts'}",
    ]


def critic(model: Path) -> list[str]:
    """Of `main_ppo`: PPO with a critic, from a causal LM under a new value head."""
    return [
        "algorithm.adv_estimator=gae",
        f"critic.model.path={model}",
        "critic.model.use_remove_padding=False",
        "critic.model.enable_gradient_checkpointing=False",
        "critic.strategy=fsdp2",
        "critic.ppo_mini_batch_size=4",
        "critic.ppo_micro_batch_size_per_gpu=4",
        f"+critic.fsdp.mixed_precision={FP32}",
    ]


def tools(directory: Path) -> list[str]:
    """Of `main_ppo`: up to three turns of the model with words of a tool between them."""
    rollout = "actor_rollout_ref.rollout"
    return [
        f"{rollout}.multi_turn.enable=True",
        f"{rollout}.multi_turn.format=last_word",
        f"{rollout}.multi_turn.function_tool_path={directory / 'tools.py'}",
        f"{rollout}.multi_turn.max_assistant_turns=3",
        f"{rollout}.agent.default_agent_loop=tool_agent",
        f"data.max_response_length={3 * RESPONSE}",
    ]


def composed(directory: Path, model: Path, *more: str) -> Any:
    """verl's whole config, as `main_ppo` composes it."""
    hydra = importlib.import_module("hydra")
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("ppo_trainer", [*overrides(directory, model), *more])


def rollouts(directory: Path, step: int) -> list[dict[str, Any]]:
    """What verl wrote of the samples of a step."""
    lines = (directory / "rollouts" / f"{step}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
