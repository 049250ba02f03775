"""The search for known faults: candidates, how far each of them gets, and states of several faults."""
