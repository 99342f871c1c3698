"""The one exception that means: a person can mend this, so print one line and no traceback."""


class UserError(Exception):
    """A mistake in the config, the data or a request: what is wrong, where, and what would work."""


class StoreError(UserError):
    """The object store stayed out of order through all retries; the same may work later."""
