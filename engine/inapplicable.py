"""The exception of a fault that cannot be planted: any other exception out of a fault is a bug."""


class NotApplicable(Exception):
    """A changed list of steps that this model, or another fault in the same list, does not allow."""
