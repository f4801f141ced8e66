"""`planish inspect`: what a model's outliers are, and which recipe they ask for."""
