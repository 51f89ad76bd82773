"""Trainings of token reducers on a MosaicQA model; registry.py lists them."""
