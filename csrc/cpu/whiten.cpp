// Chunks of a fixed number of elements in row-major order, whatever the strides and the number of
// threads; in each, two passes (mean, then squared deviations) over a copy that sits in the
// first-level cache; the chunks are merged in order.
#include "cpu/whiten.h"

#include <math.h>

#include "cpu/moments.h"
#include "cpu/vec.h"
#include "host/memory.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kChunk = kMomentsChunk;
constexpr int64_t kSingleThreadElements = 32768;
// Elements [begin, end) of the row-major order, 0 where masked, padded to kWide with masked ones.
struct Tile {
  float values[kChunk];
  uint8_t valid[kChunk];
  int64_t count = 0;
  int64_t padded = 0;

  template <class Args>
  void read(const Args& args, int64_t begin, int64_t end) {
    float scratch[kChunk];
    uint8_t mask_scratch[kChunk];
    int64_t filled = 0;
    while (begin < end) {
      const int64_t row = begin / args.columns;
      const int64_t column = begin % args.columns;
      const int64_t run = smaller(args.columns - column, end - begin);
      const float* x = read_row(
          args.x, row * args.x.row_stride + column * args.x.column_stride, run, scratch);
      if (args.mask.data == nullptr) {
        std::memcpy(values + filled, x, run * sizeof(float));
        std::memset(valid + filled, 1, run);
      } else {
        const int64_t offset = row * args.mask.row_stride + column * args.mask.column_stride;
        select(x, read_mask(args.mask, offset, run, mask_scratch), filled, run);
      }
      filled += run;
      begin += run;
    }
    for (padded = filled; padded % kWide != 0; ++padded) values[padded] = valid[padded] = 0;
    count = 0;
    for (int64_t i = 0; i < filled; ++i) count += valid[i];
  }

  Moments moments() const {
    Moments result;
    if (count == 0) return result;
    vwide sum = {}, squares = {};
    for (int64_t i = 0; i < padded; i += kWide) sum += load_wide(values + i);
    result.count = static_cast<double>(count);
    result.mean = add_lanes(sum) / result.count;
    for (int64_t i = 0; i < padded; i += kWide) {
      const vwide deviation =
          load_valid(valid + i) ? load_wide(values + i) - result.mean : vwide{};
      squares += deviation * deviation;
    }
    result.m2 = add_lanes(squares);
    return result;
  }

  void normalise(double mean, double scale, double offset, int64_t number, float* out) const {
    for (int64_t i = 0; i < number; i += kWide) {
      const vwide y = (load_wide(values + i) - mean) * scale + offset;
      const vwide_float result =
          __builtin_convertvector(load_valid(valid + i) ? y : vwide{}, vwide_float);
      std::memcpy(out + i, &result, smaller(kWide, number - i) * sizeof(float));
    }
  }

 private:
  void select(const float* __restrict x, const uint8_t* __restrict mask, int64_t at, int64_t run) {
    for (int64_t i = 0; i < run; ++i) {
      valid[at + i] = mask[i] != 0;
      values[at + i] = mask[i] != 0 ? x[i] : 0.0f;
    }
  }
};

struct Normalisation {
  double mean, scale, offset;
};

// Without spread, with at most one element, the scale is 1.
Normalisation make_normalisation(const WhitenArgs& args) {
  const Moments total = merge_moments(reinterpret_cast<const Moments*>(args.stats), args.sets);
  Normalisation result = {total.mean, 1.0, args.shift_mean ? 0.0 : total.mean};
  if (total.count > 1.0) {
    const double variance = total.m2 / (total.count - (args.unbiased ? 1.0 : 0.0));
    result.scale = 1.0 / sqrt(variance + args.eps);
  }
  return result;
}

}  // namespace

void masked_moments(const MaskedMomentsArgs& args) {
  const int64_t elements = args.rows * args.columns;
  const int64_t chunks = (elements + kChunk - 1) / kChunk;
  const int threads = elements <= kSingleThreadElements ? 1 : args.threads;
  Moments total;
  // Waves of a fixed number of chunks bound the memory for partial results.
  constexpr int64_t kWave = 1024;
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
    const Moments sets[2] = {total, merge_moments(partial, in_wave)};
    total = wave == 0 ? sets[1] : merge_moments(sets, 2);
  }
  args.out[0] = total.count;
  args.out[1] = total.mean;
  args.out[2] = total.m2;
}

void whiten(const WhitenArgs& args) {
  const int64_t elements = args.rows * args.columns;
  const int threads = elements <= kSingleThreadElements ? 1 : args.threads;
  const Normalisation by = make_normalisation(args);
  advise_huge_pages(args.out, elements * static_cast<int64_t>(sizeof(float)));
  parallel_for(elements, 4 * kChunk, threads, [&args, by](int64_t begin, int64_t end) {
    Tile tile;
    for (; begin < end; begin += kChunk) {
      const int64_t stop = smaller(end, begin + kChunk);
      tile.read(args, begin, stop);
      tile.normalise(by.mean, by.scale, by.offset, stop - begin, args.out + begin);
    }
  });
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
