"""A headless Chromium spoken to over its debugging pipe: what a page asks for, says and shows. No other package."""

import base64
import fcntl
import json
import os
import select
import shutil
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
LIMIT = 60.0  # seconds for an answer


def found() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """`with Browser(folder) as browser`: one page in one process, with its profile in `folder`.

    asked      addresses the page requested, its own file left out     said   console messages, log entries and exceptions
    dialogs    alert, confirm, ... that it opened
    """

    def __init__(self, folder: Path):
        program = found()
        assert program is not None
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # the browser reads commands from descriptor 3 and writes answers to 4; ours are moved out of the way of both
        ours = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (to_read, to_write)]
        flags = ["--headless", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-extensions"]
        log = os.open(folder / "browser.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        words = [program, *flags, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        moves = [(os.POSIX_SPAWN_DUP2, ours[0], 3), (os.POSIX_SPAWN_DUP2, ours[1], 4)]
        outputs = [(os.POSIX_SPAWN_DUP2, log, fd) for fd in (1, 2)]
        self._pid = os.posix_spawn(program, words, os.environ, file_actions=[*moves, *outputs])
        for fd in (to_read, to_write, *ours, log):
            os.close(fd)
        self._rest, self._count = b"", 0
        self._session: str | None = None
        self.asked: list[str] = []
        self.said: list[str] = []
        self.dialogs: list[str] = []
        self._loaded = 0

    def __enter__(self) -> "Browser":
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        self.send("Browser.close")
        os.waitpid(self._pid, 0)
        os.close(self._to)
        os.close(self._from)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command; events that come before it are noted."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + LIMIT
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._from, 1 << 20)
            assert part, "the browser ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif event == "Runtime.consoleAPICalled":
            self.said.append(json.dumps(params["args"]))
        elif event == "Runtime.exceptionThrown":
            self.said.append(json.dumps(params["exceptionDetails"]))
        elif event == "Log.entryAdded":
            self.said.append(params["entry"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
            self._count += 1
            os.write(
                self._to,
                json.dumps(
                    {
                        "id": self._count,
                        "sessionId": self._session,
                        "method": "Page.handleJavaScriptDialog",
                        "params": {"accept": False},
                    }
                ).encode()
                + b"\0",
            )
        elif event == "Page.loadEventFired":
            self._loaded += 1

    def open(self, file: Path, width: int = 1200) -> None:
        """Load a file; what it asks for and says is noted anew."""
        self.size(width)
        before = self._loaded
        self.asked, self.said, self.dialogs = [], [], []
        self.send("Page.navigate", url=file.as_uri())
        while self._loaded == before:
            self._next()
        self.value("new Promise(done => setTimeout(done, 100))")  # what a page does on its own account
        self.asked = [url for url in self.asked if url != file.as_uri()]

    def size(self, width: int, height: int = 900) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, on: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def value(self, code: str) -> Any:
        """What an expression of JavaScript gives."""
        answer = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, file: Path) -> None:
        """The whole page as PNG."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))
