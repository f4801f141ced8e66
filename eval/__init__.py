"""Measurement: perplexity, divergence from the base model, verification of what was saved."""
