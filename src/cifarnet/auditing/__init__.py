"""Audit of the training labels: scores of the training images, near-duplicates in the test images, and the report."""
