"""What is said of a search's result: causes, laws, leads, and faults that show in the numbers without a search."""
