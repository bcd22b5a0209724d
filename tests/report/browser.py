"""Headless Chromium, controlled through two pipes without a driver or network."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Browser:
    """One browser page. Errors of the console and the network are collected in `problems`."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write = read, write
        self.left, self.number, self.session = b"", 0, ""
        self.problems: list[str] = []
        self.events: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Network.emulateNetworkConditions",
            offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1,
        )  # fmt: skip

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self.left:
            part = os.read(self.read, 1 << 20)
            assert part, "the browser has gone"
            self.left += part
        text, _, self.left = self.left.partition(b"\0")
        message = json.loads(text)
        kind, what = message.get("method", ""), message.get("params", {})
        self.events.append(kind)
        if kind == "Runtime.exceptionThrown":
            self.problems.append(str(what["exceptionDetails"]))
        elif kind == "Runtime.consoleAPICalled":
            self.problems.append(str(what["args"]))
        elif kind == "Log.entryAdded":
            self.problems.append(what["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            url = what["request"]["url"]
            if not url.startswith(("file:", "data:")):
                self.problems.append(f"a request for {url}")
        return message

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends one command of the DevTools protocol and returns its result."""
        self.number += 1
        order = {"id": self.number, "method": method, "params": params}
        if self.session:
            order["sessionId"] = self.session
        os.write(self.write, json.dumps(order).encode() + b"\0")
        while (message := self._message()).get("id") != self.number:
            pass
        assert "error" not in message, message
        return message["result"]

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Loads a page with a given window size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while "Page.loadEventFired" not in self.events:
            self._message()

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def click(self, selector: str, number: int = 0) -> None:
        """Sends a mouse click at the center of an element."""
        element = f"document.querySelectorAll({json.dumps(selector)})[{number}]"
        x, y = self.evaluate(
            f"(() => {{ {element}.scrollIntoView({{block: 'center', behavior: 'instant'}});"
            f"const b = {element}.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path, whole: bool = False) -> None:
        """Saves the visible part or the whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser() -> Iterator[Browser]:
    """Starts Chromium and terminates it at the end."""
    there, write = os.pipe()  # Chromium reads from its descriptor 3 and writes to 4
    read, back = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        flags = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
            "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
            f"--user-data-dir={home}",
        ]  # fmt: skip
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{there} 4>&{back}', "bash", CHROMIUM, *flags],
            pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(there)
        os.close(back)
        try:
            yield Browser(read, write)
        finally:
            process.terminate()
            process.wait()
            os.close(read)
            os.close(write)
