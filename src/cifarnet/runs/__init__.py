"""Runs: their records, their sweeps, stopping and going on, tables over them."""
