"""What each command found, as data."""
