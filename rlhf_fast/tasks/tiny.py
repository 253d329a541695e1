"""Tokenizer and model of the reviews task: small enough to train on two CPU cores in minutes.

Both are ordinary Hugging Face objects, so whatever the stages do with them they do with any other
model directory: `save_pretrained` writes what `AutoTokenizer` and `AutoModelForCausalLM` load.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_fast.tasks.reviews import vocabulary

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
MAX_POSITIONS = 64


def build_tokenizer(texts: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Train a word-level tokenizer on the grammar's vocabulary.

    Ids 0 to 3 are pad, bos, eos, unk, four different tokens; the words follow. No special token is
    added to a text: stages append EOS to completions themselves. `decode` joins words with single
    spaces, so it inverts `encode` on texts of the grammar.

    Args:
        texts: further texts to learn words from, beside the grammar's own.
    """
    tokenizer = Tokenizer(WordLevel(unk_token=UNK))
    # Splits punctuation from words too, so "oslo :" and "oslo:" are the same two tokens.
    tokenizer.pre_tokenizer = Whitespace()
    trainer = WordLevelTrainer(special_tokens=[PAD, BOS, EOS, UNK], show_progress=False)
    tokenizer.train_from_iterator([*vocabulary(), *texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A randomly initialised Llama of 0.34 M parameters: 3 layers, width 96, 4 heads.

    Args:
        tokenizer: gives the size of the vocabulary and the ids of the special tokens.
        seed: the weights are a function of it; the global random state is left as it was.

    Returns:
        An fp32 model on the CPU in train mode, with tied embeddings and 64 positions.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        # With width 96 the usual 0.02 starts so flat that SFT spends its first 100 steps on scale.
        initializer_range=0.05,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
