"""Headless Chromium, driven through the pipe of its remote debugging protocol.

`CHROMIUM` names the program; Debian's package `chromium` has it.
"""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in _NAMES if (path := shutil.which(name))), None)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no host is found, so nothing outside is reached
)  # fmt: skip


class Browser:
    """One page of a Chromium.

    `errors`: exceptions and console errors since `open`. `requests`: URLs requested since `open`.
    """

    def __init__(self, commands_fd: int, messages_fd: int) -> None:
        """`commands_fd`, `messages_fd`: descriptors to write commands to and read messages from."""
        self._commands_fd, self._messages = commands_fd, os.fdopen(messages_fd, "rb")
        self._last_id, self._session = 0, ""
        self._events: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1100, theme: str = "light") -> None:
        """Load a page at this width and in this colour scheme, and wait until it is loaded."""
        self.errors, self.requests, self._events = [], [], []
        height, is_phone = 900, width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=is_phone,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.send("Emulation.setEmulatedMedia", features=features)
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.wait_for("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path, *, is_whole_page: bool = True) -> None:
        """Write the page as a PNG, with or without the part below the window."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=is_whole_page)["data"]
        path.write_bytes(base64.b64decode(data))

    def print_pdf(self, path: Path) -> None:
        """Write the page as it is printed."""
        data = self.send("Page.printToPDF", printBackground=False)["data"]
        path.write_bytes(base64.b64decode(data))

    def mouse(self, event: str, x: float, y: float, clicks: int = 0) -> None:
        """Send a mouse event: mouseMoved, mousePressed or mouseReleased.

        `clicks`: 1 while the left button is pressed.
        """
        button = "none" if event == "mouseMoved" and not clicks else "left"
        self.send(
            "Input.dispatchMouseEvent",
            type=event, x=x, y=y, button=button, buttons=int(bool(clicks)), clickCount=clicks,
        )  # fmt: skip

    def wait_for(self, method: str) -> dict[str, Any]:
        """Wait for the next event with this name."""
        while True:
            for i, event in enumerate(self._events):
                if event["method"] == method:
                    del self._events[: i + 1]
                    return event
            self._receive()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands_fd, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        """Read one message, which ends with a zero byte. An event is stored."""
        data = bytearray()
        while (byte := self._messages.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            data += byte
        message = json.loads(data)
        if "method" in message:
            self._events.append(message)
            self._record(message["method"], message.get("params", {}))
        return message

    def _record(self, method: str, parameters: dict[str, Any]) -> None:
        """Add an event to `errors` or `requests` if it is one of these."""
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(str(parameters["entry"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            self.errors.append(str(parameters["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile folder."""
    assert CHROMIUM is not None
    read_end, commands = os.pipe()
    messages, write_end = os.pipe()
    # Chromium reads commands from descriptor 3 and writes messages to descriptor 4.
    program = f'exec "$0" "$@" 3<&{read_end} 4>&{write_end}'
    process = subprocess.Popen(
        ["bash", "-c", program, CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(read_end, write_end),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_end)
    os.close(write_end)
    try:
        yield Browser(commands, messages)
    finally:
        os.close(commands)
        process.terminate()
        process.wait(30)
