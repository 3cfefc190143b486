"""Runs in a process of its own: asks OpenXLab's SDK for the addresses of a repository's files.

Reads one JSON object from stdin ({sdk, endpoint, keys, repository}), writes one JSON line to
stdout: {"files": {...}} or {"error": words}. Only the SDK's sign-in and listing are used; its
sub-package is registered by hand because importing it would pull in the upload client (oss2).
Started by openxlab.py, which kills it when it takes too long.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import types
from typing import Any


def main() -> None:
    asked = json.load(sys.stdin)
    with contextlib.redirect_stdout(io.StringIO()):  # the SDK prints its warnings
        answer = list_files(asked)
    print(json.dumps(answer))


def list_files(asked: dict[str, Any]) -> dict[str, Any]:
    """The answer to print. Foreign messages may repeat keys, so they are not passed on."""
    sys.path.append(asked["sdk"])  # last: our own libraries win over anything in it
    import requests

    try:
        client = make_client(asked["endpoint"], tuple(asked["keys"]))
        owner, name = asked["repository"].split("/")
        models, files = client.get_download_url(owner, name, None, None, None)
    except requests.exceptions.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        return {"error": f"is not serving now ({status})"}
    except requests.exceptions.JSONDecodeError:
        return {"error": "answered with something that is not data (a maintenance page?)"}
    except (requests.exceptions.RequestException, OSError):
        return {"error": "cannot be reached from here"}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {"error": "refused: no such repository, or the keys are wrong"}
    except ImportError as error:
        return {"error": f"'s SDK lacks a library ({error.name})"}
    return {"files": {**(models or {}), **(files or {})}}


def make_client(endpoint: str, keys: tuple[str, str]) -> Any:
    """The SDK's client, signed in with `keys` when there are any; nothing is written to disk."""
    import openxlab

    package = types.ModuleType("openxlab.model")
    package.__path__ = [os.path.join(os.path.dirname(str(openxlab.__file__)), "model")]
    sys.modules["openxlab.model"] = package
    from openxlab.model.clients import openapi_client

    if all(keys):
        from openxlab.xlab.clients.auth_client import AuthClient
        from openxlab.xlab.handler.user_token import calculate_d

        signing = AuthClient(f"{endpoint}/sso-be/api/v1/open/")
        nonce, algorithm = signing.auth(keys[0])
        signed_in = signing.get_jwt(keys[0], calculate_d(keys[1], nonce, algorithm))
        openapi_client.get_jwt = lambda: signed_in["jwt"]
    return openapi_client.OpenapiClient(endpoint)


if __name__ == "__main__":
    main()
