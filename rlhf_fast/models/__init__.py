"""Hugging Face models in the roles of PPO: load, forward packed tokens, score, export."""
