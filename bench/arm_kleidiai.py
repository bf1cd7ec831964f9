"""Count the instructions per multiply-accumulate of KleidiAI's kernels, as arm_model.py does ours.

    git clone https://github.com/ARM-software/kleidiai && python bench/arm_kleidiai.py kleidiai

KleidiAI has one scale per row of activations, so its int8 kernels compute what `w8a8` does; its
4-bit ones have groups of 32 in the weights alone, where ours have them in the activations too.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from arm_model import EMULATOR

CASES = [
    *(f"gemm_{kind}.{isa}" for kind in ("w8a8", "int4") for isa in ("dotprod", "i8mm")),
    "gemv_w8a8.dotprod",
    "gemv_int4.dotprod",
]
FOLDERS = ("matmul_clamp_f32_qai8dxp_qsi8cxp", "matmul_clamp_f32_qai8dxp_qsi4c32p")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a clone of KleidiAI")
    source = parser.parse_args().source
    if not all((source / "kai/ukernels/matmul" / name).is_dir() for name in FOLDERS):
        parser.error(f"{source} is no clone of KleidiAI")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "kleidiai")
        files = [
            file
            for name in FOLDERS
            for file in (source / "kai/ukernels/matmul" / name).glob("*neon_*")
            if file.suffix in (".c", ".S")
        ]
        objects = []
        for file in files:
            objects.append(Path(folder, file.name + ".o"))
            command = ["aarch64-linux-gnu-gcc", "-O3", "-march=armv8.2-a+dotprod+i8mm+fp16"]
            subprocess.run([*command, f"-I{source}", "-c", file, "-o", objects[-1]], check=True)
        driver = Path(__file__).with_name("arm") / "kleidiai.cpp"
        subprocess.run(
            ["aarch64-linux-gnu-g++", "-O2", "-static", driver, *objects, "-o", program],
            check=True,
        )
        for case in CASES:
            (once, macs), (twice, _) = (count(program, case, n) for n in (1, 2))
            print(f"{case:<20}{(twice - once) / macs:.4f} instructions per MAC")


def count(program: Path, case: str, repeats: int) -> tuple[int, int]:
    log = program.with_name("trace.log")
    done = subprocess.run(
        [EMULATOR, "-cpu", "max,sve=off,sme=off", "-singlestep", "-d", "exec,nochain", "-D", log,
         program, case, str(repeats)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sum(line.startswith("Trace") for line in log.open()), int(done.stdout)


if __name__ == "__main__":
    main()
