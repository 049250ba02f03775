"""A model file's weights: read, dequantised, rounded, packed."""
