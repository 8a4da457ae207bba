"""Opens pages in headless Chromium and lists what is wrong with them."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

PHONE, DESKTOP = 390, 1200  # pixels
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A page has one console, and each frame its own width.
_LOOK = """
window.onload = () => {
  const problems = [];
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, width = frame.clientWidth;
    const say = text => problems.push(`${frame.title}, ${width} pixels: ${text}`);
    if (page.documentElement.scrollWidth > width) {
      say(`is ${page.documentElement.scrollWidth} pixels wide`);
    }
    if (!page.querySelector("section")) say("has no section");
    for (const part of page.querySelectorAll("section, figure, table, svg, .gallery, dd")) {
      const box = part.getBoundingClientRect();
      if (box.width < 5 || box.height < 5 || !part.children.length && !part.textContent.trim()) {
        say(`${part.tagName} is empty`);
      }
    }
    for (const part of page.querySelectorAll(".scroll")) {
      const columns = part.querySelectorAll("th").length;  // a table of many has to scroll
      if (columns < 8 && part.scrollWidth > part.clientWidth) {
        say(`a table is cut off: ${part.textContent.slice(0, 40)}`);
      }
    }
    for (const part of page.querySelectorAll("section")) {
      if (part.children.length < 2) say(`${part.id} has only a heading`);
    }
    for (const image of page.images) if (!image.naturalWidth) say(`${image.alt} is no image`);
    for (const link of page.querySelectorAll("[href], [src]")) {
      const target = link.getAttribute("href") || link.getAttribute("src");
      if (!/^(#|data:)/.test(target)) say(`loads ${target}`);
    }
  }
  document.title = JSON.stringify(problems);
};
"""


def problems(pages, folder):
    """Returns the problems of pages, at the width of a phone and of a desktop.

    Args:
      pages: HTML by name.
      folder: where Chromium may write.
    """
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("needs Chromium")
    frames = "".join(
        f'<iframe title="{escape(name)}" style="width:{width}px;height:900px;border:0" '
        f'srcdoc="{escape(page)}"></iframe>'
        for name, page in pages.items()
        for width in (PHONE, DESKTOP)
    )
    file = folder / "pages.html"
    file.write_text(f'<!doctype html><meta charset="utf-8">{frames}<script>{_LOOK}</script>')
    done = subprocess.run(
        [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom",
         file.as_uri()],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return [*json.loads(unescape(title[1])), *console]
