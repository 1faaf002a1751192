"""The functions users call."""
