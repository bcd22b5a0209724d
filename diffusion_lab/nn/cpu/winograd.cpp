// Winograd convolution F(4x4, 3x3) of channels_last float32 images, with fused group norm and SiLU
// of the input and sums on the output, for processors with AVX2. library.py compiles this file and
// kernels.py calls it and has the formulas and the source. It is plain C++ without dependencies.
//
// An image is (batch, height, width, channels) in memory; channels are multiples of 8, height and
// width of 4. A tile is 4x4 pixels of the result and the 6x6 pixels of the input that it depends
// on. A tile's 36 values are rows of 36 matrices, v of the input, (36, tiles, channels), and m of
// the result, (36, tiles, out), with padding between the matrices, see `matrix`. Values do not
// depend on the number of threads, and those of an image not on the rest of its batch.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace {

using v8 = __m256;
constexpr long LANES = 8;
constexpr long PART = 1024;  // pixels summed by one task
constexpr long BLOCK = 64;   // pixels summed in float32
constexpr long TILES = 24;   // tiles of a convolution at a time: v and m fit into the L2 cache
constexpr long BYTES = 1 << 22;  // size of v and m in a weight gradient at a time: fits into the L3 cache
constexpr long DEEP = 128;   // tiles that a weight gradient sums in registers: fits into the L1 cache

inline v8 load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, v8 a) { _mm256_storeu_ps(p, a); }
inline v8 all(float a) { return _mm256_set1_ps(a); }
inline v8 add(v8 a, v8 b) { return _mm256_add_ps(a, b); }
inline v8 sub(v8 a, v8 b) { return _mm256_sub_ps(a, b); }
inline v8 mul(v8 a, v8 b) { return _mm256_mul_ps(a, b); }
inline v8 fma(v8 a, v8 b, v8 c) { return _mm256_fmadd_ps(a, b, c); }    // a b + c
inline v8 nfma(v8 a, v8 b, v8 c) { return _mm256_fnmadd_ps(a, b, c); }  // -a b + c

// exp(x) = 2^n exp(r), n = round(x / ln 2), by the series of exp(r); NaN stays NaN.
inline v8 exponential(v8 x) {
  x = _mm256_min_ps(all(88.3f), _mm256_max_ps(all(-87.3f), x));
  const v8 n = _mm256_round_ps(mul(x, all(1.44269504f)), 8);  // to the nearest, silently
  v8 r = nfma(n, all(0x1.63p-1f), x);  // ln 2 in two parts, the first of which is exact in n ln 2
  r = nfma(n, all(-2.12194440e-4f), r);
  v8 p = all(1.f / 5040);
  for (float factorial : {720.f, 120.f, 24.f, 6.f, 2.f, 1.f, 1.f})
    p = fma(p, r, all(1.f / factorial));
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)));
}
inline v8 sigmoid(v8 a) {
  return _mm256_div_ps(all(1.f), add(all(1.f), exponential(sub(all(0.f), a))));
}

// The matrices of F(4x4, 3x3) for the points 0, ±P, ±Q, ∞. Lavin and Gray's 1 and 2 would double
// the rounding errors.
constexpr double P = 0.70710678118654752, Q = 1.41421356237309505, P2 = P * P, Q2 = Q * Q;
constexpr double G0 = 1 / (P2 * Q2), GP = 1 / (2 * P2 * (P2 - Q2)), GQ = 1 / (2 * Q2 * (Q2 - P2));
inline v8 c(double a) { return all(static_cast<float>(a)); }

// Values at P, -P, Q, -Q of polynomials with these even and odd parts.
inline void at_points(v8 p_even, v8 p_odd, v8 q_even, v8 q_odd, v8 t[6]) {
  t[1] = add(p_even, p_odd);
  t[2] = sub(p_even, p_odd);
  t[3] = add(q_even, q_odd);
  t[4] = sub(q_even, q_odd);
}

// Bᵀ d
inline void input_1d(const v8 d[6], v8 t[6]) {
  const v8 p_even = nfma(c(Q2), d[2], d[4]), p_odd = mul(c(P), nfma(c(Q2), d[1], d[3]));
  const v8 q_even = nfma(c(P2), d[2], d[4]), q_odd = mul(c(Q), nfma(c(P2), d[1], d[3]));
  t[0] = fma(c(P2 * Q2), d[0], nfma(c(P2 + Q2), d[2], d[4]));
  at_points(p_even, p_odd, q_even, q_odd, t);
  t[5] = fma(c(P2 * Q2), d[1], nfma(c(P2 + Q2), d[3], d[5]));
}

// Aᵀ m
inline void output_1d(const v8 m[6], v8 y[4]) {
  const v8 p_even = add(m[1], m[2]), p_odd = mul(c(P), sub(m[1], m[2]));
  const v8 q_even = add(m[3], m[4]), q_odd = mul(c(Q), sub(m[3], m[4]));
  y[0] = add(m[0], add(p_even, q_even));
  y[1] = add(p_odd, q_odd);
  y[2] = fma(c(P2), p_even, mul(c(Q2), q_even));
  y[3] = fma(c(P2), p_odd, fma(c(Q2), q_odd, m[5]));
}

// A g, of a result's gradient
inline void gradient_1d(const v8 g[4], v8 t[6]) {
  const v8 p_even = fma(c(P2), g[2], g[0]), p_odd = mul(c(P), fma(c(P2), g[3], g[1]));
  const v8 q_even = fma(c(Q2), g[2], g[0]), q_odd = mul(c(Q), fma(c(Q2), g[3], g[1]));
  t[0] = g[0];
  at_points(p_even, p_odd, q_even, q_odd, t);
  t[5] = g[3];
}

// G w
inline void weight_1d(const v8 w[3], v8 t[6]) {
  const v8 p_even = mul(c(GP), fma(c(P2), w[2], w[0])), p_odd = mul(c(GP * P), w[1]);
  const v8 q_even = mul(c(GQ), fma(c(Q2), w[2], w[0])), q_odd = mul(c(GQ * Q), w[1]);
  t[0] = mul(c(G0), w[0]);
  at_points(p_even, p_odd, q_even, q_odd, t);
  t[5] = w[2];
}

// Gᵀ s
inline void weight_gradient_1d(const v8 s[6], v8 w[3]) {
  const v8 p_even = mul(c(GP), add(s[1], s[2])), p_odd = mul(c(GP * P), sub(s[1], s[2]));
  const v8 q_even = mul(c(GQ), add(s[3], s[4])), q_odd = mul(c(GQ * Q), sub(s[3], s[4]));
  w[0] = fma(c(G0), s[0], add(p_even, q_even));
  w[1] = add(p_odd, q_odd);
  w[2] = fma(c(P2), p_even, fma(c(Q2), q_even, s[5]));
}

// M d Mᵀ for a TO x FROM matrix M, given as the function that applies it to a vector.
template <int FROM, int TO, typename Load, typename Store>
inline void both_ways(void (*once)(const v8*, v8*), Load from, Store to) {
  v8 half[FROM][TO], d[FROM], t[TO];
  for (int i = 0; i < FROM; i++) {
    for (int j = 0; j < FROM; j++) d[j] = from(i, j);
    once(d, half[i]);
  }
  for (int j = 0; j < TO; j++) {
    for (int i = 0; i < FROM; i++) d[i] = half[i][j];
    once(d, t);
    for (int i = 0; i < TO; i++) to(i, j, t[i]);
  }
}

// Vectors of columns, and rows, of a matrix product that fit into the registers.
inline int vectors(long columns) { return columns % 24 == 0 ? 3 : columns % 16 == 0 ? 2 : 1; }
inline int rows_of(int vectors) { return vectors == 3 ? 4 : vectors == 2 ? 6 : 12; }
inline long up_to(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }
// Distance between matrices: a cache line more than their size, otherwise 36 stores often compete
// for the same eight cache lines.
inline long matrix(long rows, long columns) { return rows * columns + 16; }

// m = v u, for ROWS x VECTORS of m at a time; u is (channels, 8 VECTORS).
template <int ROWS, int VECTORS>
void multiply(const float* v, const float* u, float* m, long tiles, long channels, long out) {
  for (long t = 0; t < tiles; t += ROWS, v += ROWS * channels, m += ROWS * out) {
    v8 sums[ROWS][VECTORS];
    for (auto& row : sums)
      for (auto& sum : row) sum = all(0.f);
    const float* w = u;
    for (long k = 0; k < channels; k++, w += LANES * VECTORS) {
      v8 b[VECTORS];
      for (int j = 0; j < VECTORS; j++) b[j] = load(w + LANES * j);
      for (int i = 0; i < ROWS; i++) {
        const v8 a = _mm256_broadcast_ss(v + i * channels + k);
        for (int j = 0; j < VECTORS; j++) sums[i][j] = fma(a, b[j], sums[i][j]);
      }
    }
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < VECTORS; j++) store(m + i * out + LANES * j, sums[i][j]);
  }
}

// s += gᵀ v, for 4 rows and VECTORS of columns: s is (out, channels), g (tiles, out).
template <int VECTORS>
void accumulate(const float* g, const float* v, float* s, long tiles, long channels, long out) {
  v8 sums[4][VECTORS];
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < VECTORS; j++) sums[i][j] = load(s + i * channels + LANES * j);
  for (long t = 0; t < tiles; t++, g += out, v += channels) {
    v8 b[VECTORS];
    for (int j = 0; j < VECTORS; j++) b[j] = load(v + LANES * j);
    for (int i = 0; i < 4; i++) {
      const v8 a = _mm256_broadcast_ss(g + i);
      for (int j = 0; j < VECTORS; j++) sums[i][j] = fma(a, b[j], sums[i][j]);
    }
  }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < VECTORS; j++) store(s + i * channels + LANES * j, sums[i][j]);
}

// The convolution's input: x itself, SiLU(x scale + shift), or x with its pixels repeated.
struct Input {
  const float *x, *scale, *shift;  // scale and shift: (batch, channels), or null
  long batch, height, width, channels;  // of the convolution's input
  int upsample;                         // whether x is half as high and wide

  long rows() const { return height / 4; }
  long columns() const { return width / 4; }
  long wide() const { return (width + 2) * channels; }

  void fill_row(long b, long row, float* to) const {
    const long n = width * channels;
    if (row < 0 || row >= height) {
      memset(to, 0, sizeof(float) * wide());
      return;
    }
    memset(to, 0, sizeof(float) * channels);
    to += channels;
    memset(to + n, 0, sizeof(float) * channels);
    if (upsample) {
      const float* from = x + (b * height + row / 2 * 2) / 2 * (n / 2);
      for (long j = 0; j < width; j++)
        memcpy(to + j * channels, from + j / 2 * channels, sizeof(float) * channels);
      return;
    }
    const float* from = x + (b * height + row) * n;
    if (!scale) {
      memcpy(to, from, sizeof(float) * n);
      return;
    }
    for (long j = 0; j < n; j += channels)
      for (long k = 0; k < channels; k += LANES) {
        const long of = b * channels + k;
        const v8 a = fma(load(from + j + k), load(scale + of), load(shift + of));
        store(to + j + k, mul(a, sigmoid(a)));
      }
  }

  // Writes the tiles of the q-th row of tiles as rows of the matrices v, at a distance `apart`.
  // `lines` holds six lines of the input; two of them are reused if the row `before` is the one
  // above.
  void transform(long q, long before, float* lines, float* v, long apart) const {
    const long b = q / rows(), r = q % rows();
    const bool below = r > 0 && before == q - 1;
    if (below) memcpy(lines, lines + 4 * wide(), sizeof(float) * 2 * wide());
    for (int i = below ? 2 : 0; i < 6; i++) fill_row(b, 4 * r - 1 + i, lines + i * wide());
    for (long column = 0; column < columns(); column++, v += channels)
      for (long k = 0; k < channels; k += LANES) {
        const float* from = lines + 4 * column * channels + k;
        float* to = v + k;
        both_ways<6, 6>(
            input_1d, [&](int i, int j) { return load(from + i * wide() + j * channels); },
            [&](int i, int j, v8 a) { store(to + (6 * i + j) * apart, a); });
      }
  }
};

struct Memory {
  float* start;
  explicit Memory(long numbers)
      : start(static_cast<float*>(aligned_alloc(64, up_to(sizeof(float) * numbers, 64)))) {}
  ~Memory() { free(start); }
};

// Sums two values per pixel over a part of an image, for each channel; of(k, offset, a, b) adds
// the values to a and b. The sums are float32 within blocks and float64 over blocks.
template <typename Of>
void sum_part(long from, long to, long channels, double* sums, Of of) {
  std::fill(sums, sums + 2 * channels, 0.);
  for (long start = from; start < to; start += BLOCK)
    for (long k = 0; k < channels; k += LANES) {
      v8 first = all(0.f), second = all(0.f);
      for (long i = start; i < std::min(to, start + BLOCK); i++)
        of(k, i * channels + k, first, second);
      float one[LANES], two[LANES];
      store(one, first);
      store(two, second);
      for (int l = 0; l < LANES; l++) sums[k + l] += one[l], sums[channels + k + l] += two[l];
    }
}

}  // namespace

extern "C" {

// The mean μ and 1/s, s = √(v + eps), of each image and group, (batch, groups), and
// scale = γ / s, shift = β - μ γ / s, (batch, channels). Returns 0 if there is no memory.
int lab_moments(const float* x, long batch, long pixels, long channels, long groups,
                const float* gamma, const float* beta, float eps, float* mean, float* rstd,
                float* scale, float* shift) {
  const long parts = (pixels + PART - 1) / PART, each = channels / groups;
  Memory memory(4 * batch * parts * channels);
  if (!memory.start) return 0;
  double* partial = reinterpret_cast<double*>(memory.start);
#pragma omp parallel for
  for (long task = 0; task < batch * parts; task++) {
    const long b = task / parts, start = task % parts * PART;
    const float* image = x + b * pixels * channels;
    sum_part(start, std::min(pixels, start + PART), channels, partial + 2 * task * channels,
             [&](long k, long at, v8& sum, v8& squares) {
               const v8 a = sub(load(image + at), load(image + k));
               sum = add(sum, a);
               squares = fma(a, a, squares);
             });
  }
  for (long b = 0; b < batch; b++)
    for (long g = 0; g < groups; g++) {
      // The channel's first value is subtracted before summing, since the square of a large mean
      // would cancel a small variance. So each channel has its own v, and the group's is
      // mean(v) + mean(μ²) - mean(μ)², where the group's first value is subtracted from μ.
      const float* first = x + b * pixels * channels;
      double mu = 0, square = 0;
      for (long k = g * each; k < (g + 1) * each; k++) {
        double sum = 0, squares = 0;
        for (long part = 0; part < parts; part++) {
          sum += partial[2 * (b * parts + part) * channels + k];
          squares += partial[(2 * (b * parts + part) + 1) * channels + k];
        }
        const double m = sum / pixels, v = squares / pixels - m * m;
        const double apart = m + (static_cast<double>(first[k]) - first[g * each]);
        mu += apart / each;
        square += (v + apart * apart) / each;
      }
      const double r = 1 / std::sqrt(std::max(0., square - mu * mu) + eps);
      mu += first[g * each];
      mean[b * groups + g] = mu;
      rstd[b * groups + g] = r;
      for (long k = g * each; k < (g + 1) * each; k++) {
        scale[b * channels + k] = r * gamma[k];
        shift[b * channels + k] = beta[k] - mu * r * gamma[k];
      }
    }
  return 1;
}

// Overwrites d, the gradient of SiLU(a), a = x scale + shift, by that of x; writes d_gamma and
// d_beta, those of γ and β, (channels). Returns 0 if there is no memory.
int lab_norm_silu_backward(float* d, const float* x, long batch, long pixels, long channels,
                           long groups, const float* gamma, const float* mean, const float* rstd,
                           const float* scale, const float* shift, float* d_gamma,
                           float* d_beta) {
  const long parts = (pixels + PART - 1) / PART, each = channels / groups;
  Memory memory(4 * batch * parts * channels + 3 * batch * channels);
  if (!memory.start) return 0;
  double* partial = reinterpret_cast<double*>(memory.start);
  // d_x = d_a scale - (x - μ) k + constant, with μ, k and the constant of each channel's group.
  float* mu_of = memory.start + 4 * batch * parts * channels;
  float *k_of = mu_of + batch * channels, *constant_of = k_of + batch * channels;
  for (long i = 0; i < batch * channels; i++) mu_of[i] = mean[i / each];
#pragma omp parallel for
  for (long task = 0; task < batch * parts; task++) {
    const long b = task / parts, start = task % parts * PART;
    const float* image = x + b * pixels * channels;
    float* gradient = d + b * pixels * channels;
    sum_part(start, std::min(pixels, start + PART), channels, partial + 2 * task * channels,
             [&](long k, long at, v8& sum, v8& products) {
               const v8 numbers = load(image + at), g = load(gradient + at);
               const v8 a = fma(numbers, load(scale + b * channels + k),
                                load(shift + b * channels + k));
               const v8 s = sigmoid(a);
               const v8 d_a = mul(mul(g, s), fma(a, sub(all(1.f), s), all(1.f)));
               store(gradient + at, d_a);
               sum = add(sum, d_a);
               products = fma(d_a, sub(numbers, load(mu_of + b * channels + k)), products);
             });
  }
  std::fill(d_gamma, d_gamma + channels, 0.f);
  std::fill(d_beta, d_beta + channels, 0.f);
  for (long b = 0; b < batch; b++)
    for (long g = 0; g < groups; g++) {
      const double r = rstd[b * groups + g];
      double of_scale = 0, of_shift = 0;  // Σ d_a γ x̂ and Σ d_a γ
      for (long k = g * each; k < (g + 1) * each; k++) {
        double sum = 0, products = 0;
        for (long part = 0; part < parts; part++) {
          sum += partial[2 * (b * parts + part) * channels + k];
          products += partial[(2 * (b * parts + part) + 1) * channels + k];
        }
        const double of_gamma = products * r;
        d_gamma[k] += of_gamma;
        d_beta[k] += sum;
        of_scale += of_gamma * gamma[k];
        of_shift += sum * gamma[k];
      }
      const double n = static_cast<double>(each) * pixels;
      for (long k = b * channels + g * each; k < b * channels + (g + 1) * each; k++) {
        k_of[k] = of_scale * r * r / n;
        constant_of[k] = -of_shift * r / n;
      }
    }
#pragma omp parallel for
  for (long task = 0; task < batch * parts; task++) {
    const long b = task / parts, start = task % parts * PART;
    for (long i = start; i < std::min(pixels, start + PART); i++)
      for (long k = 0; k < channels; k += LANES) {
        const long at = (b * pixels + i) * channels + k, of = b * channels + k;
        const v8 from_mean = sub(load(x + at), load(mu_of + of));
        const v8 rest = nfma(from_mean, load(k_of + of), load(constant_of + of));
        store(d + at, fma(load(d + at), load(scale + of), rest));
      }
  }
  return 1;
}

// u = G w Gᵀ, (36, out / n, channels, n) with n = 8 vectors(out), of w, (out, 3, 3, channels). If
// `transposed`, u is that of the input's gradient: w is (channels, 3, 3, out) and rotated by 180°.
int lab_transform_weight(const float* w, long channels, long out, int transposed, float* u) {
  const long n = LANES * vectors(out), some = 8, run = some * n;
#pragma omp parallel for collapse(2)
  for (long first = 0; first < out; first += n)
    for (long start = 0; start < channels; start += some) {
      alignas(32) float buffer[36][24 * some];  // contiguous runs of u, which are far apart
      for (long o = 0; o < n; o += LANES)
        for (long k = 0; k < some; k++)
          both_ways<3, 6>(
              weight_1d,
              [&](int i, int j) {
                if (transposed)
                  return load(w + (((start + k) * 3 + 2 - i) * 3 + 2 - j) * out + first + o);
                const float* p = w + (((first + o) * 3 + i) * 3 + j) * channels + start + k;
                const long s = 9 * channels;
                return _mm256_setr_ps(p[0], p[s], p[2 * s], p[3 * s], p[4 * s], p[5 * s],
                                      p[6 * s], p[7 * s]);
              },
              [&](int i, int j, v8 a) { store(buffer[6 * i + j] + k * n + o, a); });
      for (long i = 0; i < 36; i++)
        memcpy(u + (i * out + first) * channels + start * n, buffer[i], sizeof(float) * run);
    }
  return 1;
}

// y = conv(input) + bias + time + skip; each of the last three may be null: (out),
// (batch, out) and y's shape. Returns 0 if there is no memory.
int lab_convolve(const float* x, long batch, long height, long width, long channels,
                 const float* scale, const float* shift, int upsample, const float* u, long out,
                 const float* bias, const float* time, const float* skip, float* y) {
  const Input input{x, scale, shift, batch, height, width, channels, upsample};
  const long rows = input.rows(), columns = input.columns(), all_rows = batch * rows;
  const int wide = vectors(out), high = rows_of(wide), threads = omp_get_max_threads();
  const long share = (all_rows + threads - 1) / threads;
  const long some = std::max(1L, std::min(share, TILES / columns));  // rows of tiles at a time
  const long chunks = (all_rows + some - 1) / some, most = up_to(some * columns, high);
  const long apart_v = matrix(most, channels), apart_m = matrix(most, out);
  const long each = up_to(36 * (apart_v + apart_m) + 6 * input.wide(), 16);
  Memory memory(threads * each);
  if (!memory.start) return 0;
#pragma omp parallel for schedule(dynamic)
  for (long chunk = 0; chunk < chunks; chunk++) {
    float* v = memory.start + omp_get_thread_num() * each;
    float *m = v + 36 * apart_v, *lines = m + 36 * apart_m;
    const long first = chunk * some, last = std::min(all_rows, first + some);
    const long tiles = (last - first) * columns, padded = up_to(tiles, high);
    for (long q = first; q < last; q++)
      input.transform(q, q == first ? -2 : q - 1, lines, v + (q - first) * columns * channels,
                      apart_v);
    for (int k = 0; k < 36; k++) {
      float* a = v + k * apart_v;
      memset(a + tiles * channels, 0, sizeof(float) * (padded - tiles) * channels);
      for (long o = 0; o < out; o += LANES * wide) {
        const float* w = u + (k * out + o) * channels;
        float* to = m + k * apart_m + o;
        if (wide == 3) multiply<4, 3>(a, w, to, padded, channels, out);
        if (wide == 2) multiply<6, 2>(a, w, to, padded, channels, out);
        if (wide == 1) multiply<12, 1>(a, w, to, padded, channels, out);
      }
    }
    for (long t = 0; t < tiles; t++) {
      const long q = first + t / columns, b = q / rows;
      const long pixel = 4 * q * width + 4 * (t % columns);
      for (long o = 0; o < out; o += LANES) {
        v8 constant = bias ? load(bias + o) : all(0.f);
        if (time) constant = add(constant, load(time + b * out + o));
        both_ways<6, 4>(
            output_1d,
            [&](int i, int j) { return load(m + (6 * i + j) * apart_m + t * out + o); },
            [&](int i, int j, v8 a) {
              const long at = (pixel + i * width + j) * out + o;
              a = add(a, constant);
              store(y + at, skip ? add(a, load(skip + at)) : a);
            });
      }
    }
  }
  return 1;
}

// The gradients d_w, (out, 3, 3, channels), and d_time, (batch, out), for the result's gradient,
// (batch, height, width, out). Returns 0 if there is no memory.
int lab_weight_gradient(const float* x, long batch, long height, long width, long channels,
                        const float* scale, const float* shift, int upsample,
                        const float* gradient, long out, float* d_w, float* d_time) {
  const Input input{x, scale, shift, batch, height, width, channels, upsample};
  const long rows = input.rows(), columns = input.columns(), all_rows = batch * rows;
  const int wide = vectors(channels), threads = omp_get_max_threads();
  const long fitting = BYTES / (36 * sizeof(float) * (channels + out) * columns);
  const long some = std::max(1L, std::min(all_rows, fitting)), most = some * columns;
  const long each = up_to(6 * input.wide(), 16);
  const long apart_v = matrix(most, channels), apart_g = matrix(most, out);
  const long apart_s = matrix(out, channels);
  Memory memory(36 * (apart_v + apart_g + apart_s) + threads * each + all_rows * out);
  if (!memory.start) return 0;
  float *v = memory.start, *g = v + 36 * apart_v, *s = g + 36 * apart_g;
  float *all_lines = s + 36 * apart_s, *row_sums = all_lines + threads * each;
#pragma omp parallel
  {
    float* lines = all_lines + omp_get_thread_num() * each;
#pragma omp for
    for (long k = 0; k < 36; k++) memset(s + k * apart_s, 0, sizeof(float) * apart_s);
    for (long first = 0; first < all_rows; first += some) {
      const long last = std::min(all_rows, first + some), tiles = (last - first) * columns;
      long before = -2;
#pragma omp for schedule(static)
      for (long q = first; q < last; q++) {
        input.transform(q, before, lines, v + (q - first) * columns * channels, apart_v);
        before = q;
        for (long o = 0; o < out; o += LANES) {
          v8 sum = all(0.f);
          for (long column = 0; column < columns; column++) {
            const float* from = gradient + (4 * q * width + 4 * column) * out + o;
            float* to = g + ((q - first) * columns + column) * out + o;
            both_ways<4, 6>(
                gradient_1d,
                [&](int i, int j) {
                  const v8 value = load(from + (i * width + j) * out);
                  sum = add(sum, value);
                  return value;
                },
                [&](int i, int j, v8 a) { store(to + (6 * i + j) * apart_g, a); });
          }
          store(row_sums + q * out + o, sum);
        }
      }
#pragma omp for schedule(dynamic)
      for (long k = 0; k < 36; k++)
        for (long t = 0; t < tiles; t += DEEP)
          for (long o = 0; o < out; o += 4)
            for (long column = 0; column < channels; column += LANES * wide) {
              const float* a = g + k * apart_g + t * out + o;
              const float* b = v + k * apart_v + t * channels + column;
              float* to = s + k * apart_s + o * channels + column;
              const long deep = std::min(DEEP, tiles - t);
              if (wide == 3) accumulate<3>(a, b, to, deep, channels, out);
              if (wide == 2) accumulate<2>(a, b, to, deep, channels, out);
              if (wide == 1) accumulate<1>(a, b, to, deep, channels, out);
            }
    }
#pragma omp for
    for (long b = 0; b < batch; b++)
      for (long o = 0; o < out; o++) {
        double sum = 0;
        for (long q = b * rows; q < (b + 1) * rows; q++) sum += row_sums[q * out + o];
        d_time[b * out + o] = sum;
      }
#pragma omp for collapse(2)
    for (long o = 0; o < out; o++)
      for (long k = 0; k < channels; k += LANES)
        both_ways<6, 3>(
            weight_gradient_1d,
            [&](int i, int j) { return load(s + (6 * i + j) * apart_s + o * channels + k); },
            [&](int i, int j, v8 a) { store(d_w + ((o * 3 + i) * 3 + j) * channels + k, a); });
  }
  return 1;
}

}  // extern "C"
