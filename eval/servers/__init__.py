"""A running server, asked what it serves and how likely it finds tokens."""
