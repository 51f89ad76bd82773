"""Flax linen models by family; `models.load(source)` opens any checkpoint."""

from models.loading import Model, OpenModel, load, open_model

__all__ = ['Model', 'OpenModel', 'load', 'open_model']
