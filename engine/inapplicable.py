"""What a fault raises where it cannot be planted: everything else that comes out of one is a bug."""


class NotApplicable(Exception):
    """A changed list of steps that this model, or another fault in the same list, does not allow."""
