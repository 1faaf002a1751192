"""Stand-ins for what may be missing: arrays and launches of a GPU, and the peers of the bench."""
