"""
What it would cost to build the C++ once, for wheels, instead of where it runs: one kernel, the matrix product.

``matmul.h`` is compiled twice as it is: with torch's headers for the processor that is here, and with the vector type
below, which needs no part of torch, for any processor with AVX-512 (or AVX2). Both are called through a plain C
function, by turns, with one thread. Writes ``results/portable_kernel.json``.
"""

import argparse
import ctypes
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from record import RESULTS, write_json

from sb3_softsac.execution.cpp import build, matmul

KERNEL = """
#include "matmul.h"
extern "C" void product(const float* a, int64_t rows, int64_t depth, const float* b, int64_t columns,
                        int64_t transposed, float* c) {
  const Matrix right = transposed ? Matrix(b, depth, columns, 1, depth) : Matrix(b, depth, columns, columns, 1);
  rows_of_product(Matrix(a, rows, depth, depth, 1), right, Epilogue{}, 0, rows, c);
}
"""
TENSOR = """
#include <cstdint>
namespace at {
struct Tensor {
  template <typename T> const T* const_data_ptr() const { return nullptr; }
  int64_t size(int) const { return 0; }
  int64_t stride(int) const { return 0; }
};
}
"""
VECTOR = """
#include <cstdint>
#include <cstring>
namespace at::vec {
#ifdef __AVX512F__
constexpr int64_t LANES_ = 16;
#else
constexpr int64_t LANES_ = 8;
#endif
template <typename T> struct Vectorized;
template <> struct Vectorized<float> {
  typedef float Floats __attribute__((vector_size(LANES_ * 4)));
  typedef float Unaligned __attribute__((vector_size(LANES_ * 4), aligned(4), may_alias));
  typedef int32_t Mask __attribute__((vector_size(LANES_ * 4)));
  Floats v;
  static constexpr int64_t size() { return LANES_; }
  Vectorized() : v{} {}
  Vectorized(Floats v) : v(v) {}
  explicit Vectorized(float x) : v(x - Floats{}) {}
  static Vectorized loadu(const float* p) { return Floats(*(const Unaligned*)p); }
  static Vectorized loadu(const float* p, int64_t n) {
    if (n == LANES_) return loadu(p);
    Floats some{};
    std::memcpy(&some, p, n * 4);
    return some;
  }
  void store(float* p) const { *(Unaligned*)p = v; }
  void store(float* p, int64_t n) const { n == LANES_ ? store(p) : (void)std::memcpy(p, &v, n * 4); }
  static Vectorized blendv(Vectorized a, Vectorized b, Mask mask) { return mask ? b.v : a.v; }
  friend Vectorized operator+(Vectorized a, Vectorized b) { return a.v + b.v; }
  friend Mask operator<=(Vectorized a, Vectorized b) { return a.v <= b.v; }
};
using V = Vectorized<float>;
inline V fmadd(V a, V b, V c) { return a.v * b.v + c.v; }
inline V clamp_min(V a, V b) { return a.v < b.v ? b.v : a.v; }
template <typename T, int M, int K> void transpose_mxn(const float* in, int64_t in_row, float* out, int64_t out_row) {
  for (int i = 0; i < M; i++) for (int j = 0; j < K; j++) out[j * out_row + i] = in[i * in_row + j];
}
}
"""
CASES = {  # rows, depth, columns, whether the right matrix is transposed, as in forward passes
    "hidden layer": (256, 256, 256, True),
    "its backward pass": (256, 256, 256, False),
    "first layer, HalfCheetah": (256, 23, 256, True),
    "first layer, Humanoid": (256, 365, 256, True),
    "gradient of actions": (256, 256, 17, False),
}


def libraries(folder: Path) -> dict[str, ctypes.CDLL]:
    """
    :param folder: for what is compiled
    :return: the product with torch's headers, and without
    """
    (folder / "kernel.cpp").write_text(KERNEL)
    for name, text in (("core/Tensor.h", TENSOR), ("cpu/vec/vec.h", VECTOR), ("cpu/vec/functional.h", "")):
        path = folder / "portable" / "ATen" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#pragma once\n{text}")
    torch_folder = Path(th.__file__).parent
    capability = th.backends.cpu.get_cpu_capability()
    instructions = {
        "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
        "AVX2": ["-mavx2", "-mfma"],
    }
    includes = [f"-I{torch_folder / name}" for name in ("include", "include/torch/csrc/api/include")]
    with_torch = [
        *build.FLAGS,
        f"-DCPU_CAPABILITY_{capability}",
        *includes,
        f"-L{torch_folder / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]
    flags = [flag for flag in build.FLAGS if flag not in ("-march=native", "-fopenmp", "-ffp-contract=off")]
    portable = [*flags, "-ffp-contract=fast", *instructions[capability], f"-I{folder / 'portable'}"]
    found = {}
    for name, options in (("torch", with_torch), ("portable", portable)):
        path = folder / f"{name}.so"
        sources = [str(folder / "kernel.cpp"), f"-I{matmul.HEADER.parent}"]
        subprocess.run([build.compiler(), *sources, *options, "-o", str(path)], check=True)
        found[name] = ctypes.CDLL(str(path))
    return found


def measure(library: dict[str, ctypes.CDLL], case: tuple[int, int, int, bool], rounds: int) -> dict[str, Any]:
    """
    :param library: the two
    :param case: see ``CASES``
    :param rounds: of some calls of each
    :return: medians of microseconds and of the ratio, and whether the results are the same
    """
    rows, depth, columns, transposed = case
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, depth), (depth, columns)))
    right = np.ascontiguousarray(b.T) if transposed else b
    out = {name: np.zeros((rows, columns), np.float32) for name in library}
    seconds: dict[str, list[float]] = {name: [] for name in library}
    for _ in range(rounds):
        for name, each in library.items():
            args = [a.ctypes.data, rows, depth, right.ctypes.data, columns, int(transposed), out[name].ctypes.data]
            values = [ctypes.c_int64(value) for value in args]
            start = time.perf_counter()
            for _ in range(4):
                each.product(*values)
            seconds[name].append((time.perf_counter() - start) / 4)
    np.testing.assert_allclose(out["torch"], a @ b, rtol=1e-3, atol=1e-3)
    return {
        **{f"{name}_us": round(1e6 * float(np.median(some)), 1) for name, some in seconds.items()},
        "ratio": round(float(np.median(np.divide(seconds["portable"], seconds["torch"]))), 3),
        "same_bits": bool(np.array_equal(out["torch"], out["portable"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000, help="of each case")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = libraries(Path(folder))
        results = {name: measure(library, case, args.rounds) for name, case in CASES.items()}
    for name, result in results.items():
        print(name, result)
    write_json(RESULTS / "portable_kernel.json", capability=th.backends.cpu.get_cpu_capability(), results=results)


if __name__ == "__main__":
    main()
