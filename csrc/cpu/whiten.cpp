// Chunks of a fixed number of elements in row-major order, whatever the strides and the number of
// threads; in each, two passes (mean, then squared deviations) over a copy that sits in the
// first-level cache; the chunks are merged in order (Chan, Golub, LeVeque 1979). Eight fp64 lanes on
// every instruction set.
#include "cpu/whiten.h"

#include "cpu/vec.h"
#include "host/memory.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kChunk = 2048;
constexpr int64_t kSingleThreadElements = 32768;
constexpr int kWide = 8;

typedef double vwide __attribute__((vector_size(kWide * 8)));

struct Moments {
  double count = 0.0;
  double mean = 0.0;
  double m2 = 0.0;
};

inline double add_lanes(const vwide& lanes) {
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// Elements [begin, end) of the row-major order as fp64 and 0/1 weights, zero-padded to kWide.
struct Tile {
  double values[kChunk];
  double weights[kChunk];
  int64_t padded = 0;

  template <class Args>
  void read(const Args& args, int64_t begin, int64_t end) {
    float scratch[kChunk];
    uint8_t mask_scratch[kChunk];
    int64_t filled = 0;
    while (begin < end) {
      const int64_t row = begin / args.columns;
      const int64_t column = begin % args.columns;
      const int64_t count = smaller(args.columns - column, end - begin);
      const float* x = read_row(
          args.x, row * args.x.row_stride + column * args.x.column_stride, count, scratch);
      const uint8_t* mask =
          args.mask.data == nullptr
              ? nullptr
              : read_mask(args.mask,
                          row * args.mask.row_stride + column * args.mask.column_stride, count,
                          mask_scratch);
      for (int64_t i = 0; i < count; ++i) {
        const bool valid = mask == nullptr || mask[i] != 0;
        values[filled + i] = valid ? static_cast<double>(x[i]) : 0.0;
        weights[filled + i] = valid ? 1.0 : 0.0;
      }
      filled += count;
      begin += count;
    }
    for (padded = filled; padded % kWide != 0; ++padded) values[padded] = weights[padded] = 0.0;
  }

  Moments moments() const {
    vwide count = {}, sum = {}, squares = {};
    vwide x, w;
    for (int64_t i = 0; i < padded; i += kWide) {
      std::memcpy(&x, values + i, sizeof(x));
      std::memcpy(&w, weights + i, sizeof(w));
      sum += x;
      count += w;
    }
    Moments result;
    result.count = add_lanes(count);
    if (result.count == 0.0) return result;
    result.mean = add_lanes(sum) / result.count;
    for (int64_t i = 0; i < padded; i += kWide) {
      std::memcpy(&x, values + i, sizeof(x));
      std::memcpy(&w, weights + i, sizeof(w));
      const vwide deviation = x - result.mean * w;
      squares += deviation * deviation;
    }
    result.m2 = add_lanes(squares);
    return result;
  }
};

inline void merge(Moments& into, const Moments& next) {
  if (next.count == 0.0) return;
  const double count = into.count + next.count;
  const double difference = next.mean - into.mean;
  into.m2 += next.m2 + difference * difference * (into.count * next.count / count);
  into.mean += difference * (next.count / count);
  into.count = count;
}

}  // namespace

void masked_moments(const MaskedMomentsArgs& args) {
  const int64_t elements = args.rows * args.columns;
  const int64_t chunks = (elements + kChunk - 1) / kChunk;
  const int threads = elements <= kSingleThreadElements ? 1 : args.threads;
  Moments total;
  // Waves of a fixed number of chunks bound the memory for partial results.
  constexpr int64_t kWave = 1024;
  static_assert(sizeof(Moments) == 24, "three doubles");
  for (int64_t wave = 0; wave < chunks; wave += kWave) {
    Moments partial[kWave];
    const int64_t in_wave = smaller(kWave, chunks - wave);
    parallel_for(in_wave, 4, threads, [&](int64_t first, int64_t last) {
      Tile tile;
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t begin = (wave + chunk) * kChunk;
        tile.read(args, begin, smaller(elements, begin + kChunk));
        partial[chunk] = tile.moments();
      }
    });
    for (int64_t chunk = 0; chunk < in_wave; ++chunk) merge(total, partial[chunk]);
  }
  args.out[0] = total.count;
  args.out[1] = total.mean;
  args.out[2] = total.m2;
}

void whiten(const WhitenArgs& args) {
  const int64_t elements = args.rows * args.columns;
  const int threads = elements <= kSingleThreadElements ? 1 : args.threads;
  advise_huge_pages(args.out, elements * static_cast<int64_t>(sizeof(float)));
  parallel_for(elements, 4 * kChunk, threads, [&args](int64_t begin, int64_t end) {
    Tile tile;
    for (; begin < end; begin += kChunk) {
      const int64_t stop = smaller(end, begin + kChunk);
      tile.read(args, begin, stop);
      float* out = args.out + begin;
      for (int64_t i = 0; i < stop - begin; ++i) {
        const double y = (tile.values[i] - args.mean) * args.scale + args.offset;
        out[i] = tile.weights[i] != 0.0 ? static_cast<float>(y) : 0.0f;
      }
    }
  });
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
