"""Adapters for other trainers, each imported by name and only when asked for."""
