"""select_topk: the places of the largest scores of a row."""
