"""One file a family of checkpoints, found by the model_types it names."""
