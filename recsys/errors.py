"""Exceptions for user-fixable errors, which are printed as one line without a traceback."""


class UserError(Exception):
    """A user-fixable error in the config, the data or a request. The message says what is wrong, where, and what would work."""


class StoreError(UserError):
    """The object store failed in all retries; the operation may succeed later."""
