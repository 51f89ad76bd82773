"""The best few centers of every row, without the table of all scores."""
