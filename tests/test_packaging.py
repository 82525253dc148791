"""What is shipped: the wheel, built from a copy of this checkout by way of the sdist, and what runs from it."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import mambacupy
from mambacupy import kernels

ROOT = Path(__file__).parent.parent


def files_of_git(*options):
    """Files of this checkout, those that git ignores left out."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Folder with what the wheel installs."""
    copy, dist, folder = (tmp_path_factory.mktemp(name) for name in ("checkout", "dist", "unpacked"))
    for name in files_of_git("--cached", "--others", "--exclude-standard"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = dist.glob("*.whl")
    assert wheel.name == f"mambacupy-{mambacupy.__version__}-py3-none-any.whl"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def dist_info(unpacked):
    return unpacked / f"mambacupy-{mambacupy.__version__}.dist-info"


def test_everything_that_runs_is_in_it_and_nothing_else(unpacked):
    code = {path.relative_to(ROOT) for path in (ROOT / "mambacupy").rglob("*.py")}
    cuda = {Path("mambacupy") / path.relative_to(ROOT) for path in (ROOT / "cuda_src").iterdir()}
    assert {path.suffix for path in cuda} == {".cu", ".cuh"}
    shipped = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert {path for path in shipped if not path.parts[0].endswith(".dist-info")} == code | cuda
    for name in code:
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()


def test_top_level(unpacked, dist_info):
    ours = {"mambacupy"}  # no cli, tests, benchmarks, examples
    assert {path.name for path in unpacked.iterdir()} == ours | {dist_info.name}
    assert (dist_info / "top_level.txt").read_text().split() == ["mambacupy"]


def test_metadata(dist_info):
    metadata = Parser().parsestr((dist_info / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Name"] == "mambacupy" and metadata["Version"] == mambacupy.__version__
    assert metadata["License-Expression"] == "MIT" and metadata.get_all("License-File") == ["LICENSE"]
    assert (dist_info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    extras = {"cuda12", "cuda13", "models", "models-cuda12", "models-cuda13", "plot", "test", "lint"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    with_cublas = {re.search(r"extra == .([\w-]+)", line)[1] for line in metadata.get_all("Requires-Dist") if "cublas" in line}
    assert with_cublas == {"models-cuda12", "models-cuda13"}  # the scan installs without it
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.match(r"\w+", line)[0] for line in needed) == ["click", "ml_dtypes", "numpy"]  # no CuPy unless asked for


RUN = """
import importlib, importlib.metadata, json, pkgutil, sys
import mambacupy
modules = [m.name for m in pkgutil.walk_packages(mambacupy.__path__, "mambacupy.") if "cuda_src" not in m.name]
for name in modules:
    importlib.import_module(name)
from mambacupy import kernels
entry = [e for e in importlib.metadata.distribution("mambacupy").entry_points if e.group == "console_scripts"]
json.dump({
    "file": mambacupy.__file__, "modules": modules, "sources": str(kernels.source_folder()), "digest": kernels.digest(),
    "text": kernels.read_source("selective_scan_fwd.cu"), "entry": [(e.name, e.value, callable(e.load())) for e in entry],
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def found(unpacked, tmp_path_factory):
    """What a Python sees that has the unpacked wheel and not this checkout."""
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, cwd=elsewhere, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_come_out_of_the_wheel(unpacked, found):
    assert Path(found["file"]).parent.samefile(unpacked / "mambacupy")
    assert Path(found["sources"]).samefile(unpacked / "mambacupy" / "cuda_src")
    assert found["digest"] == kernels.digest()
    assert found["text"] == kernels.read_source("selective_scan_fwd.cu")


def test_modules_and_the_command(found):
    assert {"mambacupy.cli", "mambacupy.ops.selective_scan"} <= set(found["modules"])
    assert found["entry"] == [["mambacupy", "mambacupy.cli:main", True]]


def test_no_file_names_a_place_of_one_machine():
    places = re.compile(rb"(?<![\w.])/(?:tmp|work|root|home|Users|mnt)/")
    contents = {name: (ROOT / name).read_bytes() for name in files_of_git()}
    texts = {name: content for name, content in contents.items() if b"\0" not in content}
    assert "pyproject.toml" in texts
    assert [name for name, content in texts.items() if places.search(content)] == []
