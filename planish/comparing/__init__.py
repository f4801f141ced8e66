"""`planish compare` and `planish sweep`: several recipes on one model."""
