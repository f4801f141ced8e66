"""Tasks of lm-evaluation-harness, for models in memory and for servers."""
