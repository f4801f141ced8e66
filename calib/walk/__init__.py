"""Through the model a block at a time, and through a block site by site; what is seen on the way."""
