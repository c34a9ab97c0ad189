"""Weights from files: our own checkpoints and other people's, one key table per origin."""

from segtrain.weights.loading import LoadReport, load_weights

__all__ = ["LoadReport", "load_weights"]
