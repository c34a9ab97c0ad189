"""Label maps for pictures and videos of a person's own: what predict.py is made of."""
