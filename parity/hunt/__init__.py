"""`parity run --hunt`: from the first divergence to the operation and its cause, by running the engine again."""
