// The part of quantkit._host that works on weights: see rounding.h.
#include "weights_module.h"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <stdexcept>
#include <tuple>

#include "cpu/dispatch.h"
#include "rounding.h"

namespace quantkit::host {

namespace py = pybind11;

namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;
using At = std::pair<const OutputFile*, std::size_t>;
using In = std::pair<const MappedFile*, std::size_t>;

Rounding rounding(const std::string& type, bool packed, int bits, bool symmetric,
                  std::pair<int, int> range, double divisor, const std::string& scale_dtype,
                  std::pair<std::int64_t, std::int64_t> block) {
  if (type != "int" && type != "float") throw std::invalid_argument("no codes of type " + type);
  if ((bits != 4 && bits != 8) || (type == "float" && (bits != 8 || packed || !symmetric))) {
    throw std::invalid_argument("no codes of " + std::to_string(bits) + " bits, type " + type);
  }
  for (const std::int64_t size : {block.first, block.second}) {
    if (size != -1 && size <= 0) throw std::invalid_argument("a block of no rows or columns");
  }
  return {type == "float",
          packed,
          bits,
          symmetric,
          range.first,
          range.second,
          static_cast<float>(divisor),
          dtype_of(scale_dtype),
          block.first,
          block.second};
}

std::optional<std::vector<std::int64_t>> round(const Weight& weight, const Rounding& how,
                                               std::int64_t part, At codes, At scales,
                                               std::optional<At> zero_points) {
  qk::current_isa();
  std::optional<Place> zeros;
  if (zero_points) zeros = Place{zero_points->first, zero_points->second};
  return round_weight(weight, how, part, {codes.first, codes.second}, {scales.first, scales.second},
                      zeros);
}

std::tuple<double, double, double, double> compare(const Weight& weight, const Rounding& how,
                                                   std::int64_t part, In codes,
                                                   const Scales& scales,
                                                   std::optional<In> zero_points) {
  qk::current_isa();
  std::optional<Found> zeros;
  if (zero_points) zeros = Found{zero_points->first, zero_points->second};
  const Difference found =
      compare_weight(weight, how, part, {codes.first, codes.second}, scales, zeros);
  return {found.noise, found.signal, found.largest, found.peak};
}

bool same(In a, In b, std::size_t nbytes, std::size_t part) {
  return same_bytes({a.first, a.second}, {b.first, b.second}, nbytes, part);
}

}  // namespace

void define_weights(py::module_& m) {
  py::class_<Scales>(m, "Scales", "Scales of blocks, as fp32, from F32, BF16, F16 or F8_E8M0.")
      .def(py::init<const MappedFile&, std::size_t, const std::string&, std::int64_t,
                    std::int64_t>(),
           py::arg("file"), py::arg("begin"), py::arg("dtype"), py::arg("rows"), py::arg("cols"),
           Unlocked())
      .def_property_readonly("finite", &Scales::finite)
      .def_property_readonly("positive", &Scales::positive)
      .def_property_readonly("largest", &Scales::largest);

  using File = std::shared_ptr<MappedFile>;
  py::class_<Weight>(m, "Weight", "A weight in a file, plain or in FP8 with scales for blocks.")
      .def(py::init([](const File& file, std::size_t begin, const std::string& dtype,
                       std::int64_t rows,
                       std::int64_t cols) { return Weight(file, begin, dtype, rows, cols); }),
           py::arg("file"), py::arg("begin"), py::arg("dtype"), py::arg("rows"), py::arg("cols"))
      .def(py::init([](const File& file, std::size_t begin, const std::string& dtype,
                       std::int64_t rows, std::int64_t cols, const Scales& scales,
                       std::pair<std::int64_t, std::int64_t> block) {
             return Weight(file, begin, dtype, rows, cols, scales, block.first, block.second);
           }),
           py::arg("file"), py::arg("begin"), py::arg("dtype"), py::arg("rows"), py::arg("cols"),
           py::arg("scales"), py::arg("block"));

  py::class_<Rounding>(m, "Rounding", "How a weight becomes codes.")
      .def(py::init(&rounding), py::kw_only(), py::arg("type"), py::arg("packed"), py::arg("bits"),
           py::arg("symmetric"), py::arg("range"), py::arg("divisor"), py::arg("scale_dtype"),
           py::arg("block"));

  m.def("round_weight", &round, py::arg("weight"), py::arg("rounding"), py::arg("part"),
        py::arg("codes"), py::arg("scales"), py::arg("zero_points"), Unlocked(),
        "Round a weight into files, some `part` bytes of it at a time; places are (file, offset). "
        "None, or the rows of the first part that has NaN or Inf.");
  m.def("compare_weight", &compare, py::arg("weight"), py::arg("rounding"), py::arg("part"),
        py::arg("codes"), py::arg("scales"), py::arg("zero_points"), Unlocked(),
        "Sum of squared errors, sum of squares, largest |error|, largest magnitude of a weight and "
        "what was made of it; places are (file, offset).");
  m.def("same_bytes", &same, py::arg("a"), py::arg("b"), py::arg("nbytes"), py::arg("part"),
        Unlocked(), "Whether bytes of two files, from (file, offset) each, are the same.");
}

}  // namespace quantkit::host
