"""Measuring a trained network: what it is asked, what its answers are worth, and the page that shows it."""
