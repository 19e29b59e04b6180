"""Evaluation of a trained network: metrics, robustness and the HTML report."""
