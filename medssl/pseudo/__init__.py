"""Pseudo-labels: thresholds, gates, the store on disk and the pictures of it."""
