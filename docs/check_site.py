"""Check the built site: every link, anchor and picture is there, and no page loads anything from elsewhere.

python docs/check_site.py build/site
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = {""}
        self.missing_alt: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.anchors |= {values[key] for key in ("id", "name") if key in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in ("img", "script", "source", "iframe", "video") and "src" in values:
            self.loads.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(values["href"])
        if tag == "img" and not values.get("alt"):
            self.missing_alt.append(values.get("src", ""))


def problems(root: Path) -> list[str]:
    """Return a line for each thing that is wrong."""
    pages = {path: Page(path) for path in sorted(root.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":
            # Its links are those of the site's root, wherever it is served.
            continue
        where = path.relative_to(root)
        found += [f"{where}: loads {url} from elsewhere" for url in page.loads if urlsplit(url).netloc]
        found += [f"{where}: the picture {src} has no description" for src in page.missing_alt]
        for url in [*page.links, *page.loads]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                found.append(f"{where}: {url} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{where}: {url} names no anchor")
    return found


def main() -> int:
    """Print what is wrong, and return the exit status."""
    root = Path(sys.argv[1]).resolve()
    found = problems(root)
    print("\n".join(found) or f"{len(list(root.rglob('*.html')))} pages, every link leads somewhere")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
