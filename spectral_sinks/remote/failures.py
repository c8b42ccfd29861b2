"""Failures of a server or of the connection to it: one sentence for each, and whether to retry."""

import re

from nnsight.schema.config import CONFIG

from spectral_sinks.errors import InputError, RemoteError, without_secrets

ANSWERS: tuple[tuple[str, str, bool], ...] = (
    (
        r"Invalid API key|Missing or invalid API key|\b401\b|\b403\b",
        "{host} does not accept the API key: get one at https://login.ndif.us and store it with "
        "`nnsight login`, or set NDIF_API_KEY",
        False,
    ),
    (
        r"below the minimum|version was not provided|Malformed .* version|architecture on this server",
        "the versions of this process and of {host} do not match ({said}): see `spectral-sinks remote check`",
        False,
    ),
    (
        r"Could not deploy|Error (provisioning|starting) model",
        "{model} is not running at {host} and could not be started ({said}): https://nnsight.net/status "
        "lists the models that are",
        False,
    ),
    (
        r"\b413\b|[Tt]oo [Ll]arge|exceeds the (maximum|limit)",
        "{host} refuses a payload of this size ({said}): give fewer cells or documents at once",
        False,
    ),
    (
        r"out of memory|OutOfMemoryError",
        "the server ran out of memory: give a smaller batch_size or shorter windows",
        False,
    ),
    (r"payload could not be read", "{host} could not read the job ({said})", True),
    (
        r"exceeded the execution timeout",
        "the job took longer than {host} allows ({said}): give fewer cells or documents at once",
        False,
    ),
    (r"\b429\b|[Tt]oo many requests|[Rr]ate limit", "{host} limits the rate of requests ({said})", True),
    (
        r"\b50[234]\b|temporarily unavailable|reconnecting|[Tt]ry again|Auth backend unavailable|cancelled|"
        r"ActorDied|Critical server error",
        "{host} is not ready ({said})",
        True,
    ),
    (
        r"[Cc]onnect(ion)? |[Cc]onnection|refused|[Tt]imed out|[Tt]imeout|disconnected|unreachable|"
        r"Name or service|Errno|EOF|[Hh]andshake",
        "{host} cannot be reached ({said})",
        True,
    ),
)
"""Patterns in the error text of a server or connection, the sentence for each, and whether to retry; the
first match counts.
"""


def explained(error: BaseException, model: str, host: str | None = None) -> InputError | RemoteError:
    """Return the exception, with one sentence, that explains a failure of a server or of the connection to
    it.

    The server is `host`, or the one that nnsight is configured for. The sentence never contains the API key.
    An error of this package is returned unchanged.
    """
    if isinstance(error, InputError | RemoteError):
        return error
    host = host or CONFIG.API.HOST
    said = without_secrets(" ".join(str(error).split()))
    # the traceback of a job on the server ends with the class and the message of the error
    if "Traceback" in said:
        said = without_secrets(str(error).strip().splitlines()[-1].strip())
    short = said if len(said) <= 200 else f"{said[:200]}..."
    connection = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in (
        "httpx",
        "websocket",
    )
    for pattern, sentence, again in ANSWERS:
        if re.search(pattern, said):
            return RemoteError(sentence.format(host=host, model=model, said=short), again)
    if connection:
        return RemoteError(f"{host} cannot be reached ({short or type(error).__name__})", True)
    return RemoteError(f"the job failed at {host} ({short or type(error).__name__})", False)
