"""A dump's records beside the values of the right engine."""
