"""The model and its data: text, topology, statistics, the walk over the blocks."""
