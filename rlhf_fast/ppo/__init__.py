"""The algorithm: pure functions over tensors, and the PPO step as named phases."""
