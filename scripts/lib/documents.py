#!/usr/bin/env python3
"""Checks the documents: links and files they name exist, and so do the commands of MLAD's programs with their
options, and the keys of the settings; every dependency is explained. (And no source file is too long.)

documents.py MLAD FOLDER: the static `mlad`, and the folder of the other programs.
"""
import functools
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MLAD, FOLDER = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
PROGRAMS = {"mlad": MLAD, **{name: FOLDER / name for name in ("mlad-gateway", "mlad-allocator", "nvml-sim")}}


def broken_links(path, text):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target and not (path.parent / target).exists():
            yield f"the link {target} leads nowhere"


def missing_files(text):
    for name in re.findall(r"`((?:scripts|config|images|docs|migrations|gateway|allocator|mlad|tests)/[\w./-]+)`", text):
        if not (ROOT / name).exists():
            yield f"there is no {name}"


def code(text):
    """What stands in code: the lines of blocks, and spans in prose and tables."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        yield from (line.split("  #")[0] for line in block.splitlines())
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))


@functools.cache
def help_of(program, *words):
    """What the program says of a command."""
    asked = subprocess.run([PROGRAMS[program], *words, "--help"], capture_output=True, text=True, check=False)
    return asked.stdout if asked.returncode == 0 else ""


def wrong_commands(text):
    names = "|".join(PROGRAMS)
    for snippet in code(text):
        for program, rest in re.findall(rf"(?:^|[\s(/])({names}) ([^|;&)]+)", snippet):
            yield from wrong_command(program, rest.split(" -- ")[0].split())


def wrong_command(program, words):
    path = []
    for word in words:
        commands = re.search(r"^Commands:\n((?:  .*\n)+)", help_of(program, *path), re.M)
        if word.startswith("-"):
            continue
        if not commands or not re.fullmatch(r"[a-z][a-z-]*", word):
            break
        # MLAD itself starts it; people see nothing of it.
        if [program, *path, word] == ["mlad", "agent"]:
            return
        if word not in re.findall(r"^  (\S+)", commands[1], re.M):
            yield f"there is no command `{' '.join([program, *path, word])}`"
            return
        path.append(word)
    for option in (word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)):
        if not re.search(rf"(?:^|[\s,]){option}\b", help_of(program, *path)):
            yield f"`{' '.join([program, *path])}` has no option {option}"


def settings(file):
    """The keys of a file of settings, each with its section, those that are commented out too."""
    section = ""
    for line in (ROOT / "config" / file).read_text().splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header[1]
        elif key := re.match(r"#? ?([a-z_]+) = ", line):
            yield section, key[1]


def wrong_keys(name, text):
    keys = {*settings("default.toml"), *settings("allocator.toml")}
    sections, plain = {section for section, _ in keys}, {key for _, key in keys}
    for snippet in code(text):
        # In the other documents such a word may be a name in the code.
        manual = name == "administrator-manual.md"
        dotted = re.match(r"([a-z]+)\.([a-z]+(?:_[a-z]+)*)(?: = .*)?$", snippet)
        if dotted and dotted[1] in sections and (manual or "_" in dotted[2]):
            if (dotted[1], dotted[2]) not in keys and dotted[2] not in ("toml", "db"):
                yield f"there is no setting {snippet}"
        plainly = re.match(r"([a-z]+(?:_[a-z]+)+)(?: = .*)?$", snippet)
        if manual and plainly and plainly[1] not in plain:
            yield f"there is no setting {plainly[1]}"


def undocumented_dependencies():
    text = (ROOT / "docs/dependencies.md").read_text()
    manifest = (ROOT / "Cargo.toml").read_text().split("[workspace.dependencies]")[1].split("\n[")[0]
    for name in re.findall(r"^([a-z0-9-]+) = ", manifest, re.M):
        if not name.startswith("mlad") and f"`{name}`" not in text:
            yield f"docs/dependencies.md: {name} is not explained"


def long_files():
    # The checkout may be somebody else's than root's, who runs this.
    git = ["git", "-c", "safe.directory=*", "ls-files", "*.rs"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(lambda name: (ROOT / name).exists(), listed.stdout.split()):
        lines = len((ROOT / name).read_text().splitlines())
        if lines > 700:
            yield f"{name} has {lines} lines; split it"


def main():
    problems = [*undocumented_dependencies(), *long_files()]
    for path in DOCUMENTS:
        text = path.read_text()
        found = [*broken_links(path, text), *missing_files(text), *wrong_commands(text), *wrong_keys(path.name, text)]
        problems += [f"{path.relative_to(ROOT)}: {problem}" for problem in found]
    print("\n".join(problems) or f"{len(DOCUMENTS)} documents are in order")
    sys.exit(bool(problems))


main()
