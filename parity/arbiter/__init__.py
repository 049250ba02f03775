"""The arbiter: how far records of either side are from what the same steps give in float64."""
