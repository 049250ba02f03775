"""Which of a dump's errors lower arithmetic explains, and the faults that hide behind it."""
