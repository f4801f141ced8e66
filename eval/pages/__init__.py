"""Self-contained pages: their parts, figures, and what they show of an inspection and of layers."""
