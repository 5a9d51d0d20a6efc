#!/usr/bin/env python3
"""Checks that what the documents point to exists: links, `scripts/…` and `mlad …` commands, licences."""
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def broken_links(path, text):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target and not (path.parent / target).exists():
            yield f"{path.relative_to(ROOT)}: the link {target} leads nowhere"


def missing_files(path, text):
    for name in re.findall(r"`((?:scripts|config|images|docs|migrations|gateway|allocator|mlad|tests)/[\w./-]+)`", text):
        if not (ROOT / name).exists():
            yield f"{path.relative_to(ROOT)}: there is no {name}"


def undocumented_dependencies():
    text = (ROOT / "docs/dependencies.md").read_text()
    manifest = (ROOT / "Cargo.toml").read_text().split("[workspace.dependencies]")[1].split("\n[")[0]
    for name in re.findall(r"^([a-z0-9-]+) = ", manifest, re.M):
        if not name.startswith("mlad") and f"`{name}`" not in text:
            yield f"docs/dependencies.md: {name} is not explained"


def long_files():
    listed = subprocess.run(["git", "ls-files", "*.rs"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split():
        lines = len((ROOT / name).read_text().splitlines())
        if lines > 700:
            yield f"{name} has {lines} lines; split it"


def main():
    problems = [*undocumented_dependencies(), *long_files()]
    for path in DOCUMENTS:
        text = path.read_text()
        problems += [*broken_links(path, text), *missing_files(path, text)]
    print("\n".join(problems) or f"{len(DOCUMENTS)} documents are in order")
    sys.exit(bool(problems))


main()
