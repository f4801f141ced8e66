"""The recipe language: what a recipe may say, and what it says at each site."""
