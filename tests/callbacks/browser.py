"""Chromium without a window, told what to do through its DevTools protocol."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--remote-debugging-port=0"),
)
#: Whether a report answers.
READY = "document.documentElement?.dataset.ready"


def find_browser() -> str | None:
    """The path of a browser; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab.

    Attributes:
        problems: what pages wrote to the console, and errors that nothing caught.
        requests: addresses that pages asked for, but those of data in them.
    """

    def __init__(self, folder):
        self.problems, self.requests = [], []
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        environment = os.environ | {"HOME": str(folder)}
        self._process = subprocess.Popen(
            [find_browser(), *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        port = next(
            line.rpartition(":")[2].split("/")[0]
            for line in self._process.stderr
            if "DevTools listening on" in line
        )
        self._loop.run_until_complete(self._connect(port))
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")

    async def _connect(self, port):
        import aiohttp

        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as answer:
            tabs = await answer.json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        self._socket = await self._session.ws_connect(address, max_msg_size=0)

    def close(self):
        self._loop.run_until_complete(self._session.close())
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stderr.close()
        self._loop.close()

    def call(self, method, **parameters):
        """Call a method of the protocol; what happens meanwhile is noted."""

        async def call():
            number = next(self._numbers)
            await self._socket.send_json({"id": number, "method": method, "params": parameters})
            while True:
                answer = await self._socket.receive_json(timeout=120)
                if answer.get("id") == number:
                    assert "error" not in answer, answer["error"]
                    return answer["result"]
                self._note(answer)

        return self._loop.run_until_complete(call())

    def _note(self, event):
        kind, content = event.get("method"), event.get("params", {})
        # The browser's own remarks, such as of a missing GPU, are no errors.
        logged = kind == "Log.entryAdded" and content["entry"]["level"] == "error"
        if logged or kind in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.problems.append(content)
        if kind == "Network.requestWillBeSent":
            address = content["request"]["url"]
            if not address.startswith(("data:", "blob:")):
                self.requests.append(address)

    def run(self, script):
        """The value of a JavaScript expression, awaited if need be."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script, seconds=60):
        """The first value of an expression that is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)
        return value

    def open(self, path, width=1280, height=900, dark=False, ready=READY):
        """Open a page and wait until the expression is true."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait(ready)
