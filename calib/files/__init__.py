"""A pretrained model on disk: found, converted where it is not safetensors, and read a module at a time."""
