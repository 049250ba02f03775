"""`parity weights`: every tensor dequantised by three implementations."""
