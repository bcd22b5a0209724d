"""Secrets in addresses: refused in configurations, and masked in texts.

An address with a secret, s3://KEY:SECRET@bucket/folder, would be copied into reports, checkpoints,
logs and dashboards.
"""

__all__ = ["mask", "refuse_secrets"]

import re

from diffusion_lab.errors import ConfigError

# scheme://user:password@ and scheme://user@; a password may hold slashes. The @ of
# hf://datasets/owner/name@revision follows a path, and a number after the colon is a port.
USERINFO = re.compile(r"(?<=://)(?:[^\s/:@\"'<>]+:(?!\d+/)[^\s@\"'<>]*|[^\s/:@\"'<>?#]+)(?=@)")
PARAMETER = re.compile(
    r"(?<=[?&;])([\w.-]*(?:secret|token|passw|credential|signature|access_?key|api_?key)[\w.-]*)="
    r"[^\s&\"'<>#]+",
    re.IGNORECASE,
)
ANONYMOUS = "anonymous"  # gs://anonymous@bucket reads a public bucket


def mask(text: str) -> str:
    """Returns a text with *** in place of every secret in an address.

    Arguments:
        text: A text with any number of addresses.
    """
    text = USERINFO.sub(lambda match: match[0] if match[0] == ANONYMOUS else "***", text)
    return PARAMETER.sub(r"\1=***", text)


def refuse_secrets(text: str) -> None:
    """Checks that the addresses in a text hold no secret.

    Arguments:
        text: An address, an override key=value, or lines of a configuration.

    Raises:
        ConfigError: If one does; shows it masked.
    """
    for line in text.splitlines():
        if (masked := mask(line)) != line:
            raise ConfigError(
                f"{masked.strip()} holds a secret, which would be written into reports, "
                "checkpoints and logs. Remove it from the address, and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (Google Cloud: "
                "GOOGLE_APPLICATION_CREDENTIALS) in the environment"
            )
