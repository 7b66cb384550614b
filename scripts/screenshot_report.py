"""Open a page of `loratune report` in a headless Chromium, as a desktop and a phone show it, light and dark.

    python scripts/screenshot_report.py report.html shots/

writes shots/{desktop,window,phone}-{light,dark}.png, and fails if the page asks for anything, reports an error, scrolls
sideways, or has a table or figure that is wider than its card. Chromium is Debian's (`apt-get install chromium`) or
whatever `$CHROMIUM` names. It is spoken to over pipes, in its DevTools protocol
(https://chromedevtools.github.io/devtools-protocol/), so that no other package is needed.
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCREENS = {"desktop": (1280, 900, False), "window": (500, 900, False), "phone": (390, 844, True)}
"""Width and height in CSS pixels, and whether it is a phone."""
SCHEMES = ("light", "dark")
_CUT_OFF = """
[...document.querySelectorAll(".card, .tiles > div, .tiles .figure")]
    .filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.innerText.slice(0, 60))
"""
_NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Seen:
    """What became of a page.

    Attributes:
        image: A screenshot of the whole page, as PNG.
        requests: What it asked for, besides itself and what is written in it.
        errors: What the browser complained about.
        width: How wide its content is, in CSS pixels.
        cut_off: How the texts begin that are wider than their card.
        background: The colour behind it.
    """

    image: bytes = b""
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    width: int = 0
    background: str = ""
    cut_off: list[str] = field(default_factory=list)


def find_browser() -> str | None:
    """The path of a Chromium; None if there is none."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CHROMIUM"), *_NAMES)))), None)


class Browser:
    """A tab of a headless browser. events: what it has reported since the last page was opened."""

    def __init__(self, sending: int, receiving: int):
        self._to, self._from, self._number = sending, os.fdopen(receiving, "rb"), 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session: str | None = None
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method and wait for its result. Raises RuntimeError: the browser refuses."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.__dict__.get("session") else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def wait_for(self, method: str) -> None:
        """Wait until the browser tells of an event."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        raw = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has gone")
            raw += byte
        message: dict[str, Any] = json.loads(raw)
        return message

    def look(self, page: Path, screen: str, scheme: str) -> Seen:
        """Open a page."""
        width, height, phone = SCREENS[screen]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        self.call("Page.navigate", url=page.absolute().as_uri())
        self.wait_for("Page.loadEventFired")
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        background = self._evaluate("getComputedStyle(document.body).backgroundColor")
        scroll_width = self._evaluate("document.documentElement.scrollWidth")
        image = base64.b64decode(shot["data"])
        return Seen(image, *self._told(page), scroll_width, background, self._evaluate(_CUT_OFF))

    def _evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def _told(self, page: Path) -> tuple[list[str], list[str]]:
        requests, errors = [], []
        for event in self.events:
            method, parameters = event.get("method"), event.get("params", {})
            if method == "Network.requestWillBeSent":
                requests.append(parameters["request"]["url"])
            elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                errors.append(parameters["entry"]["text"])
            elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                errors.append(json.dumps(parameters)[:500])
        own = (page.absolute().as_uri(), "data:")
        return [url for url in requests if not url.startswith(own)], errors


@contextmanager
def browsing(path: str) -> Iterator[Browser]:
    """A headless browser, which is ended at the end. path: that of its program."""
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()

    def connect() -> None:
        os.dup2(commands, 13)
        os.dup2(answers, 14)
        os.dup2(13, 3)
        os.dup2(14, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars"]
        options += ["--disable-gpu", "--no-first-run", "--disable-background-networking"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []
        process = subprocess.Popen(
            [path, *options], preexec_fn=connect, close_fds=False, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        try:
            yield Browser(to_browser, from_browser)
        finally:
            process.kill()
            process.wait()
            os.close(to_browser)


def faults(seen: Seen, screen: str) -> list[str]:
    """What is wrong with a page."""
    lines = [f"asks for {url}" for url in seen.requests] + [f"reports: {error}" for error in seen.errors]
    wide = [f"is {seen.width} pixels wide"] if seen.width > SCREENS[screen][0] else []
    return lines + wide + [f"cuts off: {text}" for text in seen.cut_off]


def main() -> int:
    """Look at a page. Returns 1 if anything is wrong with it."""
    parser = argparse.ArgumentParser(description="Look at a report in a headless browser.")
    parser.add_argument("page", type=Path)
    parser.add_argument("output", type=Path, help="the folder of the screenshots")
    arguments = parser.parse_args()
    if (path := find_browser()) is None:
        print("there is no Chromium: apt-get install chromium", file=sys.stderr)
        return 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    wrong = False
    with browsing(path) as browser:
        for screen in SCREENS:
            for scheme in SCHEMES:
                seen = browser.look(arguments.page, screen, scheme)
                (arguments.output / f"{screen}-{scheme}.png").write_bytes(seen.image)
                for line in faults(seen, screen):
                    wrong = True
                    print(f"{screen}, {scheme}: {line}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
