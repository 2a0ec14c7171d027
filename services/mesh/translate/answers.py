"""`redirect` and `directResponse`: routes that Envoy answers by itself."""

from services.mesh.policy.virtual_service import DirectResponse, Redirect
from services.mesh.translate.names import Json

_CODES = {
    301: "MOVED_PERMANENTLY",
    302: "FOUND",
    303: "SEE_OTHER",
    307: "TEMPORARY_REDIRECT",
    308: "PERMANENT_REDIRECT",
}
_DEFAULT_PORT = {"http": 80, "https": 443}


def redirect(wanted: Redirect, port: int) -> Json:
    """The port is that of the listener the route stands on; a scheme's own port is left out, as Istio does."""
    action: Json = {"response_code": _CODES[wanted.redirect_code]}
    if wanted.authority is not None:
        action["host_redirect"] = wanted.authority
    if wanted.uri is not None:
        action["path_redirect"] = wanted.uri
    if wanted.scheme is not None:
        action["scheme_redirect"] = wanted.scheme
    number = port if wanted.derive_port == "FROM_REQUEST_PORT" else wanted.port
    if number is not None and number != _DEFAULT_PORT[wanted.scheme or "http"]:
        action["port_redirect"] = number
    return action


def direct_response(wanted: DirectResponse) -> Json:
    """Status and, where given, a body that Envoy keeps in memory."""
    action: Json = {"status": wanted.status}
    if wanted.body is not None:
        action["body"] = {"inline_string": wanted.body.string}
    return action
