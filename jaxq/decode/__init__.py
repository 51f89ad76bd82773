"""Generation loops and the sampling rules they share."""
