"""Model the speed of the ARM kernels' inner loops: `make arm-model`.

Builds the kernels for aarch64, runs each on random numbers under qemu one instruction at a time,
and takes from the trace the loop that executes most: the instructions that really run, whatever
the compiler made of the source. llvm-mca then estimates the cycles of that loop on several cores,
as if all data were in the first-level cache. Nothing here is a measurement of a processor.

`--check` compares with the stored table (`bench/arm/model.json`) and fails where a loop became
slower; `--update` replaces what was run.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STORED = Path(__file__).with_name("arm") / "model.json"
CORES = ("cortex-a55", "neoverse-n1", "neoverse-n2", "neoverse-v1", "neoverse-v2")
# The cores that each table is modelled on: those whose best it is, and those that can run it.
TABLES = {
    "neon": CORES[:2],
    "dotprod": CORES,
    "i8mm": ("neoverse-n2", "neoverse-v1", "neoverse-v2"),
}
CASES = ("gemm_w8a8", "gemm_int8", "gemm_int4", "gemv_w8a8", "gemv_int8", "gemv_int4",
         "gemv_int4_sym")  # fmt: skip
# Multiply-accumulates of one instruction on 128-bit registers.
PRODUCTS = {"sdot": 16, "smmla": 32, "smull": 8, "smull2": 8, "smlal": 8, "smlal2": 8}
EMULATOR = "qemu-aarch64-static"
TOLERANCE = 0.02  # llvm-mca and compilers are deterministic; another version may differ a little
MAX_LOOP = 4000  # instructions
ITERATIONS = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "arm-model")
    parser.add_argument("--mca", default=shutil.which("llvm-mca-19") or "llvm-mca")
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--table", action="append", choices=TABLES)
    parser.add_argument("--show", action="store_true", help="print the instructions of each loop")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--update", action="store_true")
    options = parser.parse_args()

    program = build(options.build)
    listing = disassemble(program)
    results = {}
    for table in options.table or TABLES:
        for case in options.case or CASES:
            trace, macs = trace_of(program, table, case)
            loop = hottest_loop(trace)
            if options.show:
                print(f"--- {table} {case}", *(listing[pc] for pc in loop), sep="\n")
            results[f"{table} {case}"] = model(options.mca, listing, loop, table) | {
                "instructions_per_mac": round(len(trace) / macs, 4)
            }
    print(report(results))
    if options.update:
        stored = json.loads(STORED.read_text()) | results
        names = [f"{table} {case}" for table in TABLES for case in CASES]
        kept = {name: stored[name] for name in names if name in stored}
        STORED.write_text(json.dumps(kept, indent=1) + "\n")
    return check(results) if options.check else 0


def build(folder: Path) -> Path:
    """Cross-compile the kernels as they are shipped, and the program that calls them."""
    program = folder / "mlf-arm-loops"
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DMLF_PYTHON=OFF", "-DMLF_ARM_MODEL=ON"]
    configure += [f"-DCMAKE_TOOLCHAIN_FILE={ROOT}/cmake/aarch64-linux-gnu.cmake"]
    for command in (configure, ["cmake", "--build", folder, "--target", program.name, "-j2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-4000:] + done.stderr[-4000:])
    return program


def disassemble(program: Path) -> dict[int, str]:
    """Map addresses to instructions."""
    text = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", program],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    lines = re.findall(r"^ *([0-9a-f]+):\t(.*?)(?: *//.*)?$", text, re.M)
    return {int(address, 16): instruction for address, instruction in lines}


def trace_of(program: Path, table: str, case: str) -> tuple[list[int], int]:
    """Return the addresses executed by one call of a kernel, and its multiply-accumulates."""

    def run(repeats: int) -> tuple[list[int], int]:
        log = program.with_name("trace.log")
        done = subprocess.run(
            [EMULATOR, "-cpu", "max,sve=off,sme=off", "-singlestep", "-d", "exec,nochain",
             "-D", log, program, table, case, str(repeats)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        addresses = re.findall(r"^Trace [^[]*\[[0-9a-f]+/([0-9a-f]+)/", log.read_text(), re.M)
        log.unlink()
        return [int(address, 16) for address in addresses], int(done.stdout)

    once, macs = run(1)
    twice, _ = run(2)
    # What a second call adds; the program ends alike, and its start is no loop of products.
    extra = len(twice) - len(once)
    same = next(i for i in range(len(once)) if once[-1 - i] != twice[-1 - i])
    return twice[len(twice) - same - extra : len(twice) - same], macs


def hottest_loop(trace: list[int]) -> tuple[int, ...]:
    """Return the addresses of one turn of the innermost loop that takes most of the trace."""
    heads = {b for a, b in pairwise(trace) if b <= a}
    turns: Counter[tuple[int, ...]] = Counter()
    last: dict[int, int] = {}
    for i, pc in enumerate(trace):
        if pc not in heads:
            continue
        begin = last.get(pc)
        if begin is not None and i - begin <= MAX_LOOP:
            turn = tuple(trace[begin:i])
            if len(set(turn)) == len(turn):  # no loop inside
                turns[turn] += 1
        last[pc] = i
    return max(turns, key=lambda turn: turns[turn] * len(turn))


def model(mca: str, listing: dict[int, str], loop: tuple[int, ...], table: str) -> dict:
    """Return what llvm-mca says about a loop on each core of a table."""
    instructions = [listing[pc] for pc in loop]
    names = [text.split("\t")[0] for text in instructions]
    macs = sum(PRODUCTS.get(name, 0) for name in names)
    loads = sum(16 * load_registers(text) for text in instructions)
    cores = {}
    for core in TABLES[table]:
        cycles = mca_cycles(mca, core, table, [plain(text) for text in instructions])
        peak = peak_of(mca, core, table)
        cores[core] = {
            "macs_per_cycle": round(macs / cycles, 2),
            "of_peak": round(macs / cycles / peak, 3),
            "loaded_bytes_per_cycle": round(loads / cycles, 1),
        }
    spills = sum("[sp" in text and " q" in text.replace("\t", " ") for text in instructions)
    return {"instructions": len(loop), "macs": macs, "stack_accesses": spills, "cores": cores}


def load_registers(text: str) -> int:
    """How many 128-bit registers an instruction loads."""
    name, _, operands = text.partition("\t")
    if name == "ldp" and operands.startswith("q"):
        return 2
    return int(name == "ldr" and operands.startswith("q"))


def plain(text: str) -> str:
    """An instruction as an assembler takes it: targets of jumps do not matter."""
    name, _, operands = text.partition("\t")
    if name.startswith(("b.", "cb", "tb")) or name in ("b", "bl"):
        operands = re.sub(r"[0-9a-f]+ <.*>$", ".", operands)
    if name == "adrp":
        operands = operands.split(",")[0] + ", ."
    return f"{name} {operands}"


def mca_cycles(mca: str, core: str, table: str, instructions: list[str]) -> float:
    """Cycles per turn of a loop in its steady state."""
    # The a55 of llvm-mca lacks no instruction that we use; attributes only let it read them.
    features = {"neon": "", "dotprod": "+dotprod", "i8mm": "+dotprod,+i8mm"}[table]

    def cycles(iterations: int) -> int:
        done = subprocess.run(
            [mca, "-mtriple=aarch64-linux-gnu", f"-mcpu={core}", f"-mattr={features}",
             f"-iterations={iterations}"],
            input="\n".join(instructions) + "\n", capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        return int(re.search(r"Total Cycles: +(\d+)", done.stdout)[1])

    return (cycles(2 * ITERATIONS) - cycles(ITERATIONS)) / ITERATIONS


_peaks: dict[tuple[str, str], float] = {}


def peak_of(mca: str, core: str, table: str) -> float:
    """Multiply-accumulates per cycle of products alone: 24 independent chains."""
    if (core, table) not in _peaks:
        product = {"neon": None, "dotprod": "sdot v{}.4s, v30.16b, v31.4b[1]"}.get(
            table, "smmla v{}.4s, v30.16b, v31.16b"
        )
        if product is None:  # two products and their sum, as pairs of bytes allow
            chain = "smull v{0}.8h, v30.8b, v31.8b\nsmlal v{0}.8h, v29.8b, v31.8b\n"
            chain += "sadalp v{1}.4s, v{0}.8h"
            lines = "\n".join(chain.format(i, i + 12) for i in range(12)).split("\n")
            macs = 12 * 16
        else:
            lines = [product.format(i) for i in range(24)]
            macs = 24 * PRODUCTS[product.split()[0]]
        _peaks[core, table] = macs / mca_cycles(mca, core, table, lines)
    return _peaks[core, table]


def report(results: dict) -> str:
    lines = ["modelled by llvm-mca, data in the first-level cache; MAC/cycle (% of the peak)"]
    cores = "".join(f"{core:>19}" for core in CORES)
    lines.append(f"{'table, loop':<20}{'instr/MAC':>10}{'spills':>7}{cores}")
    for name, result in results.items():
        cells = "".join(
            f"{c['macs_per_cycle']:>11.1f} ({100 * c['of_peak']:3.0f}%) " if c else " " * 19
            for c in map(result["cores"].get, CORES)
        )
        lines.append(
            f"{name:<20}{result['instructions_per_mac']:>10.4f}{result['stack_accesses']:>7}{cells}"
        )
    return "\n".join(lines)


def check(results: dict) -> int:
    """Compare with what is stored; print what became worse and return how much did."""
    worse = 0
    for name, stored in json.loads(STORED.read_text()).items():
        got = results.get(name)
        if not got:
            continue
        pairs = [("instructions_per_mac", got["instructions_per_mac"],
                  stored["instructions_per_mac"] * (1 + TOLERANCE))]  # fmt: skip
        for core, values in stored["cores"].items():
            least = values["macs_per_cycle"] * (1 - TOLERANCE)
            pairs.append((f"cycles per MAC on {core}",
                          1 / got["cores"][core]["macs_per_cycle"], 1 / least))  # fmt: skip
        for what, value, limit in pairs:
            if value > limit:
                worse += 1
                print(f"{name}: {what} must be at most {limit:.4f}, got {value:.4f}")
    return min(worse, 1)


if __name__ == "__main__":
    sys.exit(main())
