"""The passes of native.cpp compiled otherwise than for this processor's best."""

import ctypes
import subprocess
from pathlib import Path

from planish.quant.kernels.native import FLAGS, SOURCE, found

NO_AVX512 = ("-mno-avx512f",)


def compiled(folder: Path, *options: str) -> ctypes.CDLL:
    """The library with these options of the compiler besides."""
    made = folder / "native.so"
    compiler = found().why.rpartition(" ")[2]
    subprocess.run([compiler, *FLAGS, *options, str(SOURCE), "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))
