"""Screenshots for docs/images: a quickstart in a terminal of 80 columns, its report, and the site.

    make screenshots
    python -m tests.bench.screenshots RUN_FOLDER    # only the report of this run, and the site

The quickstart runs in a pseudo-terminal, whose output a terminal emulator (pyte) turns into text
with colours; headless Chromium draws it. The images are stored with at most 256 colours.
"""

import fcntl
import html
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pyte
from PIL import Image

from tests import ROOT
from tests.report.browser import Browser, chromium

IMAGES = ROOT / "docs/images"
SITE = ROOT / "build/site"
COLUMNS, ROWS = 80, 32
COLOURS = {
    "default": "#d8dade", "black": "#17191d", "red": "#e5707a", "green": "#7fbf7a",
    "brown": "#d9b25f", "blue": "#6fa8dc", "magenta": "#c08bd6", "cyan": "#63c0c0",
    "white": "#f0f0f0",
}  # fmt: skip
STYLE = (
    "body { margin: 0; background: #17191d } pre { margin: 0; padding: 14px 18px; color: #d8dade; "
    "display: inline-block; font: 14px/1.17 'DejaVu Sans Mono', monospace }"
)
# Images of the terminal: name -> text on the screen when the image is taken; None: at the end.
MOMENTS = {"terminal-training": " 60 %", "terminal-scoring": "└", "terminal-end": None}
THEMES = {"light": "", "dark": "-dark"}  # theme -> suffix of the names of its images


def main() -> None:
    """Run the quickstart, unless a run is named, and write the images."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        report = folder / "quickstart/run/report.html"
        screens = {}
        if sys.argv[1:]:
            report = Path(sys.argv[1]) / "report.html"
        else:
            screens = run_quickstart(folder)
        with chromium(folder / "profile") as browser:
            for name, screen in screens.items():
                # 760 pixels are wider than 80 columns; the image is cropped to the text.
                take(browser, screen, IMAGES / f"{name}.png", width=760)
            page = SITE / "docs/lora.html"
            for theme, suffix in THEMES.items():
                desktop = IMAGES / f"report-desktop{suffix}.png"
                take(browser, report, desktop, width=1100, theme=theme)
                take(browser, report, IMAGES / f"report-phone{suffix}.png", width=390, theme=theme)
                take(browser, page, IMAGES / f"site-phone{suffix}.png", width=390, theme=theme)
            take(browser, report, IMAGES / "report-curves.png", width=1100, section="Curves")
            take(browser, SITE / "index.html", IMAGES / "site-desktop.png", width=1280)


def take(
    browser: Browser,
    page: Path,
    image: Path,
    *,
    width: int,
    theme: str = "light",
    section: str | None = None,
) -> None:
    """Write an image of the first 900 pixels of a page, or of those below a heading.

    A terminal's page is cropped to its text. The page must load nothing from a network.
    """
    browser.open(page, width=width, theme=theme)
    assert all(url.startswith(("file:", "data:")) for url in browser.requests), browser.requests
    if section is not None:
        heading = f"[...document.querySelectorAll('h2')].find(h => h.textContent == '{section}')"
        browser.evaluate(f"{heading}.scrollIntoView()")
    browser.evaluate("new Promise(done => setTimeout(done, 500))")  # colours fade in
    browser.screenshot(image, is_whole_page=False)
    browser.evaluate("localStorage.clear()")  # the site stores the theme
    picture = Image.open(image).convert("RGB")
    if page.name.startswith("terminal"):
        size = "(r => [r.width, r.height])(document.querySelector('pre').getBoundingClientRect())"
        picture = picture.crop((0, 0, *map(int, browser.evaluate(size))))
    picture.quantize(256).save(image, optimize=True)
    print(f"{image.relative_to(ROOT)}: {picture.size}, {image.stat().st_size / 1000:.0f} kB")


def run_quickstart(folder: Path) -> dict[str, Path]:
    """Run the quickstart in a folder; HTML files of its terminal at each of the moments."""
    (folder / "quickstart").mkdir()
    (folder / "launch").symlink_to(ROOT / "launch")
    model = "quickstart/smollm2-135m-instruct"
    (folder / model).symlink_to(ROOT / model)
    screen = pyte.Screen(COLUMNS, ROWS)
    stream, waiting, files = pyte.ByteStream(screen), dict(MOMENTS), {}
    python = ROOT / ".venv/bin/python"
    process, terminal = start([python, "launch/quickstart/quickstart.py"], folder)
    while output := read(terminal):
        stream.feed(output)
        shown = "\n".join(screen.display)
        for name, awaited_text in list(waiting.items()):
            if awaited_text is not None and awaited_text in shown:
                del waiting[name]
                files[name] = write_page(screen, folder / f"{name}.html")
    assert process.wait() == 0, "\n".join(screen.display)
    for name in waiting:
        files[name] = write_page(screen, folder / f"{name}.html")
    return files


def start(command: list, folder: Path) -> tuple[subprocess.Popen, int]:
    """Start a command with a terminal of 80 columns as its standard streams.

    Returns the process, and the file descriptor from which the terminal's output is read.
    """
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": str(COLUMNS),
        "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    environment.pop("DISPLAY", None)
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    return process, controller


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 2**16)
    except OSError:  # the last process has closed the terminal
        return b""


def write_page(screen: pyte.Screen, path: Path) -> Path:
    """Write the terminal as an HTML page, without its empty last lines."""
    lines = []
    for y in range(ROWS):
        cells = [screen.buffer[y][x] for x in range(COLUMNS)]
        lines.append(
            "".join(f'<span style="{style(c)}">{html.escape(c.data)}</span>' for c in cells)
        )
    while lines and not screen.display[len(lines) - 1].strip():
        lines.pop()
    path.write_text(
        f"<!doctype html><meta charset=utf-8><style>{STYLE}</style><pre>" + "\n".join(lines)
    )
    return path


def style(cell: pyte.screens.Char) -> str:
    colour = COLOURS.get(cell.fg, f"#{cell.fg}")
    return f"color: {colour}" + ("; font-weight: bold" if cell.bold else "")


if __name__ == "__main__":
    sys.exit(main())
