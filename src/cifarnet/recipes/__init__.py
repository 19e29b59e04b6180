"""Recipes, which change something in training other than the network and the optimizer."""
