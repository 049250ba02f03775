"""Dumps of JSON lines: one reader in bulk, a careful one for the rest."""
