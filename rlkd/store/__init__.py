"""Checkpoints on disk and, if wanted, in a remote store: written whole or not at all, and never used damaged."""
