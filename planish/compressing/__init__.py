"""The whole job: recipe and model in, a verified checkpoint with its report out."""
