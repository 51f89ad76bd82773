"""Notebooks for the free runtimes of Colab, and what runs them."""
