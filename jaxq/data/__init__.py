"""Real data and weights, and the pipelines that turn text into windows."""
