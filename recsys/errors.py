"""The exception for user-fixable errors: they are printed as one line, without a traceback."""


class UserError(Exception):
    """A mistake in the config, the data or a request: what is wrong, where, and what would work."""


class StoreError(UserError):
    """The object store stayed out of order through all retries; the same may work later."""
