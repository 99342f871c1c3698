"""One-line errors of a store: the action, the URI, the error's code, and advice."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from boto3.exceptions import Boto3Error
from boto3.s3.transfer import S3TransferRetriesExceededError
from botocore.exceptions import BotoCoreError, ClientError

from recsys.errors import StoreError, UserError

_CHECK_NETWORK = "check storage.endpoint and the network"
_START_LATER = "the store failed in all retries; try again later"
_ADVICE = {
    "create the bucket or correct its name": "NoSuchBucket InvalidBucketName",
    "it does not exist; check the path": "NoSuchKey 404 ENOENT",
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role": "NoCredentialsError PartialCredentialsError",
    "check the credentials and their permissions": "403 AccessDenied InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken "
    "EACCES EPERM CredentialRetrievalError TokenRetrievalError ProfileNotFound",
    _CHECK_NETWORK: "EndpointConnectionError ConnectTimeoutError ReadTimeoutError ConnectionClosedError SSLError "
    "ProxyConnectionError HTTPClientError",
    "check storage.region": "301 400 PermanentRedirect AuthorizationHeaderMalformed",
    "free disk space": "ENOSPC EDQUOT",
    _START_LATER: "500 502 503 504 InternalError ServiceUnavailable SlowDown IncompleteReadError ResponseStreamingError "
    "PreconditionFailed InvalidPart",
}
"""Advice by error code or exception name."""


@contextmanager
def explained(action: str, uri: str) -> Iterator[None]:
    """Turn a store's exceptions into a one-line StoreError if a retry may help, else UserError: the action, URI, code and advice."""
    try:
        yield
    except (ClientError, BotoCoreError, Boto3Error, S3TransferRetriesExceededError, OSError) as error:
        cause = getattr(error, "last_exception", error)
        code, message = type(cause).__name__, str(cause)
        if isinstance(cause, ClientError):
            code, message = (str(cause.response["Error"].get(key, "unknown")) for key in ("Code", "Message"))
        elif isinstance(cause, OSError) and cause.errno is not None:
            code, message = errno.errorcode.get(cause.errno, code), cause.strerror or message
        advice = next((text for text, codes in _ADVICE.items() if code in codes.split()), "look the code up in the store's log")
        may_pass = advice in (_CHECK_NETWORK, _START_LATER) or is_temporary(cause) or code in {"EIO", "ESTALE", "ETIMEDOUT"}
        kind = StoreError if may_pass else UserError
        raise kind(" ".join(f"cannot {action} {uri}: {code} ({message}); {advice}".split())) from error


def status_of(error: Exception) -> int:
    """Return the HTTP status of a refused request, 0 for any other error."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(error, ClientError) else 0


def is_temporary(error: Exception) -> bool:
    """Return whether the server may accept the same request later, based on its HTTP status."""
    status = status_of(error)
    return status >= 500 or status in {408, 409, 429}
