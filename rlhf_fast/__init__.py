"""rlhf_fast: PPO for language models, fast, correct and affordable."""

__version__ = "0.1.0"
