"""Clustering: the weights of a layer share a few values."""

from workbench.techniques.clustering.kmeans import WeightClustering

__all__ = ["WeightClustering"]
