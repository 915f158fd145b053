// quantkit._host: what Python cannot do to files without copying them, and, in weights_module.cpp,
// weights rounded on their way. No torch headers; the GIL is released in every call that may touch
// a disk.
#include <pybind11/pybind11.h>
#include <pybind11/stl/filesystem.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cstddef>
#include <filesystem>
#include <memory>

#include "bus_error.h"
#include "mapped_file.h"
#include "os_error.h"
#include "output_file.h"
#include "weights_module.h"

namespace py = pybind11;
using quantkit::host::explain_bus_errors;
using quantkit::host::fsync_directory;
using quantkit::host::MappedFile;
using quantkit::host::OsError;
using quantkit::host::OutputFile;

namespace {

// glibc keeps freed blocks of up to 32 MB for later, which a run of bounded memory cannot afford.
void release_free_memory() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

// While `keep`, blocks of up to 32 MB come from the heap, and the heap does not shrink by itself
// below 1 GB of free room: pages that come back have to be cleared again. Else as glibc itself has
// it once blocks of that size have been freed.
void keep_free_memory(bool keep) {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, keep ? 1 << 30 : 64 << 20);
#else
  static_cast<void>(keep);
#endif
}

// What is freed goes back at once, but for crumbs: for a run that counts its bytes.
void return_free_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 1 << 20);
  mallopt(M_TRIM_THRESHOLD, 8 << 20);
#endif
}

using Unlocked = py::call_guard<py::gil_scoped_release>;

void raise_os_error(const OsError& error) {
  const py::object exception = py::reinterpret_borrow<py::object>(PyExc_OSError)(
      error.code(), error.message(), py::cast(error.path()).attr("__fspath__")());
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
}

py::buffer_info buffer_of(const MappedFile& file) {
  static std::byte empty{};
  std::byte* data = file.data() != nullptr ? file.data() : &empty;
  // Declared writable although the pages are not: torch warns about a read-only buffer on every
  // import of it and protects nothing. The kernel does.
  return {reinterpret_cast<unsigned char*>(data), static_cast<py::ssize_t>(file.size())};
}

void write_buffer(const OutputFile& file, const py::buffer& data, std::size_t offset) {
  const py::buffer_info info = data.request();
  py::ssize_t expected = info.itemsize;
  for (py::ssize_t i = info.ndim - 1; i >= 0; --i) {
    if (info.shape[i] > 1 && info.strides[i] != expected) {
      throw py::value_error("write: the buffer must be contiguous");
    }
    expected *= info.shape[i];
  }
  const auto nbytes = static_cast<std::size_t>(info.size * info.itemsize);
  const py::gil_scoped_release unlocked;
  file.write(info.ptr, nbytes, offset);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() =
      "Checkpoints without torch: mapped input, reserved output, weights rounded from one to the "
      "other.";

  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const OsError& error) {
      raise_os_error(error);
    }
  });

  py::class_<MappedFile, std::shared_ptr<MappedFile>>(
      m, "MappedFile", py::buffer_protocol(),
      "A file mapped read-only; a buffer of its bytes, unmapped with its last user. "
      "Writing into the buffer is a segmentation fault.")
      .def(py::init<std::filesystem::path>(), py::arg("path"), Unlocked())
      .def_buffer(&buffer_of)
      .def_property_readonly("path", &MappedFile::path)
      .def_property_readonly("size", &MappedFile::size)
      .def("fileno", &MappedFile::fd)
      .def("populate", &MappedFile::populate, py::arg("begin"), py::arg("end"), Unlocked(),
           "Read and map bytes [begin, end); OSError where an access would have been a SIGBUS.")
      .def("prefetch", &MappedFile::prefetch, py::arg("begin"), py::arg("end"), Unlocked(),
           "Start reading bytes [begin, end) into the page cache; returns at once.")
      .def("drop", &MappedFile::drop, py::arg("begin"), py::arg("end"), Unlocked(),
           "Unmap the pages of [begin, end) so that they no longer count as resident.");

  py::class_<OutputFile>(
      m, "OutputFile",
      "A file of `size` bytes, reserved on disk at once: a new one, or one that is there already.")
      .def(py::init<std::filesystem::path, std::size_t, bool>(), py::arg("path"), py::arg("size"),
           py::arg("reopen") = false, Unlocked())
      .def_property_readonly("path", &OutputFile::path)
      .def_property_readonly("size", &OutputFile::size)
      .def("write", &write_buffer, py::arg("data"), py::arg("offset"),
           "Write a contiguous buffer at `offset`.")
      .def(
          "copy_from",
          [](const OutputFile& file, const MappedFile& source, std::size_t source_offset,
             std::size_t offset, std::size_t nbytes) {
            file.copy_from(source.fd(), source.path(), source_offset, offset, nbytes);
          },
          py::arg("source"), py::arg("source_offset"), py::arg("offset"), py::arg("nbytes"),
          Unlocked(), "Copy bytes of a mapped file inside the kernel, without mapping them.")
      .def("start_writeback", &OutputFile::start_writeback, py::arg("begin"), py::arg("end"),
           Unlocked(), "Let the disk start on bytes [begin, end).")
      .def("sync", &OutputFile::sync, Unlocked(), "fsync.")
      .def("close", &OutputFile::close, Unlocked());

  m.def("fsync_directory", &fsync_directory, py::arg("path"), Unlocked(),
        "Make the folder's entries durable.");
  m.def("release_free_memory", &release_free_memory, Unlocked(),
        "Give memory that malloc holds but nobody uses back to the system.");
  m.def("keep_free_memory", &keep_free_memory, py::arg("keep"), Unlocked(),
        "Whether malloc holds on to up to 1 GB of memory that nobody uses.");
  m.def(
      "explain_bus_errors", &explain_bus_errors, py::arg("message"), py::arg("status"),
      "Write `message` to stderr and exit with `status` where a mapped file is gone at an access.");
  m.def("return_free_memory", &return_free_memory, Unlocked(),
        "From now on malloc holds on to hardly any memory that nobody uses.");
  quantkit::host::define_weights(m);
}
