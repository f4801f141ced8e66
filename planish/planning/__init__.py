"""Before the first block: what a run will do and take, what is refused, and who runs the result."""
