// Products of float32 matrices of the sizes that an update has, see matmul.py.
//
// The way is that of Goto and van de Geijn (2008), "Anatomy of high-performance matrix multiplication": a panel of the
// right matrix is packed so that it stays in the nearest caches, and tiles of the output stay in registers.

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
constexpr int TALLEST = LANES >= 16 ? 12 : 6;  // rows of a tile: twice as many vectors fit into the registers
constexpr int64_t WIDTH = 2 * LANES;           // columns of a panel
constexpr int64_t DEPTH = 512;                 // rows of a panel
constexpr int64_t MIN_WORK = 65536;            // multiplications that are worth a thread

struct Matrix {
  const float* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix(const float* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride)
      : data(data), rows(rows), columns(columns), row_stride(row_stride), column_stride(column_stride) {}

  explicit Matrix(const Tensor& tensor)
      : data(tensor.const_data_ptr<float>()),
        rows(tensor.size(0)),
        columns(tensor.size(1)),
        row_stride(tensor.stride(0)),
        column_stride(tensor.stride(1)) {}

  const float* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

// What is done to sums when they are complete: they are scaled, and get a layer's bias and relu, or the gradient of the
// relu that made a matrix
struct Epilogue {
  const float* scale = nullptr;    // of the panel's first column, or null
  const float* bias = nullptr;     // the same
  const float* relu_of = nullptr;  // an element of it for each one of the output, or null
  bool relu = false;
  bool adds = false;  // the product to what is there; this is done first
};

// Copies rows [row, row + depth) and columns [column, column + width) to panel[depth][WIDTH]. Flattened, since torch's
// transposition takes half the time when its sizes are known to the compiler
[[gnu::flatten]] void pack(const Matrix& b, int64_t row, int64_t depth, int64_t column, int64_t width, float* panel) {
  for (int64_t j = 0; j < width; j += LANES) {
    const int64_t n = std::min(LANES, width - j);
    if (b.column_stride == 1) {
      for (int64_t k = 0; k < depth; k++) {
        Vec::loadu(b.at(row + k, column + j), n).store(panel + k * WIDTH + j);
      }
      continue;
    }
    int64_t k = 0;
    for (; b.row_stride == 1 && n == LANES && k + LANES <= depth; k += LANES) {
      at::vec::transpose_mxn<float, LANES, LANES>(
          b.at(row + k, column + j), b.column_stride, panel + k * WIDTH + j, WIDTH);
    }
    for (; k < depth; k++) {
      for (int64_t i = 0; i < n; i++) panel[k * WIDTH + j + i] = *b.at(row + k, column + j + i);
    }
  }
}

// c[R][width] (+)= a[R][depth] panel[depth][width]; VECTORS of LANES columns hold width.
template <int R, int VECTORS>
void tile(const float* a, int64_t a_row, int64_t a_column, const float* panel, int64_t depth, float* c, int64_t c_row,
          int64_t width, const Epilogue& epilogue) {
  for (int v = 0; v < VECTORS; v++) {
    for (int r = 0; r < R; r++) __builtin_prefetch(c + r * c_row + v * LANES, 1);  // stores need not wait then
  }
  Vec sums[R][VECTORS];
  int64_t n[VECTORS];
  for (int v = 0; v < VECTORS; v++) {
    n[v] = std::min(LANES, width - v * LANES);
    for (int r = 0; r < R; r++) sums[r][v] = epilogue.adds ? Vec::loadu(c + r * c_row + v * LANES, n[v]) : Vec(0.0f);
  }
  for (int64_t k = 0; k < depth; k++) {
    Vec right[VECTORS];
    for (int v = 0; v < VECTORS; v++) right[v] = Vec::loadu(panel + k * WIDTH + v * LANES);
    for (int r = 0; r < R; r++) {
      const Vec left(a[r * a_row + k * a_column]);
      for (int v = 0; v < VECTORS; v++) sums[r][v] = at::vec::fmadd(left, right[v], sums[r][v]);
    }
  }
  const Vec zero(0.0f);
  for (int v = 0; v < VECTORS; v++) {
    const Vec bias = epilogue.bias ? Vec::loadu(epilogue.bias + v * LANES, n[v]) : zero;
    const Vec scale = epilogue.scale ? Vec::loadu(epilogue.scale + v * LANES, n[v]) : Vec(1.0f);
    for (int r = 0; r < R; r++) {
      Vec sum = at::vec::fmadd(sums[r][v], scale, bias);
      if (epilogue.relu) sum = at::vec::clamp_min(sum, zero);
      if (epilogue.relu_of) {
        const Vec made = Vec::loadu(epilogue.relu_of + r * c_row + v * LANES, n[v]);
        sum = Vec::blendv(sum, zero, made <= zero);
      }
      sum.store(c + r * c_row + v * LANES, n[v]);
    }
  }
}

// Rows [begin, end) of a panel's columns, in tiles that are as tall as possible.
template <int R, int VECTORS>
void tiles(const Matrix& a, int64_t begin, int64_t end, int64_t first, const float* panel, int64_t depth, float* c,
           int64_t c_row, int64_t width, Epilogue epilogue) {
  const float* relu_of = epilogue.relu_of;
  for (; begin + R <= end; begin += R) {
    epilogue.relu_of = relu_of ? relu_of + begin * c_row : nullptr;
    tile<R, VECTORS>(a.at(begin, first), a.row_stride, a.column_stride, panel, depth, c + begin * c_row, c_row, width,
                     epilogue);
  }
  epilogue.relu_of = relu_of;
  if constexpr (R > 1) {
    tiles<(R + 1) / 2, VECTORS>(a, begin, end, first, panel, depth, c, c_row, width, epilogue);
  }
}

// Asks for what pack() will read, at once instead of line by line
void prefetch(const Matrix& b, int64_t row, int64_t depth, int64_t column, int64_t width) {
  const int64_t lines = 64 / sizeof(float);
  if (b.column_stride == 1) {
    for (int64_t k = row; k < row + depth; k++) {
      for (int64_t j = column; j < column + width; j += lines) __builtin_prefetch(b.at(k, j));
    }
  } else if (b.row_stride == 1) {
    for (int64_t j = column; j < column + width; j++) {
      for (int64_t k = row; k < row + depth; k += lines) __builtin_prefetch(b.at(k, j));
    }
  }
}

void rows_of_product(const Matrix& a, const Matrix& b, const Epilogue& whole, int64_t begin, int64_t end, float* c) {
  alignas(64) static thread_local float panel[DEPTH * WIDTH];
  for (int64_t k = 0; k == 0 || k < a.columns; k += DEPTH) {
    const int64_t depth = std::min(DEPTH, a.columns - k);
    for (int64_t j = 0; j < b.columns; j += WIDTH) {
      const int64_t width = std::min(WIDTH, b.columns - j);
      pack(b, k, depth, j, width, panel);
      if (j + WIDTH < b.columns) prefetch(b, k, depth, j + WIDTH, std::min(WIDTH, b.columns - j - WIDTH));
      Epilogue epilogue;
      if (k + depth == a.columns) {
        epilogue = {whole.scale ? whole.scale + j : nullptr, whole.bias ? whole.bias + j : nullptr,
                    whole.relu_of ? whole.relu_of + j : nullptr, whole.relu};
      }
      epilogue.adds = whole.adds || k > 0;
      const auto run = width > LANES ? tiles<TALLEST, 2> : tiles<TALLEST, 1>;
      run(a, begin, end, k, panel, depth, c + j, b.columns, width, epilogue);
    }
  }
}

}  // namespace
