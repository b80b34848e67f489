// Checks the baseline kernels against plain loops in double precision, without torch and Python: for processors that are emulated.
// `make test-arm` compiles it for aarch64 and runs it under qemu. Prints what failed; exit status 1 if anything did.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "api.h"

namespace baseline {
extern const KernelTable table;
}

namespace {

using std::int64_t;
std::mt19937 generator(0);
int failures = 0, checks = 0;

double uniform() { return std::uniform_real_distribution<double>(-1, 1)(generator); }

double number(float x) { return x; }
double number(double x) { return x; }
double number(Bf16 x) {
  const std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

template <class T>
T narrowed(double x) {
  return T(x);
}
template <>
Bf16 narrowed<Bf16>(double x) {
  const float value = float(x);
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {std::uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class T>
constexpr double kRounding = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24;  // of sums
template <class T>
constexpr double kStored = sizeof(T) == 2 ? 0x1p-8 : 0;  // of results that are narrower than sums

template <class T>
std::vector<T> random(int64_t count) {
  std::vector<T> result(static_cast<std::size_t>(count));
  for (T& x : result) x = narrowed<T>(uniform());
  return result;
}

template <class T>
std::vector<T> poisoned(int64_t count) {
  return std::vector<T>(static_cast<std::size_t>(count), narrowed<T>(NAN));
}

// A result and a bound of its rounding: `terms` sums of products whose absolute values add up to `size`.
struct Exact {
  std::vector<double> value, size;
  explicit Exact(int64_t count) : value(std::size_t(count)), size(std::size_t(count)) {}
  void add(int64_t at, double x) {
    value[std::size_t(at)] += x;
    size[std::size_t(at)] += std::fabs(x);
  }
};

template <class T>
void compare(const char* what, const std::string& about, const std::vector<T>& found, const Exact& exact, double terms) {
  ++checks;
  for (std::size_t i = 0; i < found.size(); ++i) {
    double bound = (terms + 8) * kRounding<T> * exact.size[i];
    bound += kStored<T> * (std::fabs(exact.value[i]) + bound);
    if (std::fabs(number(found[i]) - exact.value[i]) <= bound) continue;
    std::printf("%s, %s: [%zu] is %g, not %g\n", what, about.c_str(), i, number(found[i]), exact.value[i]);
    ++failures;
    return;
  }
}

// The live blocks of a random mask, as BlockIndex lists them
struct Index {
  std::vector<std::int32_t> crow{0}, col, row, slot, ccol, order;
  int64_t m1, n1;

  Index(int64_t m1, int64_t n1, double density) : m1(m1), n1(n1) {
    for (int64_t p = 0; p < m1; ++p) {
      for (int64_t q = 0; q < n1; ++q)
        if ((uniform() + 1) / 2 < density) {
          row.push_back(std::int32_t(p));
          col.push_back(std::int32_t(q));
        }
      crow.push_back(std::int32_t(col.size()));
    }
    for (std::size_t k = 0; k < col.size(); ++k) slot.push_back(std::int32_t(col.size() - 1 - k));
    ccol.push_back(0);
    for (int64_t q = 0; q < n1; ++q) {
      for (std::size_t k = 0; k < col.size(); ++k)
        if (col[k] == q) order.push_back(std::int32_t(k));
      ccol.push_back(std::int32_t(order.size()));
    }
  }

  PackedIndex of(int64_t bm, int64_t bn) const {
    return {crow.data(), col.data(), row.data(), slot.data(), ccol.data(), order.data(), m1, n1, bm, bn};
  }
};

struct Case {
  int64_t rows, m1, n1, bm, bn, rank, groups;
  double density;
  int threads;
  std::string text() const {
    char line[160];
    std::snprintf(line, sizeof line, "rows %d, grid %dx%d of %dx%d, rank %d, banks %d, density %g, %d threads", int(rows), int(m1),
                  int(n1), int(bm), int(bn), int(rank), int(groups), density, threads);
    return line;
  }
};

template <class T>
void check_packed(const Kernels<T>& kernels, const Case& c) {
  const Index index(c.m1, c.n1, c.density);
  const PackedIndex where = index.of(c.bm, c.bn);
  const int64_t m = c.m1 * c.bm, n = c.n1 * c.bn, area = c.bm * c.bn, live = int64_t(index.col.size());
  const auto x = random<T>(c.rows * n), dy = random<T>(c.rows * m), values = random<T>(live * area), bias = random<T>(m);
  auto y = poisoned<T>(c.rows * m), dx = poisoned<T>(c.rows * n), dvalues = poisoned<T>(live * area);
  kernels.packed_linear(where, x.data(), c.rows, values.data(), bias.data(), y.data(), c.threads);
  kernels.packed_grad_input(where, dy.data(), c.rows, values.data(), dx.data(), c.threads);
  kernels.packed_grad_values(where, dy.data(), x.data(), c.rows, dvalues.data(), live, c.threads);
  Exact exact_y(c.rows * m), exact_dx(c.rows * n), exact_dvalues(live * area);
  for (int64_t t = 0; t < c.rows; ++t) {
    for (int64_t o = 0; o < m; ++o) exact_y.add(t * m + o, number(bias[std::size_t(o)]));
    for (int64_t k = 0; k < live; ++k)
      for (int64_t a = 0; a < c.bm; ++a)
        for (int64_t b = 0; b < c.bn; ++b) {
          const int64_t out = t * m + index.row[std::size_t(k)] * c.bm + a, in = t * n + index.col[std::size_t(k)] * c.bn + b;
          const int64_t at = index.slot[std::size_t(k)] * area + a * c.bn + b;
          const double w = number(values[std::size_t(at)]), g = number(dy[std::size_t(out)]), i = number(x[std::size_t(in)]);
          exact_y.add(out, w * i);
          exact_dx.add(in, w * g);
          exact_dvalues.add(at, g * i);
        }
  }
  compare("y", c.text(), y, exact_y, double(n + 1));
  compare("dx", c.text(), dx, exact_dx, double(m));
  compare("dvalues", c.text(), dvalues, exact_dvalues, double(c.rows));
}

template <class T>
void check_factored(const Kernels<T>& kernels, const Case& c, bool tile_first) {
  if (!kernels.kron_linear) return;  // computed in another type
  const KronShape shape{c.m1, c.n1, c.bm, c.bn, c.rank, c.groups};
  const int64_t m = c.m1 * c.bm, n = c.n1 * c.bn, area = c.bm * c.bn;
  const auto x = random<T>(c.rows * n), dy = random<T>(c.rows * m), bias = random<T>(m);
  const auto coeff = random<T>(c.m1 * c.n1 * c.rank), tiles = random<T>(c.groups * c.rank * area);
  std::vector<std::uint8_t> alive(std::size_t(c.m1 * c.n1));
  for (auto& each : alive) each = (uniform() + 1) / 2 < c.density;
  auto y = poisoned<T>(c.rows * m), dx = poisoned<T>(c.rows * n);
  auto dcoeff = poisoned<T>(int64_t(coeff.size())), dtiles = poisoned<T>(int64_t(tiles.size()));
  kernels.kron_linear(shape, tile_first, x.data(), c.rows, coeff.data(), tiles.data(), alive.data(), bias.data(), y.data(), c.threads);
  kernels.kron_backward(shape, tile_first, dy.data(), x.data(), c.rows, coeff.data(), tiles.data(), alive.data(), dx.data(),
                        dcoeff.data(), dtiles.data(), c.threads);
  Exact exact_y(c.rows * m), exact_dx(c.rows * n), exact_dcoeff(int64_t(coeff.size())), exact_dtiles(int64_t(tiles.size()));
  for (int64_t t = 0; t < c.rows; ++t) {
    for (int64_t o = 0; o < m; ++o) exact_y.add(t * m + o, number(bias[std::size_t(o)]));
    for (int64_t p = 0; p < c.m1; ++p)
      for (int64_t q = 0; q < c.n1; ++q)
        for (int64_t i = 0; alive[std::size_t(p * c.n1 + q)] && i < c.rank; ++i)
          for (int64_t a = 0; a < c.bm; ++a)
            for (int64_t b = 0; b < c.bn; ++b) {
              const int64_t out = t * m + p * c.bm + a, in = t * n + q * c.bn + b, at = (p * c.n1 + q) * c.rank + i;
              const int64_t tile = (p / (c.m1 / c.groups) * c.rank + i) * area + a * c.bn + b;
              const double u = number(coeff[std::size_t(at)]), w = number(tiles[std::size_t(tile)]);
              const double g = number(dy[std::size_t(out)]), v = number(x[std::size_t(in)]);
              exact_y.add(out, u * w * v);
              exact_dx.add(in, u * w * g);
              exact_dcoeff.add(at, w * g * v);
              exact_dtiles.add(tile, u * g * v);
            }
  }
  const double terms = double(std::max({n * c.rank, m * c.rank, c.rows * area, c.rows * c.m1 * c.n1}));
  const std::string about = c.text() + (tile_first ? ", tiles first" : ", coefficients first");
  compare("y", about, y, exact_y, terms);
  compare("dx", about, dx, exact_dx, terms);
  compare("dcoeff", about, dcoeff, exact_dcoeff, terms);
  compare("dtiles", about, dtiles, exact_dtiles, terms);
}

template <class T>
void check_live_blocks(const Kernels<T>& kernels, const Case& c) {
  if (!kernels.live_blocks) return;
  const Index index(c.m1, c.n1, c.density);
  const KronShape shape{c.m1, c.n1, c.bm, c.bn, c.rank, c.groups};
  const int64_t area = c.bm * c.bn, live = int64_t(index.col.size());
  const auto coeff = random<T>(c.m1 * c.n1 * c.rank), tiles = random<T>(c.groups * c.rank * area), dvalues = random<T>(live * area);
  auto values = poisoned<T>(live * area), dcoeff = poisoned<T>(int64_t(coeff.size())), dtiles = poisoned<T>(int64_t(tiles.size()));
  kernels.live_blocks(index.of(c.bm, c.bn), shape, coeff.data(), tiles.data(), values.data(), live, c.threads);
  kernels.live_blocks_backward(index.of(c.bm, c.bn), shape, dvalues.data(), coeff.data(), tiles.data(), dcoeff.data(), dtiles.data(),
                               c.threads);
  Exact exact_values(live * area), exact_dcoeff(int64_t(coeff.size())), exact_dtiles(int64_t(tiles.size()));
  for (int64_t k = 0; k < live; ++k)
    for (int64_t i = 0; i < c.rank; ++i)
      for (int64_t e = 0; e < area; ++e) {
        const int64_t p = index.row[std::size_t(k)], at = (p * c.n1 + index.col[std::size_t(k)]) * c.rank + i;
        const int64_t tile = (p / (c.m1 / c.groups) * c.rank + i) * area + e;
        const double u = number(coeff[std::size_t(at)]), w = number(tiles[std::size_t(tile)]);
        const double g = number(dvalues[std::size_t(k * area + e)]);
        exact_values.add(k * area + e, u * w);
        exact_dcoeff.add(at, w * g);
        exact_dtiles.add(tile, u * g);
      }
  compare("live blocks", c.text(), values, exact_values, double(c.rank));
  compare("dcoeff of live blocks", c.text(), dcoeff, exact_dcoeff, double(area));
  compare("dtiles of live blocks", c.text(), dtiles, exact_dtiles, double(c.m1 * c.n1));
}

template <class T>
void check_convolution(const Kernels<T>& kernels, const ConvShape& c, int64_t channels, int64_t m1, int64_t bm, int64_t bn, int threads) {
  const Index index(m1, c.kernel_height * c.kernel_width * channels / bn, 0.4);
  const PackedIndex where = index.of(bm, bn);
  const int64_t m = m1 * bm, area = bm * bn, live = int64_t(index.col.size());
  const int64_t pixels = c.height * c.width, results = c.out_height * c.out_width;
  const auto x = random<T>(c.images * channels * pixels), dy = random<T>(c.images * m * results);
  const auto values = random<T>(live * area), bias = random<T>(m);
  auto y = poisoned<T>(int64_t(dy.size())), dx = poisoned<T>(int64_t(x.size())), dvalues = poisoned<T>(live * area);
  kernels.conv2d(where, c, x.data(), values.data(), bias.data(), y.data(), threads);
  kernels.conv2d_grad_input(where, c, dy.data(), values.data(), dx.data(), threads);
  kernels.conv2d_grad_values(where, c, dy.data(), x.data(), dvalues.data(), live, threads);
  Exact exact_y(int64_t(y.size())), exact_dx(int64_t(x.size())), exact_dvalues(live * area);
  for (int64_t o = 0; o < int64_t(y.size()); ++o) exact_y.add(o, number(bias[std::size_t(o / results % m)]));
  for (int64_t image = 0; image < c.images; ++image)
    for (int64_t k = 0; k < live; ++k)
      for (int64_t e = 0; e < area; ++e) {
        const int64_t column = index.col[std::size_t(k)] * bn + e % bn, position = column / channels;
        const int64_t output = image * m + index.row[std::size_t(k)] * bm + e / bn, at = index.slot[std::size_t(k)] * area + e;
        const double w = number(values[std::size_t(at)]);
        for (int64_t r = 0; r < results; ++r) {
          const int64_t v = r / c.out_width + position / c.kernel_width * c.dilation_height - c.top;
          const int64_t u = r % c.out_width + position % c.kernel_width * c.dilation_width - c.left;
          if (v < 0 || v >= c.height || u < 0 || u >= c.width) continue;
          const int64_t out = output * results + r, in = (image * channels + column % channels) * pixels + v * c.width + u;
          const double g = number(dy[std::size_t(out)]), i = number(x[std::size_t(in)]);
          exact_y.add(out, w * i);
          exact_dx.add(in, w * g);
          exact_dvalues.add(at, g * i);
        }
      }
  char about[96];
  std::snprintf(about, sizeof about, "%d images of %dx%d, kernel %dx%d, %d threads", int(c.images), int(c.height), int(c.width),
                int(c.kernel_height), int(c.kernel_width), threads);
  compare("y", about, y, exact_y, double(index.n1 * bn + 1));
  compare("dx", about, dx, exact_dx, double(m * c.kernel_height * c.kernel_width));
  compare("dvalues", about, dvalues, exact_dvalues, double(c.images * results));
}

template <class T>
void check_all(const char* type, const Kernels<T>& kernels) {
  const int64_t blocks[][2] = {{1, 1}, {2, 2}, {3, 5}, {4, 4}, {16, 16}, {16, 4}, {7, 9}, {1, 16}, {16, 1}, {8, 32}, {5, 40}};
  const int64_t rows[] = {1, 2, 3, 4, 5, 15, 17, 40, 131}, grids[][2] = {{3, 5}, {1, 1}, {6, 2}, {4, 7}}, ranks[] = {1, 2, 3, 5};
  const double densities[] = {0.1, 0.5, 1.0};
  const int before = failures, checked = checks;
  for (int number = 0; number < 99; ++number) {
    const auto* block = blocks[number % 11];
    const auto* grid = grids[number % 4];
    const int64_t groups = number % 2 ? grid[0] : 1;
    const Case c{rows[number % 9], grid[0],  grid[1], block[0], block[1], ranks[number % 4], groups, densities[number % 3],
                 1 + number % 2};
    check_packed(kernels, c);
    check_factored(kernels, c, number % 3 == 0);
    check_live_blocks(kernels, c);
  }
  for (int threads = 1; threads < 3; ++threads) {
    check_convolution(kernels, {3, 9, 7, 9, 7, 3, 3, 1, 1, 1, 1}, 8, 3, 4, 8, threads);
    check_convolution(kernels, {2, 1, 1, 1, 1, 5, 3, 2, 1, 1, 1}, 6, 2, 3, 2, threads);
    check_convolution(kernels, {1, 90, 80, 91, 77, 2, 2, 1, 0, 1, 3}, 16, 1, 5, 16, threads);  // more than one frame
    check_convolution(kernels, {5, 4, 20, 8, 24, 1, 1, 2, 2, 1, 1}, 4, 4, 1, 4, threads);
  }
  std::printf("%s: %d results compared, %d wrong\n", type, checks - checked, failures - before);
}

}  // namespace

int main() {
  check_all("float64", *baseline::table.f64);
  check_all("float32", *baseline::table.f32);
  check_all("bfloat16", *baseline::table.bf16);
  return failures > 0;
}
