"""`parity isolate`: every operation judged by its own inputs."""
