"""Recipes: changes to training beyond the network and the optimizer, one file each."""
