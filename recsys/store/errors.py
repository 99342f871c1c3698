"""Errors of a store as one line: what was tried, where, the error's code, and what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from boto3.exceptions import Boto3Error
from boto3.s3.transfer import S3TransferRetriesExceededError
from botocore.exceptions import BotoCoreError, ClientError

from recsys.errors import StoreError, UserError

_ADVICE = {
    "create the bucket or correct its name": ("NoSuchBucket", "InvalidBucketName"),
    "nothing is there; check the path": ("NoSuchKey", "404", "ENOENT"),
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role": ("NoCredentialsError", "PartialCredentialsError"),
    "check the credentials and what they may do": (
        *("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "EACCES", "EPERM"),
        *("CredentialRetrievalError", "TokenRetrievalError", "ProfileNotFound"),
    ),
    "check storage.endpoint and the network": (
        *("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError", "SSLError"),
        *("ProxyConnectionError", "HTTPClientError"),
    ),
    "check storage.region": ("301", "400", "PermanentRedirect", "AuthorizationHeaderMalformed"),
    "free disk space": ("ENOSPC", "EDQUOT"),
    "the store stayed out of order through all retries; start again later": (
        *(
            "500",
            "502",
            "503",
            "504",
            "InternalError",
            "ServiceUnavailable",
            "SlowDown",
            "IncompleteReadError",
            "ResponseStreamingError",
            "PreconditionFailed",
            "InvalidPart",
        ),
    ),
}

_MAY_PASS = ("check storage.endpoint and the network", "the store stayed out of order through all retries; start again later")


@contextmanager
def explained(action: str, uri: str) -> Iterator[None]:
    """Turn what a store can raise into one line: what was tried, where, the error's code, and what to do."""
    try:
        yield
    except (ClientError, BotoCoreError, Boto3Error, S3TransferRetriesExceededError, OSError) as error:
        cause = getattr(error, "last_exception", error)
        code = type(cause).__name__
        message = str(cause)
        status = 0
        if isinstance(cause, ClientError):
            status = int(cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            code, message = (str(cause.response["Error"].get(key, "unknown")) for key in ("Code", "Message"))
        elif isinstance(cause, OSError) and cause.errno is not None:
            code, message = errno.errorcode.get(cause.errno, code), cause.strerror or message
        advice = next((text for text, codes in _ADVICE.items() if code in codes), "look the code up in the store's log")
        may_pass = advice in _MAY_PASS or status >= 500 or status in {408, 409, 429} or code in {"EIO", "ESTALE", "ETIMEDOUT"}
        kind = StoreError if may_pass else UserError
        raise kind(" ".join(f"cannot {action} {uri}: {code} ({message}); {advice}".split())) from error
