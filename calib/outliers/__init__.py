"""A model's outliers: massive activations, super weights, sink heads, and the sites that they make hard to quantize."""
