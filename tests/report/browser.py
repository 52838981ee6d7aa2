"""Headless Chromium, spoken to through two pipes in its DevTools protocol: nothing but the standard library."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60  # seconds for an answer
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-extensions",
    "--remote-debugging-pipe",
)
KEYS = {
    "Tab": 9,
    "Home": 36,
    "End": 35,
    "ArrowLeft": 37,
    "ArrowRight": 39,
    "PageDown": 34,
    "Enter": 13,
    "+": 187,
    "0": 48,
}


def found() -> str | None:
    """The path of a Chromium, if one is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def _renumbered(descriptor: int) -> int:
    """The same with a number of at least 10. Chromium reads from 3 and writes to 4, which none of ours may be."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return copy


class Browser:
    """One page at a time. wrong: what its console has told of errors and of uncaught exceptions."""

    def __init__(self, program: str, profile: Path):
        theirs, self._to = map(_renumbered, os.pipe())
        self._from, answers = map(_renumbered, os.pipe())
        flags = [*FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [program, *flags],
            close_fds=False,
            preexec_fn=lambda: (os.dup2(theirs, 3), os.dup2(answers, 4)) and None,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(answers)
        self._bytes, self._number, self._session = b"", 0, ""
        self.wrong: list[str] = []
        self.asked: list[str] = []  # addresses
        (target,) = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._bytes:
            ready, _, _ = select.select([self._from], [], [], max(end - time.monotonic(), 0))
            more = os.read(self._from, 1 << 20) if ready else b""
            if not more:
                raise TimeoutError("Chromium has not answered")
            self._bytes += more
        message, _, self._bytes = self._bytes.partition(b"\0")
        event = json.loads(message)
        about = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.wrong.append(str(about["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.wrong.append(about["entry"]["text"])
        elif event.get("method") == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.wrong.append(str(about["args"]))
        elif event.get("method") == "Network.requestWillBeSent":
            self.asked.append(about["request"]["url"])
        return event

    def open(
        self, path: Path, width: int = 1280, height: int = 900, scheme: str = "light", scripts: bool = True
    ) -> None:
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.wrong.clear()
        self.asked.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass
        if scripts:
            self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript has as its value, in the page."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def press(self, *keys: str) -> None:
        for key in keys:
            more = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            code = {"key": key, "windowsVirtualKeyCode": KEYS[key]}
            self.call("Input.dispatchKeyEvent", type="keyDown" if more else "rawKeyDown", **code, **more)
            self.call("Input.dispatchKeyEvent", type="keyUp", **code)
