"""The pages: links and their anchors, the reference against the code, Chinese beside English, and
that every command in them is one."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import reference
from conftest import ROOT

import glmlora
from glmlora.cli.flags import parser_of_verbs
from glmlora.tools.project import tiny_directory

if not (ROOT / "docs").is_dir():
    pytest.skip("docs/ is not here: an installed package", allow_module_level=True)

FOLDERS = ("", "docs", "docs/guide", "docs/zh", "docs/zh/guide", "csrc", "cuda", "glmlora")
FOLDERS += ("benchmarks", "notebooks", "tests", "tests/portable")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
TRANSLATED = sorted([ROOT / "docs/README.md", *(ROOT / "docs/guide").glob("*.md")])
CHINESE = re.compile("[一-鿿]")


def chinese_of(page: Path) -> Path:
    """Where the Chinese of a page is, or would be."""
    if page == ROOT / "README.md":
        return ROOT / "README.zh.md"
    return ROOT / "docs/zh" / page.relative_to(ROOT / "docs")


def split(page: Path) -> tuple[str, list[str]]:
    """(a page without its code, its code blocks: fenced, and indented behind an empty line)."""
    prose, blocks, fence, block = [], [], None, []
    lines = page.read_text(encoding="utf-8").split("\n")
    for i, line in enumerate(lines):
        mark = re.match(r"\s*(```+)", line)
        if mark and fence is None:
            fence, block = mark[1], []
        elif fence is not None and line.strip() == fence:
            blocks.append("\n".join(block))
            fence = None
        elif fence is not None:
            block.append(line)
        elif line.startswith("    ") and (lines[i - 1].startswith("    ") or not lines[i - 1]):
            if lines[i - 1].startswith("    ") and blocks:
                blocks[-1] += "\n" + line[4:]
            else:
                blocks.append(line[4:])
        else:
            prose.append(line)
    assert fence is None, f"{page}: a code block is not closed"
    return "\n".join(prose), blocks


def headings(page: Path) -> list[tuple[int, str]]:
    prose, _ = split(page)
    return [(len(m[1]), m[2]) for m in re.finditer(r"^(#+) (.+)$", prose, re.MULTILINE)]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    found: list[str] = []
    for _, title in headings(page):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower().strip()).replace(" ", "-")
        again = sum(
            re.fullmatch(re.escape(slug) + r"(-\d+)?", other) is not None for other in found
        )
        found.append(f"{slug}-{again}" if again else slug)
    return set(found)


def links(page: Path) -> list[str]:
    prose, _ = split(page)
    prose = re.sub(r"`[^`]*`", lambda m: "`" + " " * (len(m[0]) - 2) + "`", prose)
    return re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="([^"]+)"', prose)


def target(page: Path, link: str) -> Path:
    """The file that a link of a page leads to."""
    path = link.partition("#")[0]
    return (page.parent / path).resolve() if path else page


def outside(link: str) -> bool:
    return link.startswith(("https://", "http://", "mailto:"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    wrong = []
    for link in links(page):
        if outside(link):
            continue
        found, anchor = target(page, link), link.partition("#")[2]
        if not found.exists() or not found.is_relative_to(ROOT):
            wrong.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(found):
            wrong.append(f"{link}: no such heading")
    assert not wrong


def test_every_page_is_reached():
    """From README.md, link by link, each page of docs/ is found; so is its Chinese from there."""
    for start in (ROOT / "README.md", ROOT / "README.zh.md"):
        seen, left = {start}, [start]
        while left:
            page = left.pop()
            for link in links(page):
                found = None if outside(link) else target(page, link)
                if found and found.suffix == ".md" and found not in seen and found.exists():
                    seen.add(found)
                    left.append(found)
        missing = [
            page for page in PAGES if page.is_relative_to(ROOT / "docs") and page not in seen
        ]
        assert not missing, f"not reached from {start.name}"


# Chinese


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: str(page.relative_to(ROOT)))
def test_chinese_guide(page):
    """The same code, headings, tables and links, in Chinese."""
    other = chinese_of(page)
    prose, code = split(page)
    translated, same = split(other)
    assert same == code
    assert [level for level, _ in headings(other)] == [level for level, _ in headings(page)]
    rows = r"^\|.*\|$"
    assert [row.count("|") for row in re.findall(rows, translated, re.MULTILINE)] == [
        row.count("|") for row in re.findall(rows, prose, re.MULTILINE)
    ]
    assert len(re.findall("^- ", translated, re.M)) == len(re.findall("^- ", prose, re.M))
    leads = []
    for link in links(page):
        found = link if outside(link) else target(page, link)
        there = found == ROOT / "README.md" or found in TRANSLATED
        leads.append(page if found == other else chinese_of(found) if there else found)
    found = [link if outside(link) else target(other, link) for link in links(other)]
    assert sorted(map(str, found)) == sorted(map(str, [*leads]))
    for part in translated.split("\n\n"):
        words = re.sub(r"`[^`]*`|\]\([^)]*\)", "", part)
        if re.search(r"[A-Za-z]{3} [A-Za-z]{3}", words) or len(words) > 60:
            assert CHINESE.search(words), f"still English: {part}"
    for name in re.findall(r"`[^`]+`", prose):  # flags, names and commands are never translated
        if not re.search("[A-Z]{3}|[a-z] [a-z]", name):
            assert name in translated, name


def commands(block: str) -> list[str]:
    """The lines of a block without what they say to the reader."""
    return [re.sub(r"\s*# .*", "", line).rstrip() for line in block.split("\n")]


def test_chinese_readme():
    page, other = ROOT / "README.md", ROOT / "README.zh.md"
    (prose, code), (translated, same) = split(page), split(other)
    assert [*map(commands, same)] == [*map(commands, code)]
    assert [level for level, _ in headings(other)] == [level for level, _ in headings(page)]
    assert len(re.findall(r"^\|", translated, re.M)) == len(re.findall(r"^\|", prose, re.M))
    assert len(re.findall("^- ", translated, re.M)) == len(re.findall("^- ", prose, re.M))
    numbers = r"\d+\.\d+(?!\d* million)"  # 3.9 million is written 390 in ten thousands
    assert sorted(re.findall(numbers, translated)) == sorted(re.findall(numbers, prose))


# The code


def test_reference_is_current():
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), (
        "python tests/reference.py writes docs/reference.md anew"
    )


def test_reference_has_every_public_name():
    named = {name for names in reference.SECTIONS.values() for name in names.split()}
    public = set(glmlora.__all__) - {"__version__"}
    assert public == {name for name in named if "." not in name}
    told = {title for level, title in headings(reference.PAGE) if level == 3}
    assert public <= told
    assert {f"glmlora {verb}" for verb in [*parser_of_verbs()[1], "train"]} <= told


def spoken(page: Path) -> list[list[str]]:
    """The words of each `glmlora ..` in a page's code and in its text."""
    prose, blocks = split(page)
    texts = [re.sub(r"\\\n\s*", "", block) for block in blocks]
    texts += re.findall(r"`([^`\n]+)`", prose)
    lines = [line for text in texts for line in text.split("\n")]
    found = []
    for line in lines:
        start = re.match(r"(?:[A-Z_]+=\S+ |mpiexec -n \d+ |srun .*?|!)?glmlora (?=[a-z]+\b)", line)
        if start:
            words = shlex.split(re.sub(r"\s#.*", "", line[start.end() :]), posix=True)
            found.append([word.strip("[],") for word in words])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_commands(page):
    """Each verb and flag that a page names is there."""
    _, verbs = parser_of_verbs()
    for verb, *words in spoken(page):
        assert verb in verbs or verb == "train", f"glmlora {verb}"
        flags = [re.match(r"[\w-]*", word)[0] for word in words if word.startswith("--")]
        flags = [flag for flag in flags if flag.isascii()]  # not the word for "flag" in Chinese
        if verb == "train":
            names = {flag.removeprefix("--no_").removeprefix("--") for flag in flags}
            known = reference.FLAG_NAMES | {"help", "flag", "cuda"}
        else:
            names = set(flags)
            known = set(verbs[verb]._option_string_actions)
        assert names <= known, f"glmlora {verb}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_can_be_read(page):
    """Python's blocks compile, and the shell reads its own."""
    source = page.read_text(encoding="utf-8")
    for kind, block in re.findall(r"^```(python|sh)\n(.*?)^```$", source, re.MULTILINE | re.DOTALL):
        if kind == "python":
            try:
                compile(block, str(page), "exec")
            except SyntaxError:
                if page != reference.PAGE:  # whose blocks are signatures
                    raise
        else:
            done = subprocess.run(["sh", "-n"], input=block, text=True, capture_output=True)
            assert done.returncode == 0, done.stderr


def test_ten_lines(tmp_path):
    """README's first program, in a project, as tests/clean_machine.sh takes it."""
    script = (ROOT / "tests/clean_machine.sh").read_text()
    [take] = re.findall(r"^ten=\$\((.*)\)$", script, re.MULTILINE)
    done = subprocess.run(["sh", "-c", f'here="{ROOT}"; {take}'], capture_output=True, text=True)
    program = done.stdout
    assert program.rstrip("\n") in split(ROOT / "README.md")[1]  # one block, whole
    (tmp_path / "paper").mkdir()
    (tmp_path / "chatglm2-6b").symlink_to(tiny_directory())
    (tmp_path / "paper/ten.py").write_text(program + "\nassert response == '1', response\n")
    words = [sys.executable, "ten.py"]
    done = subprocess.run(words, cwd=tmp_path / "paper", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_checks_see(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "# A `b`, c\n\n## A b c\n\n[x](b.md#y) `[no](z.md)`\n\n```sh\n[no](w.md)\n"
        "glmlora chat --modle x\n```\n\n    glmlora \\\n      merge\n\ntext\n"
    )
    assert anchors(page) == {"a-b-c", "a-b-c-1"}
    assert links(page) == ["b.md#y"]
    assert split(page)[1] == ["[no](w.md)\nglmlora chat --modle x", "glmlora \\\n  merge"]
    assert spoken(page) == [["chat", "--modle", "x"], ["merge"]]
