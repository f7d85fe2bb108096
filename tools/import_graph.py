"""Print statistics of the import graph and the sizes of the source files.

python tools/import_graph.py [CHECKOUT]
"""

from __future__ import annotations

import sys
from pathlib import Path

import grimp
import networkx as nx

PACKAGES = ("onecycle", "engine", "schedules", "schemas")


def build_graph(root: Path) -> nx.DiGraph[str]:
    """Return the graph of imports between modules, including imports inside functions."""
    sys.path.insert(0, str(root))
    imports = grimp.build_graph(*PACKAGES, cache_dir=None)
    edges = [
        (m, other)
        for m in imports.modules
        for other in imports.find_modules_directly_imported_by(m)
    ]
    return nx.DiGraph(edges)


def name_directory(root: Path, module: str) -> str:
    path = root.joinpath(*module.split("."))
    return module if path.is_dir() else module.rpartition(".")[0]


def main() -> None:
    root = Path(sys.argv[1] if sys.argv[1:] else ".").resolve()
    modules = build_graph(root)
    pairs = {(name_directory(root, a), name_directory(root, b)) for a, b in modules.edges}
    directories = nx.DiGraph([(a, b) for a, b in pairs if a != b])
    print(f"{directories.number_of_edges()} import edges between {len(directories)} directories")
    for kind, graph in (("modules", modules), ("directories", directories)):
        cycles = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
        print(
            f"{len(cycles)} import cycles between {kind}: "
            f"{'; '.join(', '.join(cycle) for cycle in cycles)}"
        )
    chain = nx.dag_longest_path(nx.condensation(modules))
    print(f"longest import chain: {len(chain)} modules")
    for package in PACKAGES[:2]:
        top = [path.name for path in (root / package).glob("*.py")]
        print(f"{len(top)} files at the top level of {package}/: {', '.join(sorted(top))}")
    files = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    lengths = sorted(((len(path.read_text().splitlines()), path) for path in files), reverse=True)
    print(f"{sum(length for length, _ in lengths):,} lines in {len(files)} files; the longest:")
    for length, path in lengths[:5]:
        print(f"  {length} {path.relative_to(root)}")


if __name__ == "__main__":
    main()
