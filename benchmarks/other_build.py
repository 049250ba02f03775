"""Another build of the installed llama.cpp, to see what a build differs by. One command, the run's table last:

    python benchmarks/other_build.py [--flags="-DGGML_NATIVE=OFF …"] [--libraries FOLDER] [options of `parity run`]

Takes the source package of the installed llama-cpp-python, compiles ggml's CPU code with other flags (one minute of processor time;
by default for SSE 4.2 only: no AVX, no FMA), puts it beside copies of the installed libraries, and runs `parity run --ref-lib` on both.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

FLAGS = "-DGGML_NATIVE=OFF -DGGML_SSE42=ON -DGGML_AVX=OFF -DGGML_AVX2=OFF -DGGML_FMA=OFF -DGGML_F16C=OFF -DGGML_BMI2=OFF"
ONLY_GGML = (
    "-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF "
    "-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_OPENSSL=OFF"
)
RUN = ["--prompt", "Once upon a time", "--points", "all"]


def sources(folder: Path) -> Path:
    """llama.cpp's sources, from the source package of the installed version."""
    wanted = f"llama-cpp-python=={version('llama-cpp-python')}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "-d", str(folder), wanted], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


def build(llama_cpp: Path, flags: str, out: Path) -> None:
    """ggml's CPU library compiled with other flags, among copies of the other libraries."""
    compiled = out.parent / "build"
    subprocess.run(
        ["cmake", "-S", llama_cpp, "-B", compiled, *shlex.split(ONLY_GGML), *shlex.split(flags)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run(["cmake", "--build", compiled, "--target", "ggml-cpu", "-j"], check=True, stdout=subprocess.DEVNULL)
    spec = find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent / "lib", out, dirs_exist_ok=True)
    other = next(path for path in compiled.rglob("libggml-cpu.so*") if not path.is_symlink())
    for name in [path.name for path in out.glob("libggml-cpu.so*")]:  # a wheel has copies where a build has links
        shutil.copyfile(other, out / name)


def main() -> int:
    """Build, run, and say how long the build took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flags", default=FLAGS)
    parser.add_argument("--libraries", type=Path, help="keep the built libraries in this folder")
    given, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = (given.libraries or Path(scratch) / "lib").absolute()
        began = time.perf_counter()
        build(sources(Path(scratch)), given.flags, out)
        print(f"built in {time.perf_counter() - began:.0f} s\n")
        command = [sys.executable, "-m", "parity", "run", *(rest or RUN), "--ref-lib", str(out)]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
