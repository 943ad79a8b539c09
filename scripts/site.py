"""A hook of MkDocs: pages beside docs/ become part of the site, under the paths that they have here.

So every relative link works as it does in the repository, and nothing is written twice. Pages of docs/ lose that prefix in
their address.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
KINDS = (".md", ".ipynb")


def on_files(files: Files, config: Any) -> Files:
    """Every page of the repository that may be in the navigation, and what the theme brings."""
    ours = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*.ipynb")]
    theme = [file for file in files if not file.src_uri.endswith(KINDS)]
    return Files([*theme, *(_page(path, config) for path in sorted(ours))])


def _page(path: Path, config: Any) -> File:
    source = path.relative_to(ROOT).as_posix()
    file = File(source, str(ROOT), config["site_dir"], config["use_directory_urls"])
    name = Path(source.removeprefix("docs/")).with_suffix("")
    if path.suffix == ".ipynb":
        return file
    if source == "docs/index.md":
        file.dest_uri = "index.html"
    elif source.endswith("README.md"):
        file.dest_uri = (name.parent / "readme" / "index.html").as_posix()
    else:
        file.dest_uri = (name / "index.html").as_posix()
    return file
