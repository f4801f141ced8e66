"""`planish eval`: what a compression cost."""
