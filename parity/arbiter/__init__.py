"""The arbiter: how far records of either side are from a float64 computation of the same steps."""
