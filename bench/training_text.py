"""Writes the text that the tiny models are trained on: Jane Austen's six novels.

    python bench/training_text.py austen.txt

The novels, published from 1811 to 1818, are in the public domain. They come in Debian's package
`r-cran-janeaustenr` (MIT, from Project Gutenberg's texts), as R strings: one per line of print.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "r-cran-janeaustenr"
DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata"
CHARACTERS, STRINGS = 9, 16  # R's type codes, see "Serialization Formats" in R Internals


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the text file to write")
    parser.add_argument(
        "--deb", type=Path, help=f"{PACKAGE}_*.deb, else `apt-get download` gets it"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        deb = args.deb.resolve() if args.deb else download(Path(folder))
        subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
        data = (Path(folder) / f"{DATA}.rdb").read_bytes()
    novels = [paragraphs(lines) for lines in string_vectors(data) if len(lines) > 1000]
    text = "\n\n".join(sorted(novels))
    args.out.write_text(text, encoding="utf-8")
    print(f"{len(novels)} novels, {len(text)} characters", file=sys.stderr)


def download(folder: Path) -> Path:
    """Fetch the package with apt."""
    subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=folder, check=True)
    return next(folder.glob(f"{PACKAGE}_*.deb"))


def string_vectors(data: bytes) -> Iterator[list[str]]:
    """Yield the character vectors of an R database: zlib streams behind 4 bytes of length each."""
    start = 0
    while start < len(data):
        stream = zlib.decompressobj()
        value = stream.decompress(data[start + 4 :])
        start = len(data) - len(stream.unused_data)
        encoding_size = int.from_bytes(value[14:18], "big")
        at = 18 + encoding_size
        kind, count = (int.from_bytes(value[at + i : at + i + 4], "big") for i in (0, 4))
        if kind & 0xFF != STRINGS:
            continue
        at += 8
        strings = []
        for _ in range(count):
            size = int.from_bytes(value[at + 4 : at + 8], "big")
            assert value[at + 3] == CHARACTERS
            strings.append(value[at + 8 : at + 8 + size].decode("utf-8"))
            at += 8 + size
        yield strings


def paragraphs(lines: list[str]) -> str:
    """Join the lines of print; a blank line ends a paragraph."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines))
    text = "\n".join(" ".join(block.split()) for block in blocks if block.strip())
    # the texts mark emphasis with underscores, and some have their quotes doubled by backticks
    return text.replace("_", "").replace("``", '"').replace("''", '"')


if __name__ == "__main__":
    main()
