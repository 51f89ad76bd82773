"""Observers, the block-by-block driver, resume and the report."""
