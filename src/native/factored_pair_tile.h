// One tile of rows for coeff_first in bf16, whose steps are products of pairs; see factored_pairs.h.
//
// What each step sums over comes in pairs: mix over two sources s, apply over (i, c), spread over the rows of a tile, collect over
// two terms i, dC over the running index (t, c), dB over two rows t. Mixtures and spreads are rounded to bf16 between the steps, the
// results once more; all sums are float.
#pragma once

#include "factored_tile.h"

namespace KRONBLOCKS_ISA {

inline Word pair_of(Bf16 first, Bf16 second) { return Word(first.bits) | Word(second.bits) << 16; }

// The problem: (m1, n1, rank) coefficients, tiles as pairs over (i, c) and over rows
struct PairProblem {
  const KronShape& k;
  const Bf16* coeff;
  const std::uint8_t* live;
  std::vector<Word> across;          // (g, r * bn / 2, bm): pairs over (i, c), for apply
  std::vector<Word> down;            // (g, bm / 2, r * bn): pairs over rows of tiles, for spread
  std::vector<std::uint8_t> wanted;  // sources that some output reads; the others are not packed

  PairProblem(const KronShape& shape, const Bf16* coefficients, const Bf16* tiles, const std::uint8_t* mask)
      : k(shape), coeff(coefficients), live(mask), wanted(std::size_t(shape.n1), mask == nullptr) {
    const std::int64_t width = k.rank * k.bn, size = width * k.bm / 2;
    across.resize(std::size_t(k.groups * size));
    down.resize(std::size_t(k.groups * size));
    for (std::int64_t g = 0; g < k.groups; ++g)
      for (std::int64_t i = 0; i < k.rank; ++i)
        for (std::int64_t a = 0; a < k.bm; ++a) {
          const Bf16* from = tiles + ((g * k.rank + i) * k.bm + a) * k.bn;
          for (std::int64_t c = 0; c < k.bn; c += 2)
            across[std::size_t(g * size + (i * k.bn + c) / 2 * k.bm + a)] = pair_of(from[c], from[c + 1]);
          if (a % 2 == 0) interleave(from, from + k.bn, int(k.bn), down.data() + g * size + a / 2 * width + i * k.bn);
        }
    for (std::int64_t at = 0; live && at < k.m1 * k.n1; ++at)
      if (live[at]) wanted[std::size_t(at % k.n1)] = 1;
  }

  std::int64_t width() const { return k.rank * k.bn; }
  std::int64_t source_pairs() const { return (k.n1 + 1) / 2; }
  std::int64_t bank(std::int64_t o) const { return o / (k.m1 / k.groups); }
  bool alive(std::int64_t o, std::int64_t s) const { return s < k.n1 && (!live || live[o * k.n1 + s]); }
  Bf16 at(std::int64_t o, std::int64_t s, std::int64_t i) const {
    return alive(o, s) ? coeff[(o * k.n1 + s) * k.rank + i] : Bf16{0};
  }
};

// Groups of o, entries are pairs of s: coefficients (o in group, i)
inline MixLists<Word> mix_pairs(const PairProblem& f, int per_group) {
  MixLists<Word> lists;
  lists.per_group = per_group;
  lists.width = int(per_group * f.k.rank);
  const int parts = (lists.width + kMixRows - 1) / kMixRows;
  lists.part = (lists.width + parts - 1) / parts;
  lists.starts.push_back(0);
  for (std::int64_t first = 0; first < f.k.m1; first += per_group) {
    const std::int64_t end = std::min<std::int64_t>(first + per_group, f.k.m1);
    for (std::int64_t s = 0; s < f.k.n1; s += 2) {
      bool any = false;
      for (std::int64_t o = first; o < end; ++o) any |= f.alive(o, s) || f.alive(o, s + 1);
      if (!any) continue;
      lists.source.push_back(std::int32_t(s / 2));
      lists.coefs.resize(lists.coefs.size() + std::size_t(lists.width));
      Word* to = lists.coefs.data() + lists.coefs.size() - lists.width;
      for (std::int64_t o = first; o < end; ++o)
        for (std::int64_t i = 0; i < f.k.rank; ++i) *to++ = pair_of(f.at(o, s, i), f.at(o, s + 1, i));
    }
    lists.starts.push_back(std::int32_t(lists.source.size()));
  }
  return lists;
}

// Groups of s, entries o: coefficients (pairs of i, s in group)
inline MixLists<Word> collect_pairs(const PairProblem& f, int per_group) {
  MixLists<Word> lists;
  lists.per_group = per_group;
  lists.width = int(per_group * f.k.rank / 2);
  lists.starts.push_back(0);
  for (std::int64_t first = 0; first < f.k.n1; first += per_group) {
    const std::int64_t end = std::min<std::int64_t>(first + per_group, f.k.n1);
    for (std::int64_t o = 0; o < f.k.m1; ++o) {
      bool any = false;
      for (std::int64_t s = first; s < end; ++s) any |= f.alive(o, s);
      if (!any) continue;
      lists.source.push_back(std::int32_t(o));
      lists.coefs.resize(lists.coefs.size() + std::size_t(lists.width));
      Word* to = lists.coefs.data() + lists.coefs.size() - lists.width;
      for (std::int64_t i = 0; i < f.k.rank; i += 2, to += per_group)
        for (std::int64_t s = first; s < end; ++s) to[s - first] = pair_of(f.at(o, s, i), f.at(o, s, i + 1));
    }
    lists.starts.push_back(std::int32_t(lists.source.size()));
  }
  return lists;
}

constexpr std::size_t kPairTileBytes = 640 << 10;  // most of it is spreads, written once and read once

// A tile of rows and its work memory; what is said of a piece's places holds as in Tile. V: vectors of floats in a piece, 2 or 4.
template <int V>
struct PairTile {
  static constexpr int n = kLanes<float>, size = V * n;
  const PairProblem& f;
  Pieces pieces;
  int per_group, rows;
  Word* panel;         // M: [piece][s / 2][size], pairs of sources
  Bf16* plain;         // M: [piece][s][size]
  Bf16* mixed;         // Q of one group: [o in group, i][running index]
  Bf16* by_rows;       // Q of one group: [o in group][t][i, c]; E of one o: [t][i, c]
  Word* row_pairs;     // Q of one group: [o in group][t / 2][i, c]
  Word* block_pairs;   // N of one o: [t / 2][a]
  float* sums;         // E of one o: [t][i, c]; N of one o: [t][a]
  Word* spreads;       // E: [piece][o, i / 2][size], pairs of terms
  Bf16* plain_spreads; // E of one group: [piece][o in group, i][size]

  std::int64_t panel_rows() const { return f.source_pairs() | 1; }
  std::int64_t plain_rows() const { return f.k.n1 | 1; }
  std::int64_t spread_rows() const { return (f.k.m1 * f.k.rank / 2) | 1; }
  std::ptrdiff_t length() const { return pieces.count() * size; }
  // rows that the pieces have room for, and one more: an even number
  std::int64_t all_rows() const { return (length() / f.k.bn + 2) / 2 * 2; }

  void pack(const Bf16* x, bool with_plain) {
    const std::int64_t step = f.k.n1 * f.k.bn, bn = f.k.bn, filled = std::int64_t(rows) * bn;
    for_runs(pieces, rows, [&](int t, int c, std::int64_t piece, int inside, int run) {
      const Bf16* from = x + t * step + c;
      for (std::int64_t s = 0; s < f.k.n1; s += 2) {
        Word* to = panel + (piece * panel_rows() + s / 2) * size + inside;
        const bool second = s + 1 < f.k.n1 && f.wanted[std::size_t(s + 1)];
        if (f.wanted[std::size_t(s)])
          interleave(from + s * bn, second ? from + (s + 1) * bn : nullptr, run, to);
        else
          for (int j = 0; j < run; ++j) to[j] = second ? Word(from[(s + 1) * bn + j].bits) << 16 : 0;
      }
    });
    for (std::int64_t at = filled; at < length(); ++at)
      for (std::int64_t s = 0; s < f.source_pairs(); ++s) panel[(at / size * panel_rows() + s) * size + at % size] = 0;
    if (with_plain) pack_pieces(pieces, rows, f.k.n1, plain_rows(), x, step, plain);
  }

  // vectors lie within the rows of pieces
  bool whole_vectors() const { return size % f.k.bn == 0 && f.k.bn % n == 0; }

  // where term k of a group (o in group, i) begins, with `each` numbers from one o to the next
  std::ptrdiff_t term_place(int k, std::ptrdiff_t each) const {
    const int rank = int(f.k.rank), bn = int(f.k.bn);
    return k < rank ? k * bn : k / rank * each + k % rank * bn;
  }

  // sums of a group, kept by keep(piece, first of them)
  template <class Keep>
  void mixtures(const MixLists<Word>& lists, std::int64_t group, Keep keep) {
    for (std::int64_t piece = 0; piece < pieces.count(); ++piece)
      for (int first = 0; first < lists.width; first += lists.part)
        weighted_sums_of<Word, V, true>(std::min(lists.part, lists.width - first), lists, group, first, 1,
                                        panel + piece * panel_rows() * size, size, keep(piece, first));
  }

  void mix(const MixLists<Word>& lists, std::int64_t group) {
    mixtures(lists, group, [&](std::int64_t piece, int first) {
      return keep_at<V>(mixed + first * length() + piece * size, length());
    });
  }

  // Q of a group as by_rows, [o in group][t][i, c]
  void mix_rows(const MixLists<Word>& lists, std::int64_t group) {
    const int bn = int(f.k.bn), width = int(f.width()), rank = int(f.k.rank);
    if (!whole_vectors()) {
      mix(lists, group);
      for (int k = 0; k < lists.width; ++k)
        copy_rows(rows, bn, mixed + k * length(), bn, by_rows + (k / rank * all_rows() * rank + k % rank) * bn, width);
      return;
    }
    std::ptrdiff_t places[V];  // of a piece's vectors
    for (int v = 0; v < V; ++v) places[v] = std::ptrdiff_t(v * n / bn) * width + v * n % bn;
    const std::ptrdiff_t piece_step = std::ptrdiff_t(size / bn) * width;
    mixtures(lists, group, [&](std::int64_t piece, int first) {
      return [=, &places, to = by_rows + piece * piece_step, each = all_rows() * width](int r, const Vec<float>* sums) {
        Bf16* row = to + term_place(first + r, each);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) put(row + places[v], sums[v]);
      };
    });
  }

  // Q of a group as row_pairs, [o in group][t / 2][i, c]
  void mix_row_pairs(const MixLists<Word>& lists, std::int64_t group) {
    const int bn = int(f.k.bn), width = int(f.width()), rank = int(f.k.rank);
    const std::int64_t all_pairs = all_rows() / 2;
    if (!whole_vectors() || size % (2 * bn)) {
      mix(lists, group);
      for (int k = 0; k < lists.width; ++k)
        for (int t = 0; t < rows; t += 2) {
          const Bf16* from = mixed + k * length() + t * bn;
          interleave(from, t + 1 < rows ? from + bn : nullptr, bn, row_pairs + (k / rank * all_pairs + t / 2) * width + k % rank * bn);
        }
      return;
    }
    const int apart = bn / n;  // vectors from a row to the next
    const std::ptrdiff_t piece_step = std::ptrdiff_t(size / bn / 2) * width;
    mixtures(lists, group, [&](std::int64_t piece, int first) {
      return [=, to = row_pairs + piece * piece_step](int r, const Vec<float>* sums) {
        Word* row = to + term_place(first + r, all_pairs * width);
        if (apart == 1) {
#pragma GCC unroll 2
          for (int v = 0; v < V; v += 2) store(row + v / 2 * width, rounded_pairs(sums[v], sums[v + 1]));
        } else {
          for (int v = 0; v < V / 2; ++v) store(row + v * n, rounded_pairs(sums[v], sums[v + V / 2]));
        }
      };
    });
  }

  // y of o: Q B^T + bias
  void apply(std::int64_t o, int place, const Bf16* bias, Bf16* y) {
    const int bm = int(f.k.bm), width = int(f.width());
    for (int t = 0; bias && t < rows; ++t) convert(bias + o * bm, bm, sums + t * bm);
    small_gemm<Word>(rows, bm, width / 2, {reinterpret_cast<const Word*>(by_rows + place * all_rows() * width), width / 2, 1},
                     f.across.data() + f.bank(o) * width * bm / 2, bm, sums, bm, bias != nullptr);
    copy_rows(rows, bm, sums, bm, y + o * bm, f.k.m1 * f.k.bm);
  }

  // dB of o's bank from Q and N of o, both as pairs of rows
  void tile_gradients(std::int64_t o, int place, const Bf16* dy, float* dbanks) {
    const int bm = int(f.k.bm), width = int(f.width());
    const std::int64_t step = f.k.m1 * bm;
    for (int t = 0; t < rows; t += 2) {
      const Bf16* row = dy + t * step + o * bm;
      interleave(row, t + 1 < rows ? row + step : nullptr, bm, block_pairs + t / 2 * bm);
    }
    small_gemm<Word>(bm, width, (rows + 1) / 2, {block_pairs, 1, bm}, row_pairs + place * (all_rows() / 2) * width, width,
                     dbanks + f.bank(o) * bm * width, width, true);
  }

  // E of R rows from row t on, for two terms and a vector of columns, to its places
  template <int R>
  void spread_rows_of(const Word* dy, std::ptrdiff_t dy_step, const Word* tiles, int t, int c, Bf16* own, std::ptrdiff_t own_step,
                      Word* pairs, std::ptrdiff_t pairs_step) {
    const int bn = int(f.k.bn), width = int(f.width());
    Vec<float> sum[R][2] = {};
    for (int a = 0; a < f.k.bm / 2; ++a, ++dy, tiles += width) {
      const Vec<Word> first = load<Vec<Word>>(tiles), second = load<Vec<Word>>(tiles + bn);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<Word> left = Vec<Word>{} + dy[r * dy_step];
        sum[r][0] = multiply_add<Word>(sum[r][0], first, left);
        sum[r][1] = multiply_add<Word>(sum[r][1], second, left);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const std::int64_t at = std::int64_t(t + r) * bn + c, piece = at / size, inside = at % size;
      put(own + piece * own_step + inside, sum[r][0]);
      put(own + piece * own_step + size + inside, sum[r][1]);
      if (pairs) store(pairs + piece * pairs_step + inside, rounded_pairs(sum[r][0], sum[r][1]));
    }
  }

  // E of o, to its places
  void spread(std::int64_t o, int place, const Bf16* dy, bool collecting) {
    const int bm = int(f.k.bm), bn = int(f.k.bn), width = int(f.width()), rank = int(f.k.rank);
    const Word* left = reinterpret_cast<const Word*>(dy + o * bm);
    const Word* tiles = f.down.data() + f.bank(o) * width * bm / 2;
    Word* pairs = collecting ? spreads + o * rank / 2 * size : nullptr;
    Bf16* own = plain_spreads + place * rank * size;
    const std::ptrdiff_t left_step = f.k.m1 * bm / 2, pairs_step = spread_rows() * size;
    const std::ptrdiff_t own_step = std::ptrdiff_t(per_group) * rank * size;
    if (whole_vectors()) {
      for (int i = 0; i < rank; i += 2)
        for (int c = 0; c < bn; c += n) {
          auto some = [&](auto r, int t) {
            spread_rows_of<decltype(r)::value>(left + t * left_step, left_step, tiles + i * bn + c, t, c, own + i * size, own_step,
                                               pairs ? pairs + i / 2 * size : nullptr, pairs_step);
          };
          int t = 0;
          for (; t + 8 <= rows; t += 8) some(std::integral_constant<int, 8>(), t);
          for (; t < rows; ++t) some(std::integral_constant<int, 1>(), t);
        }
    } else {
      small_gemm<Word>(rows, width, bm / 2, {left, left_step, 1}, tiles, width, sums, width, false);
      convert(sums, std::int64_t(rows) * width, by_rows);
      for_runs(pieces, rows, [&](int t, int c, std::int64_t piece, int inside, int run) {
        const Bf16* from = by_rows + t * width + c;
        for (int i = 0; i < rank; ++i) convert(from + i * bn, run, own + piece * own_step + i * size + inside);
        for (int i = 0; pairs && i < rank; i += 2)
          interleave(from + i * bn, from + (i + 1) * bn, run, pairs + piece * pairs_step + i / 2 * size + inside);
      });
    }
    for (std::int64_t at = std::int64_t(rows) * bn; at < length(); ++at)
      for (int i = 0; i < rank; ++i) {
        own[at / size * own_step + i * size + at % size] = Bf16{0};
        if (pairs) pairs[at / size * pairs_step + i / 2 * size + at % size] = 0;
      }
  }

  // dC of a group, added to dcoefs in the order of the entries of `lists`, which are single sources
  void coefficient_gradients(const MixLists<float>& lists, std::int64_t group, float* dcoefs) {
    constexpr int words = size / 2;
    const Word *left = reinterpret_cast<const Word*>(plain_spreads), *all = reinterpret_cast<const Word*>(plain);
    for (std::int32_t e = lists.starts[group]; e < lists.starts[group + 1]; e += kDotSources) {
      const int here = std::min(kDotSources, lists.starts[group + 1] - e);
      const Word* right[kDotSources];
      float* out[kDotSources];
      for (int first = 0; first < lists.width; first += lists.part) {
        for (int s = 0; s < here; ++s) {
          right[s] = all + lists.source[e + s] * words;
          out[s] = dcoefs + std::int64_t(e + s) * lists.width + first;
        }
        dots_of<Word>(std::min(lists.part, lists.width - first), here, pieces.count(), words, left + first * words,
                      std::ptrdiff_t(per_group) * f.k.rank * words, right, plain_rows() * words, out);
      }
    }
  }

  void collect(const MixLists<Word>& lists, Bf16* dx) {
    alignas(64) float totals[kMixRows * size];
    const int bn = int(f.k.bn);
    const std::int64_t step = f.k.n1 * bn;
    for (std::int64_t piece = 0; piece < pieces.count(); ++piece) {
      const std::int64_t first = piece * size, end = std::min<std::int64_t>(first + size, std::int64_t(rows) * bn);
      for (std::int64_t group = 0; group < lists.groups(); ++group) {
        const int here = int(std::min<std::int64_t>(lists.per_group, f.k.n1 - group * lists.per_group));
        weighted_sums_of<Word, V, false>(lists.per_group, lists, group, 0, int(f.k.rank / 2), spreads + piece * spread_rows() * size, size,
                                         keep_at<V>(totals, size));
        with_width(size % bn ? 0 : bn, [&](auto w) {
          constexpr int width = decltype(w)::value <= size ? decltype(w)::value : 0;
          for (std::int64_t at = first; at < end;) {
            const std::int64_t t = at / bn;
            const int c = int(at % bn), run = int(std::min<std::int64_t>(bn - c, end - at));
            for (int j = 0; j < here; ++j)
              copy_run<width>(dx + t * step + (group * lists.per_group + j) * bn + c, totals + j * size + (at - first), run);
            at += run;
          }
        });
      }
    }
  }
};

// Work memory of one thread; what only gradients need is left out of the forward product
template <int V>
PairTile<V> make_pair_tile(const PairProblem& f, int rows, int per_group, bool backward, bool collecting) {
  static thread_local Scratch panel, plain, mixed, by_rows, row_pairs, block_pairs, sums, spreads, plain_spreads;
  PairTile<V> tile{f,       {rows, int(f.k.bn), PairTile<V>::size}, per_group, 0, nullptr, nullptr, nullptr, nullptr, nullptr,
                   nullptr, nullptr, nullptr, nullptr};
  const std::size_t length = std::size_t(tile.length()), width = std::size_t(f.width()), bm = std::size_t(f.k.bm);
  tile.panel = panel.take<Word>(length * tile.panel_rows());
  tile.mixed = mixed.take<Bf16>(length * per_group * f.k.rank);
  tile.by_rows = by_rows.take<Bf16>(tile.all_rows() * per_group * width);
  tile.sums = sums.take<float>(rows * std::max(width, bm));
  if (backward) {
    tile.plain = plain.take<Bf16>(length * tile.plain_rows());
    tile.row_pairs = row_pairs.take<Word>(tile.all_rows() / 2 * per_group * width);
    tile.block_pairs = block_pairs.take<Word>((rows + 1) / 2 * bm);
    if (collecting) tile.spreads = spreads.take<Word>(length * tile.spread_rows());
    tile.plain_spreads = plain_spreads.take<Bf16>(length * per_group * f.k.rank);
  }
  return tile;
}

}  // namespace KRONBLOCKS_ISA
