"""Checkpoints back into memory: planish.load, and transformers' from_pretrained."""
