"""Training stages: one readable file each, on a common run directory (`run.Run`)."""
