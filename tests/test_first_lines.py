"""The ten minutes of docs/your-engine.md, followed: its fprintf in a C engine, and what lint and run say about the bare lines."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cli import Cli

GCC = shutil.which("gcc")
PAGE = Path(__file__).parent.parent / "docs" / "your-engine.md"
# The engine of the emitter's test, with the page's function in the emitter's place.
HEADER = """
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
{snippet}
typedef FILE parity_dump;
#define parity_open(path) fopen(path, "w")
#define parity_header(...) ((void)0)
#define parity_checkpoint(out, name, position, x, type, n) checkpoint(out, name, (int)(position), x, (int)(n))
#define parity_only(...) ((void)0)
#define parity_inject(...) ((void)0)
#define parity_close(out) fclose(out)
#define parity_error(out) ""
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    snippet = re.search(r"```c\n(static void checkpoint.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert snippet is not None
    (folder / "parity_dump.h").write_text(HEADER.replace("{snippet}", snippet[1]))
    program = folder / "engine"
    source = Path(__file__).with_name("foreign_engine.c")
    flags = ("-std=c99", "-O2", f"-I{folder}")
    shutil.copy(source, folder / source.name)
    subprocess.run([str(GCC), *flags, str(folder / source.name), "-o", str(program), "-lm"], check=True)
    return program


@pytest.mark.slow
@pytest.mark.skipif(GCC is None, reason="there is no gcc")
def test_bare_lines_lead_to_a_verdict(engine: Path, parity: Cli) -> None:
    """A right engine is parity by exact limits, swapped buffers are faults of the records, and a wrong RoPE diverges from position 1 on."""

    def run(fault: str) -> tuple[str, ...]:
        return (
            "run",
            "--exec",
            f"{engine} {{model}} {{tokens}} /dev/stdout {fault}",
            "--prompt",
            "Once upon a time",
            "--compute",
            "f32",
        )

    code, answer = parity.json(*run(""))
    assert (code, answer["verdict"], answer["limit"]) == (0, "parity", 1e-10)
    assert any("NMSE of embd 0 there" in note for note in answer["notes"])
    code, answer = parity.json(*run("swap"))
    assert (code, answer["verdict"]) == (0, "parity")
    assert "blk.1.l_out" in {fault["checkpoint"] for fault in answer["record_faults"]}
    code, answer = parity.json(*run("rope"))
    assert code == 1
    assert (answer["first_divergence"]["checkpoint"], answer["first_divergence"]["token_idx"]) == ("blk.0.l_out", 1)
    assert answer["pattern"]["code"] == "from-position-1"
