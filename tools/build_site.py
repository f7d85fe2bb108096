"""Build the documentation site: collect its pages, generate the API reference, and run Zensical.

    python tools/build_site.py [--output DIRECTORY]

The pages are the Markdown files and notebooks in ``docs``, README.md as the home page, and the
other Markdown files at the top of the repository. Links between files of the repository become
links between pages. A link to a file that is not part of the site, such as a source file, becomes
plain text.
"""

from __future__ import annotations

import argparse
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import nbformat
import yaml
from api_reference import build_api_pages
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
TOP_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASE.md": "release.md",
    "SECURITY.md": "security.md",
}
NOT_SEARCHED = ("changelog.md", "contributing.md", "release.md", "decisions/")
ASSETS = {".css", ".png", ".svg"}
_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2\s*?$", re.MULTILINE | re.DOTALL)
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_LINK = re.compile(r"(!?)\[((?:[^][]|\[[^][]*\])*)\]\(([^)\s]+)\)")


class SiteError(Exception):
    """Raised when the site is incomplete or cannot be built."""


def find_pages() -> dict[str, str]:
    """Return a dict that maps the repository path of each page and asset to its path in the site.

    The index page of a directory ``name`` is made from ``name.md`` or ``name/README.md``.
    """
    pages = dict(TOP_PAGES)
    for path in sorted((ROOT / "docs").rglob("*")):
        location = path.relative_to(ROOT / "docs")
        if path.suffix in ASSETS:
            pages[path.relative_to(ROOT).as_posix()] = location.as_posix()
        elif path.suffix in {".md", ".ipynb"}:
            if path.with_suffix("").is_dir():
                location = location.with_suffix("") / "index.md"
            elif path.name == "README.md":
                location = location.with_name("index.md")
            pages[path.relative_to(ROOT).as_posix()] = location.with_suffix(".md").as_posix()
    return pages


def collect_pages(target: Path) -> list[str]:
    """Write the pages and assets to a directory, and return the paths of the pages in it."""
    files = find_pages()
    texts = build_api_pages()
    for name, location in files.items():
        path = target / location
        path.parent.mkdir(parents=True, exist_ok=True)
        if Path(name).suffix in ASSETS:
            shutil.copyfile(ROOT / name, path)
        else:
            texts[location] = rewrite_links(read_page(ROOT / name, path), name, files)
    for directory in ("results", "decisions"):
        texts.setdefault(f"{directory}/index.md", "\n".join(_list_pages(directory, texts)) + "\n")
    for location, text in texts.items():
        settings: dict[str, Any] = {"search": {"exclude": location.startswith(NOT_SEARCHED)}}
        if location in {"index.md", "tutorial.md"}:  # the only page of its section
            settings["hide"] = ["navigation"]
        path = target / location
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"---\n{yaml.safe_dump(settings)}---\n\n{text}", encoding="utf-8")
    return list(texts)


def read_page(path: Path, target: Path) -> str:
    """Return a page as Markdown. If it is a notebook, write its pictures next to ``target``.

    ``target`` is the path to which the caller will write the page.
    """
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if html := output.get("data", {}).get("text/html"):
                output["data"]["text/html"] = f"<div>{html}</div>"  # Markdown keeps a div as it is
    exporter = MarkdownExporter()
    resources = {"unique_key": f"{path.stem}_files", "output_files_dir": f"{path.stem}_files"}
    text, made = exporter.from_notebook_node(notebook, resources)
    for name, data in made["outputs"].items():
        picture = target.parent / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(data)
    return str(text)


def rewrite_links(text: str, name: str, pages: dict[str, str]) -> str:
    """Replace a page's links to repository files with links to pages of the site.

    Args:
        text: Markdown of a page.
        name: path of the page in the repository.
        pages: dict that maps the repository path of each page and asset to its path in the site.
    """
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_rewrite(text[end : fence.start()], name, pages), fence.group()]
        end = fence.end()
    return "".join([*parts, _rewrite(text[end:], name, pages)])


def _rewrite(text: str, name: str, pages: dict[str, str]) -> str:
    def replace(link: re.Match[str]) -> str:
        mark, label, target = link.groups()
        path, _, anchor = target.partition("#")
        if not path or ":" in path:
            return link.group()
        found = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        location = pages.get(found)
        if location is None and found.startswith("docs/") and (ROOT / found).is_dir():
            location = f"{found.removeprefix('docs/')}/index.md"
        if location is None:
            # Zensical reports a link to a file that does not exist.
            return label if (ROOT / found).exists() else link.group()
        relative = posixpath.relpath(location, posixpath.dirname(pages[name]))
        return f"{mark}[{label}]({relative}{'#' if anchor else ''}{anchor})"

    return _LINK.sub(replace, text)


def _list_pages(directory: str, texts: dict[str, str]) -> Iterator[str]:
    yield f"# {directory.capitalize()}\n"
    for location in sorted(texts):
        if location.startswith(f"{directory}/"):
            title = texts[location].partition("\n")[0].removeprefix("# ")
            yield f"- [{title}]({posixpath.basename(location)})"


def expand_nav(nav: list[Any], pages: list[str]) -> list[Any]:
    """Return a copy of a MkDocs nav with patterns expanded to pages and empty sections removed."""
    named = set(_list_names(nav))

    def expand(item: Any) -> Iterator[Any]:
        if isinstance(item, dict):
            for title, content in item.items():
                if isinstance(content, str):
                    if content in pages:
                        yield item
                elif found := [each for part in content for each in expand(part)]:
                    yield {title: found}
        elif item in pages:
            yield item
        else:
            yield from (page for page in sorted(pages) if fnmatch(page, item) and page not in named)

    return [each for item in nav for each in expand(item)]


def _list_names(nav: Any) -> Iterator[str]:
    """Yield the pages and patterns that are listed in a nav."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from _list_names(item)


def build_site(directory: Path) -> Path:
    """Build the site in a directory, and return the path of the HTML files.

    If the directory exists, it is deleted first.

    Raises:
        SiteError: a page is not in the nav of mkdocs.yml, or Zensical reports a problem, such as a
            dead link.
    """
    shutil.rmtree(directory, ignore_errors=True)
    pages = collect_pages(directory / "pages")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    settings["nav"] = expand_nav(settings["nav"], pages)
    if missing := set(pages) - set(_list_names(settings["nav"])):
        raise SiteError(
            f"The nav of mkdocs.yml does not include {', '.join(sorted(missing))}. Add each page, "
            "or a pattern that matches it."
        )
    settings |= {"docs_dir": "pages", "site_dir": "html"}
    (directory / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(  # noqa: S603  # our own code
        command,
        cwd=directory,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise SiteError(_COLOR.sub("", done.stdout).partition("Traceback")[0])
    return directory / "html"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "build" / "docs",
        metavar="DIRECTORY",
        help="build directory, deleted before the build (default: build/docs)",
    )
    args = parser.parse_args()
    try:
        html = build_site(args.output)
    except SiteError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"To view the site: python -m http.server --directory {html}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
