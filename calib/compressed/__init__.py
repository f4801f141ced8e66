"""Compressed checkpoints: how they are written down, and how they run."""
