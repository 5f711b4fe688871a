"""TLS: what OPTIONS say of it is tried when the settings are read, and what TLS says of a server is told with its cure.

The connections are redis-py's. It would read the files with each of them, and say of one that is missing that a connection
failed; and up to version 5 it compares no host names unless it is told to.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from typing import Any

#: What is no matter of the other end: it was cut.
CUT = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)

_REQUIREMENTS: dict[Any, ssl.VerifyMode] = {
    "none": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED,
    None: ssl.CERT_NONE,
    **{mode: mode for mode in ssl.VerifyMode},
}


def checked(options: Mapping[str, Any], place: str) -> tuple[dict[str, Any], list[str]]:
    """What stands in the place of some of the options of a connection over TLS, and what is wrong with them; `place` is
    theirs."""
    wrong = [
        f"{place}[{name!r}]: {problem}"
        for name, is_there, problem in (
            ("ssl_ca_certs", os.path.isfile, "no such file"),
            ("ssl_ca_path", os.path.isdir, "no such folder"),
            ("ssl_certfile", os.path.isfile, "no such file"),
            ("ssl_keyfile", os.path.isfile, "no such file"),
        )
        if options.get(name) is not None
        and not (isinstance(options[name], (str, os.PathLike)) and is_there(options[name]))
    ]
    # Anything else that is false, such as a variable that is not set, would check no name and say nothing.
    if not isinstance(options.get("ssl_check_hostname", True), bool):
        wrong.append(f"{place}['ssl_check_hostname']: expected True or False, got {options['ssl_check_hostname']!r}")
    required = options.get("ssl_cert_reqs", "required")
    if not isinstance(required, (str, int, type(None))) or required not in _REQUIREMENTS:
        wrong.append(f"{place}['ssl_cert_reqs']: expected 'required', 'optional' or 'none', got {required!r}")
        return {}, wrong
    checks_nothing = _REQUIREMENTS[required] is ssl.CERT_NONE
    if checks_nothing and options.get("ssl_check_hostname"):
        wrong.append(
            f"{place}['ssl_check_hostname']: a name is only checked with its certificate, and ssl_cert_reqs is {required!r}"
        )
    if options.get("ssl_keyfile") and not options.get("ssl_certfile"):
        wrong.append(f"{place}['ssl_keyfile']: a client's key needs its certificate: ssl_certfile")
    if not wrong:
        wrong = _unreadable(options, place)
    # As text: redis-py 5 takes the numbers in one half only.
    as_text = {ssl.CERT_NONE: "none", ssl.CERT_OPTIONAL: "optional", ssl.CERT_REQUIRED: "required"}
    return {
        "ssl_check_hostname": options.get("ssl_check_hostname", not checks_nothing),
        "ssl_cert_reqs": as_text[_REQUIREMENTS[required]],
    }, wrong


def _unreadable(options: Mapping[str, Any], place: str) -> list[str]:
    wrong = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if options.get("ssl_ca_certs"):
        try:
            context.load_verify_locations(cafile=options["ssl_ca_certs"])
        except OSError as error:  # an SSLError is one
            wrong.append(f"{place}['ssl_ca_certs']: no certificates in PEM that can be read: {error}")
    if options.get("ssl_certfile"):
        try:
            # Without any password OpenSSL would ask for one at the terminal.
            password = options.get("ssl_password") or (lambda: "")
            context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"), password)
        except (OSError, ValueError, TypeError) as error:
            wrong.append(
                f"{place}['ssl_certfile']: no certificate and key in PEM that can be read and belong together, with "
                f"ssl_keyfile and ssl_password: {error}"
            )
    for name, attempt in (
        ("ssl_ca_data", lambda value: context.load_verify_locations(cadata=value)),
        ("ssl_ciphers", context.set_ciphers),
        ("ssl_min_version", lambda value: setattr(context, "minimum_version", value)),
    ):
        if options.get(name) is not None:
            try:
                attempt(options[name])
            except (OSError, ValueError, TypeError) as error:
                wrong.append(f"{place}[{name!r}]: it cannot be used: {error}")
    return wrong


def suspicion(keywords: Mapping[str, Any]) -> str:
    """What else may be the matter with a server that hangs up or is silent: it may speak the other language."""
    if "path" in keywords:
        return ""
    if any(name.startswith("ssl_") for name in keywords):
        return " One that speaks no TLS does not answer: then write redis:// for rediss://."
    return " One that wants TLS hangs up: then write rediss:// for redis://."


def cure(error: BaseException | None) -> str:
    """What to do about an error of TLS; empty where it is none that stays."""
    while error is not None and (error.__cause__ is not None or error.__context__ is not None):
        error = error.__cause__ or error.__context__
    if isinstance(error, ssl.SSLCertVerificationError):
        said = error.verify_message
        if "mismatch" in said:
            return (
                "the server's certificate is for other names: call the server by one that it has (Sentinel: `sentinel "
                "announce-hostnames yes`; a Cluster: `cluster-announce-hostname` and `cluster-preferred-endpoint-type "
                "hostname` on each node), or say OPTIONS['ssl_check_hostname']: False where the CA is your own"
            )
        if "expired" in said or "not yet valid" in said:
            return "the server's certificate is not valid at this time: renew it, or correct this machine's clock"
        return "OPTIONS['ssl_ca_certs'] has to name a file with the CA that signed the server's certificate"
    if not isinstance(error, ssl.SSLError) or isinstance(error, CUT):
        return ""
    reason = getattr(error, "reason", None) or str(error)
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason or "PACKET_LENGTH" in reason:
        return "what listens at this port speaks no TLS: use its TLS port, or redis:// instead of rediss://"
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
        return "the server wants a client certificate: OPTIONS['ssl_certfile'] and OPTIONS['ssl_keyfile']"
    if "UNKNOWN_CA" in reason or "BAD_CERTIFICATE" in reason or "CERTIFICATE_EXPIRED" in reason:
        return "the server does not accept our client certificate (ssl_certfile): have it signed by a CA that it knows"
    return "the two ends do not agree on TLS; see ssl_min_version, ssl_ciphers and the certificates of both"
