"""Checkpoints and tables on disk: read and written, nothing executed."""
