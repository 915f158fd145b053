#include "stored.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "cpu/quantize.h"

namespace quantkit::host {
namespace {

constexpr std::int64_t kUnit = 128;

float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float from_half(std::uint16_t half) {
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 31) return sign * (mantissa ? NAN : INFINITY);
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

// A number that fp16 holds exactly, or infinity or NaN.
std::uint16_t to_half(float value) {
  const std::uint32_t bits = bits_of(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (!std::isfinite(value)) return sign | (std::isnan(value) ? 0x7e00 : 0x7c00);
  if (size < 0x1p-14f) return sign | static_cast<std::uint16_t>(std::lrint(size * 0x1p24f));
  return sign | static_cast<std::uint16_t>(((bits & 0x7fffffff) - (112u << 23)) >> 13);
}

std::vector<float> read_floats(const MappedFile& file, std::size_t begin, const std::string& dtype,
                               std::size_t count) {
  std::vector<float> values(count);
  if (dtype == "F32") {
    read_at(file, begin, values.data(), count * sizeof(float));
  } else if (dtype == "BF16" || dtype == "F16") {
    std::vector<std::uint16_t> raw(count);
    read_at(file, begin, raw.data(), count * sizeof(raw[0]));
    std::transform(raw.begin(), raw.end(), values.begin(), [&](std::uint16_t bits) {
      return dtype == "F16" ? from_half(bits)
                            : float_of_bits(static_cast<std::uint32_t>(bits) << 16);
    });
  } else if (dtype == "F8_E8M0") {
    std::vector<std::uint8_t> raw(count);
    read_at(file, begin, raw.data(), count);
    std::transform(raw.begin(), raw.end(), values.begin(), [](std::uint8_t exponent) {
      return exponent == 255 ? NAN : std::ldexp(1.0f, exponent - 127);
    });
  } else {
    throw std::invalid_argument("scales of dtype " + dtype);
  }
  return values;
}

}  // namespace

qk::DType dtype_of(const std::string& name) {
  if (name == "F32") return qk::DType::kFloat32;
  if (name == "F16") return qk::DType::kFloat16;
  if (name == "BF16") return qk::DType::kBFloat16;
  throw std::invalid_argument("no kernel for weights of dtype " + name);
}

std::int64_t size_of(qk::DType dtype) { return dtype == qk::DType::kFloat32 ? 4 : 2; }

void read_at(const MappedFile& file, std::size_t offset, void* to, std::size_t nbytes) {
  auto* target = static_cast<char*>(to);
  while (nbytes > 0) {
    const ssize_t got = ::pread(file.fd(), target, std::min<std::size_t>(nbytes, 1 << 30),
                                static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw OsError(errno, "reading", file.path());
    if (got == 0) {
      throw OsError(EIO, "reading: the file became shorter after it was opened", file.path());
    }
    target += got;
    offset += static_cast<std::size_t>(got);
    nbytes -= static_cast<std::size_t>(got);
  }
}

Scales::Scales(const MappedFile& file, std::size_t begin, const std::string& dtype,
               std::int64_t rows, std::int64_t cols)
    : rows_(rows),
      cols_(cols),
      values_(read_floats(file, begin, dtype, static_cast<std::size_t>(rows * cols))) {}

bool Scales::finite() const {
  return std::all_of(values_.begin(), values_.end(), [](float v) { return std::isfinite(v); });
}

bool Scales::positive() const {
  return std::all_of(values_.begin(), values_.end(),
                     [](float v) { return std::isfinite(v) && v > 0; });
}

float Scales::largest() const {
  return values_.empty() ? 0.0f : *std::max_element(values_.begin(), values_.end());
}

std::vector<std::byte> stored_as(qk::DType dtype, const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * static_cast<std::size_t>(size_of(dtype)));
  if (dtype == qk::DType::kFloat32) {
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
  }
  std::vector<std::uint16_t> halves(values.size());
  std::transform(values.begin(), values.end(), halves.begin(), [&](float value) {
    return dtype == qk::DType::kFloat16 ? to_half(value)
                                        : static_cast<std::uint16_t>(bits_of(value) >> 16);
  });
  std::memcpy(bytes.data(), halves.data(), bytes.size());
  return bytes;
}

Weight::Weight(std::shared_ptr<const MappedFile> file, std::size_t begin, const std::string& dtype,
               std::int64_t rows, std::int64_t cols)
    : file_(std::move(file)), begin_(begin), dtype_(dtype_of(dtype)), rows_(rows), cols_(cols) {}

Weight::Weight(std::shared_ptr<const MappedFile> file, std::size_t begin, const std::string& dtype,
               std::int64_t rows, std::int64_t cols, Scales scales, std::int64_t block_rows,
               std::int64_t block_cols)
    : Weight(std::move(file), begin, dtype, rows, cols) {
  if (scales.rows() != (rows + block_rows - 1) / block_rows ||
      scales.cols() != (cols + block_cols - 1) / block_cols) {
    throw std::invalid_argument("scales of another grid than the blocks make");
  }
  scales_ = std::move(scales);
  block_rows_ = block_rows;
  block_cols_ = block_cols;
}

std::int64_t Weight::step(std::int64_t part, std::int64_t block_rows) const {
  const std::int64_t unit =
      std::lcm(std::lcm(kUnit, std::max<std::int64_t>(1, block_rows)), scales_ ? block_rows_ : 1);
  const std::int64_t bytes = std::max<std::int64_t>(1, unit * cols_ * size_of(dtype_));
  return std::max<std::int64_t>(1, part / bytes) * unit;
}

void Weight::read(std::int64_t first, std::int64_t end, std::vector<char>& to) const {
  const std::int64_t elements = (end - first) * cols_;
  to.resize(static_cast<std::size_t>(elements * size_of(dtype_)));
  const std::int64_t stored = scales_ ? 1 : size_of(dtype_);
  const std::size_t offset = begin_ + static_cast<std::size_t>(first * cols_ * stored);
  if (!scales_) return read_at(*file_, offset, to.data(), to.size());
  std::vector<char> codes(static_cast<std::size_t>(elements));
  read_at(*file_, offset, codes.data(), codes.size());
  const float* scale = scales_->values().data() + first / block_rows_ * scales_->cols();
  qk::quantize_kernels().dequantize(
      qk::DType::kFloat8E4M3, {codes.data(), cols_, cols_, 0, end - first},
      {scale, nullptr, scales_->cols(), block_rows_, block_cols_}, dtype_, to.data());
}

}  // namespace quantkit::host
