"""What a model is calibrated and measured on: text as windows of tokens, images, text of its own."""
