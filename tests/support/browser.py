"""Chromium, to look at the pages that are written. Skips with the reason where there is none."""

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _browse(page: Path, home: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium to open the page")
    always = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={home}")
    line = [CHROMIUM, *always, *flags, page.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"Chromium does not start here: {done.stderr[-300:]}")
    return done


def dom(page: Path, home: Path) -> tuple[str, str]:
    """What Chromium makes of a page, its scripts run; and what it has to say about it.

    Args:
        page: an HTML file.
        home: folder for Chromium's own files.
    """
    done = _browse(page, home, "--virtual-time-budget=8000", "--dump-dom")
    return done.stdout, done.stderr


def screenshot(page: Path, home: Path, *, width: int, height: int, dark: bool = False) -> Path:
    """A PNG of a page, in its light or its dark colours. Sizes in pixels."""
    target = home / f"{page.stem}-{'dark' if dark else 'light'}.png"
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    flags = ("--virtual-time-budget=8000", f"--screenshot={target}", f"--window-size={width},{height}", scheme)
    _browse(page, home, *flags)
    if not target.is_file():
        pytest.skip("Chromium has taken no picture")
    return target
