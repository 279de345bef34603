"""OAuth clients from npm: how tests tell them what to do, and are the browser that they send people to."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable
from typing import IO, Any

from tests.missing import missing
from tests.running import ROOT, App, Service

FOLDER = ROOT / "tests" / "thirdparty" / "node"
PACKAGES = ("openid-client", "oauth4webapi")
NODE_MAJOR_MIN = 20
FLOW_SECONDS_MAX = 90.0

# Opens a URL as a person's browser does; answers what arrived at the redirect URI: `url` and, if posted there, `form`.
Visit = Callable[[str], dict[str, Any]]


def node() -> str:
    """The path of Node. Skips the test where it, or what it runs, is missing."""
    path = shutil.which("node")
    if path is None:
        missing(f"Node is missing: install version {NODE_MAJOR_MIN} or newer with npm, then `make clients`")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").partition(".")[0]) < NODE_MAJOR_MIN:
        missing(f"Node is too old: {path} is {version}, the clients need {NODE_MAJOR_MIN} or newer")
    wanted = json.loads((FOLDER / "package.json").read_text())["dependencies"]
    for name in PACKAGES:
        manifest = FOLDER / "node_modules" / name / "package.json"
        found = json.loads(manifest.read_text())["version"] if manifest.exists() else None
        if found != wanted[name]:
            missing(f"{name} {wanted[name]} is missing: Node is there, `make clients` installs what it shall run")
    return path


def registered(app: App) -> dict[str, Any]:
    """A client's own metadata, as the libraries take it."""
    names = ("token_endpoint_auth_method", "redirect_uris", "post_logout_redirect_uris", "id_token_signed_response_alg")
    told = {name: app.metadata[name] for name in names if name in app.metadata}
    return {"client_id": app.client_id, **({"client_secret": app.client_secret} if app.client_secret else {}), **told}


class NodeClient:
    """One library of npm in a process of its own, which runs the flows of the module that is named after it."""

    def __init__(self, library: str) -> None:
        self.library = library
        self._path = node()
        self._process: subprocess.Popen[str] | None = None

    def run(self, flow: str, service: Service, app: App, visit: Visit | None = None, **told: Any) -> dict[str, Any]:
        """What the flow found. Raises: AssertionError with what the library complains of."""
        told = {"issuer": service.issuer, "algorithm": "oidc", "client": registered(app), "request": {}, **told}
        process = self._process = self._process or self._start()
        watch = threading.Timer(FLOW_SECONDS_MAX, process.kill)
        watch.start()
        try:
            answer = _talk(process, {"flow": flow, **told}, visit)
        except BaseException:
            self.close()  # it waits for an answer that will not come
            raise
        finally:
            watch.cancel()
        assert "found" in answer, f"{self.library}: {flow}: {answer['complaint']}"
        found: dict[str, Any] = answer["found"]
        return found

    def close(self) -> None:
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        """What it prints besides the dialogue goes where pytest's own output goes."""
        arguments = [self._path, "run.mjs", self.library]
        return subprocess.Popen(arguments, cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _talk(process: subprocess.Popen[str], told: dict[str, Any], visit: Visit | None) -> dict[str, Any]:
    """The last thing that it says of one flow."""
    assert process.stdin is not None
    assert process.stdout is not None
    _write(process.stdin, told)
    for line in process.stdout:
        message: dict[str, Any] = json.loads(line)
        if "visit" not in message:
            return message
        assert visit is not None, f"nobody visits {message}"
        _write(process.stdin, visit(message["visit"]))
    return {"complaint": f"Node ended with {process.poll()}"}


def _write(pipe: IO[str], message: dict[str, Any]) -> None:
    pipe.write(json.dumps(message) + "\n")
    pipe.flush()
