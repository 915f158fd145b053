# _host: a CPython module by pybind11, without torch. Of the CPU kernels it has those that it calls.
if(NOT QUANTKIT_HOST)
  message(STATUS "quantkit: the module _host is left out (QUANTKIT_HOST=OFF), and with it checkpoint I/O")
  return()
endif()
# The interpreter's own pybind11, asked for anew each time: a build folder may outlive its environment.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
  OUTPUT_VARIABLE _pybind11_dir
  ERROR_QUIET
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(_pybind11_dir)
  set(pybind11_DIR "${_pybind11_dir}")
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 3.0 CONFIG QUIET)
if(NOT pybind11_FOUND)
  message(
    FATAL_ERROR
      "quantkit's module _host needs pybind11 >= 3.0, and ${Python_EXECUTABLE} has none: pip install pybind11 there, pass "
      "-Dpybind11_DIR=..., or leave the module out with -DQUANTKIT_HOST=OFF")
endif()

# The same headers by a path that does not change with the environment.
set_target_properties(pybind11::pybind11_headers PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "")
quantkit_include(pybind11::pybind11_headers pybind11 "${pybind11_INCLUDE_DIR}")

file(GLOB _sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/host/*.cpp")
pybind11_add_module(_host MODULE NO_EXTRAS ${_sources}) # no link-time optimisation: these functions wait for disks
target_link_libraries(_host PRIVATE quantkit_flags quantkit_cpu_archive)
install(TARGETS _host LIBRARY DESTINATION ${QUANTKIT_PACKAGE_DIR})
