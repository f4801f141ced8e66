"""What a transformer block is made of: which activation feeds which linear layers, in every family; a prefix before its texts."""
