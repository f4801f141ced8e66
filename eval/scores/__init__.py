"""How good a model is on a text, beside the model that it was made from; gates."""
