"""Through the model block by block: a block's turn, with every step and solver of the recipe."""
