"""From the numbers of all records to one answer."""
