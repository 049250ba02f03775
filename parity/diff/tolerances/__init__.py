"""Which records differ by more than two right sides do: the table's limits, and those of float64 and of rounding."""
