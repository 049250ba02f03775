"""One sentence on how wrong rows derive from the right ones, the same in `parity explain` and `parity isolate`."""
