"""Flow matching with one noise time per frame: the path, the times, the loss."""
