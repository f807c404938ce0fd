"""What stands around the code: package, workflows, changelog."""

import ast
import email
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ftray

REPOSITORY = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
LAYERS = PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def workflow(name):
    return yaml.load((REPOSITORY / ".github" / "workflows" / name).read_text(), yaml.BaseLoader)  # `on` stays a word


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def image_sources():
    """What the Dockerfile copies: the least that the package is built from."""
    copies = re.findall(r"^COPY (.*)$", (REPOSITORY / "cluster" / "Dockerfile").read_text(), re.MULTILINE)
    return [source for copy in copies for source in copy.split()[:-1]]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of what the image is built from, and the wheel of that sdist, as `python -m build` makes them."""
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for source in (REPOSITORY / source for source in image_sources()):
        if source.is_dir():
            shutil.copytree(source, tree / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree)
    make = f"from setuptools import build_meta; build_meta.build_sdist({str(dist)!r})"
    subprocess.run([sys.executable, "-c", make], cwd=tree, check=True, capture_output=True)
    (sdist,) = dist.glob("*.tar.gz")
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", dist, sdist]
    subprocess.run(wheel, check=True, capture_output=True)
    (wheel,) = dist.glob("*.whl")
    return sdist, wheel


def test_wheel_has_what_users_need_beside_the_code(built):
    names = zipfile.ZipFile(built[1]).namelist()
    version = ftray.__version__
    pages = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "ftray").rglob("*.html")}
    report = {path.name for path in (REPOSITORY / "ftray" / "reports" / "template").iterdir()}
    spaces = {path.name for path in (REPOSITORY / "search_spaces").iterdir()}
    modules = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "ftray").rglob("*.py")}
    assert pages
    assert {name for name in names if name.endswith(".html")} == pages
    assert {Path(name).name for name in names if name.startswith("ftray/reports/template/")} == report
    assert {Path(name).name for name in names if "/share/ftray/search_spaces/" in name} == spaces
    assert {name for name in names if name.endswith(".py")} == modules
    assert "ftray/py.typed" in names
    assert f"ftray-{version}.dist-info/licenses/LICENSE" in names


def test_metadata_is_what_an_index_shows(built):
    wheel = zipfile.ZipFile(built[1])
    metadata = email.message_from_bytes(wheel.read(f"ftray-{ftray.__version__}.dist-info/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("ftray", ftray.__version__)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Author"] == "ftray contributors"
    assert metadata.get_payload().startswith("# ftray")
    assert set(metadata.get_all("Provides-Extra")) == set(EXTRAS)


def test_sdist_has_no_more_than_the_package(built):
    with tarfile.open(built[0]) as sdist:
        members = {Path(name).parts[1] for name in sdist.getnames() if "/" in name}
    files = {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", "setup.cfg"}
    assert members == {"ftray", "ftray.egg-info", "search_spaces"} | files


def test_files_that_pyproject_names_exist():
    setuptools = PYPROJECT["tool"]["setuptools"]
    named = [PROJECT["readme"], *PROJECT["license-files"], *PYPROJECT["tool"]["pytest"]["ini_options"]["testpaths"]]
    named += [f"{package}/{file}" for package, files in setuptools["package-data"].items() for file in files]
    named += [file for files in setuptools["data-files"].values() for file in files]
    assert [pattern for pattern in named if not list(REPOSITORY.glob(pattern))] == []
    modules = [target.split(":")[0].replace(".", "/") + ".py" for target in PROJECT["scripts"].values()]
    assert [module for module in modules if not (REPOSITORY / module).is_file()] == []


def test_licence_is_apaches_in_full():
    text = (REPOSITORY / "LICENSE").read_text()
    assert re.findall(r"^ {3}(\d)\. ", text, re.MULTILINE) == list("123456789")
    assert text.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_requirement_has_a_lower_bound_and_a_pin_that_keeps_to_it():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert lines == sorted(lines, key=str.lower)
    assert len(pins) == len(lines)
    installed_by_make = [*PROJECT["dependencies"], *EXTRAS["serve"], *EXTRAS["test"], *EXTRAS["lint"], *EXTRAS["docs"]]
    for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]:
        requirement = Requirement(line)
        pin = pins.get(canonicalize_name(requirement.name))
        assert {bound.operator for bound in requirement.specifier} & {">=", "=="}, line
        assert pin is not None or line not in installed_by_make, line
        assert pin is None or pin in requirement.specifier, line


def test_changelog_ends_its_unreleased_part_with_this_version():
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    (unreleased, undated), (version, day) = headings[:2]
    assert (unreleased, undated) == ("Unreleased", "")
    assert version == ftray.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_says_what_it_may_do_and_which_actions_it_takes(path):
    content = workflow(path.name)
    assert content["permissions"] == {"contents": "read"}  # jobs ask for more themselves
    for job in content["jobs"].values():
        uses = [job["uses"]] if "uses" in job else [step["uses"] for step in job["steps"] if "uses" in step]
        for action in uses:
            assert (REPOSITORY / action).is_file() if action.startswith("./") else re.search(r"@\S*v\d", action)
        assert set(job.get("needs", [])) <= set(content["jobs"])


def test_every_change_goes_through_ci_run_and_the_lowest_versions():
    ci = workflow("ci.yml")
    assert {"push", "pull_request", "workflow_call"} <= set(ci["on"])
    assert {".ci/run", "make docs"} <= set(commands(ci["jobs"]["check"]))
    assert "make test-lowest" in commands(ci["jobs"]["lowest"])
    assert re.search(r"^test-lowest:$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


def test_a_tag_publishes_nothing_that_ci_refuses():
    release = workflow("release.yml")
    jobs = release["jobs"]
    assert release["on"] == {"push": {"tags": ["v*"]}}
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert all("ci" in jobs[name]["needs"] and "build" in jobs[name]["needs"] for name in ("publish", "image"))
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    (pushed,) = [step["with"] for step in jobs["image"]["steps"] if "build-push-action" in step.get("uses", "")]
    assert (pushed["file"], pushed["push"]) == ("cluster/Dockerfile", "true")


@pytest.mark.parametrize(("tag", "goes_on"), [(f"v{ftray.__version__}", True), ("v999.0.0", False)])
def test_a_release_is_refused_whose_tag_is_not_the_version(tag, goes_on):
    (check,) = [line for line in commands(workflow("release.yml")["jobs"]["build"]) if "GITHUB_REF_NAME" in line]
    check = check.replace("python -c", f"{sys.executable} -c")
    code = subprocess.run(["bash", "-c", check], cwd=REPOSITORY, env={"GITHUB_REF_NAME": tag}).returncode
    assert (code == 0) is goes_on


def test_hooks_run_what_make_lint_runs():
    (local,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    makefile = (REPOSITORY / "Makefile").read_text()
    for hook in local["hooks"]:
        tool = hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude")
        assert re.search(rf"^\t\$\(BIN\)/{tool}( --check)?( \.)?$", makefile, re.MULTILINE), hook["id"]
        assert hook["language"] == "system"


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_ask_in_fields(name):
    form = yaml.safe_load((REPOSITORY / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert all(form[key] for key in ("name", "description", "labels"))
    identifiers = [field["id"] for field in form["body"]]
    assert len(set(identifiers)) == len(identifiers)
    assert all(field["attributes"]["label"] for field in form["body"])


FOLDERS = (".github", "benchmarks", "cluster", "docs", "examples", "ftray", "search_spaces", "tests")
WRITTEN = sorted(
    path
    for path in [*REPOSITORY.glob("*"), *(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*"))]
    if path.suffix in (".md", ".py", ".yaml", ".yml", ".toml", ".html") or path.name in ("Makefile", "Dockerfile")
)
PAGES = [path for path in WRITTEN if path.suffix == ".md"]


def named(pattern, paths=WRITTEN):
    """Each match of `pattern` in these files, with the file that it is in."""
    return [(path, match) for path in paths for match in re.finditer(pattern, path.read_text(encoding="utf-8"))]


def defines(file, name):
    """Whether the module `file` has something called `name`: a function, class, method, attribute or constant."""
    return re.search(
        rf"\b(def|class) {name}\b|^ *(self\.)?{name}\b[^=\n(]*=|^ *{name}: ", file.read_text(), re.MULTILINE
    )


def test_files_that_are_named_anywhere_exist():
    missing = []
    for path, match in named(rf"(?<![\w/.-])({'|'.join(FOLDERS[1:])})/[\w./-]*\w"):
        missing += [] if (REPOSITORY / match[0]).exists() else [f"{path.name}: {match[0]}"]
    for path, match in named(r"`([\w/]+\.py)`", PAGES):
        places = (REPOSITORY, path.parent, REPOSITORY / "ftray")
        missing += [] if any((place / match[1]).exists() for place in places) else [f"{path.name}: {match[1]}"]
    for path, match in named(r"\]\(([^)#:\s]+)(#[^)]*)?\)", PAGES):
        missing += [] if (path.parent / match[1]).exists() else [f"{path.name}: {match[1]}"]
    assert missing == []


def test_modules_and_what_they_define_are_called_as_text_calls_them():
    missing = []
    for path, match in named(r"(?<![\w/.-])ftray((?:\.[A-Za-z]\w*)+)(?![\w-])"):
        names, place = match[1].split(".")[1:], REPOSITORY / "ftray"
        while names and (place / names[0]).is_dir():
            place /= names.pop(0)
        if names and (place / f"{names[0]}.py").is_file():
            place /= f"{names.pop(0)}.py"
        else:
            place /= "__init__.py"
        if names and names[0] != "COMMAND" and not re.search(rf"\b{names[0]}\b", place.read_text()):
            missing.append(f"{path.name}: {match[0]}")
    modules = [path for path in WRITTEN if path.suffix == ".py"]
    for path, match in named(r":(?:func|class|meth|data):`(?!ftray\.)([\w.]+)`", modules):
        if not any(defines(module, match[1].rpartition(".")[2]) for module in modules):
            missing.append(f"{path.name}: {match[1]}")
    assert missing == []


def test_the_architecture_names_what_is_there():
    page = REPOSITORY / "docs" / "architecture.md"
    wrong = []
    for _, match in named(r"`([\w/]+\.py)`:\s+`([\w.]+)`", [page]):
        wrong += [name for name in match[2].split(".") if not defines(REPOSITORY / "ftray" / match[1], name)]
    assert wrong == []
    walks = re.findall(r"^## .*\((\d+) files\)\n((?:(?!^## ).*\n)*)", page.read_text(), re.MULTILINE)
    assert len(walks) == 3
    for count, text in walks:
        steps = "\n".join(line for line in text.splitlines() if re.match(r"\d+\. | {3,}\S", line))
        steps = re.sub(r"\[[^]]*]", "", steps)  # what the page says it does not count
        assert len(set(re.findall(r"`([\w/]+\.py)`", steps))) == int(count), text
    rooms = {name.removeprefix("ftray.") for layer in LAYERS for name in layer.split(" | ")}
    table = page.read_text().split("## A row")[0]
    held = set(re.findall(r"`(\w+)(?:/|\.py)`", table))
    assert rooms - held <= set(re.findall(r"ftray\.(\w+)", LAYERS[0]))  # commands: not each by name
    assert held <= rooms


def test_what_the_troubleshooting_page_quotes_is_what_the_code_says():
    said = []
    for path in (REPOSITORY / "ftray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    quoted = re.findall(r"^\| `(.+?)` \|", (REPOSITORY / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 40
    assert [text for text in quoted if not any(text in one for one in said)] == []
