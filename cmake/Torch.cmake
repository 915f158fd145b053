# Finds torch by asking the Python interpreter, and makes two targets of it:
#
#   torch_stable        headers and libtorch_cpu of the stable ABI, target 2.11: the binary serves every torch >= 2.11
#   torch_stable_cuda   the same with the CUDA shims declared, and libtorch_cuda when this torch has it
#
# Not find_package(Torch): with a CUDA build of torch that enables CUDA with an architecture list of its own and links
# far more than two libraries.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "import torch; print(torch.__file__, torch.__version__, sep=';')"
  OUTPUT_VARIABLE _torch
  ERROR_VARIABLE _torch_error
  RESULT_VARIABLE _torch_status
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT _torch_status EQUAL 0)
  message(
    FATAL_ERROR
      "quantkit is compiled against the torch of the environment it is installed into, and ${Python_EXECUTABLE} cannot import "
      "torch. Install torch >= 2.11 there first, then quantkit with: pip install --no-build-isolation . "
      "(python said: ${_torch_error})")
endif()
list(GET _torch 0 _torch_file)
list(GET _torch 1 QUANTKIT_TORCH_VERSION)
cmake_path(GET _torch_file PARENT_PATH QUANTKIT_TORCH_ROOT)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" _torch_minor "${QUANTKIT_TORCH_VERSION}")
if(_torch_minor VERSION_LESS 2.11)
  message(FATAL_ERROR "quantkit needs torch >= 2.11, and ${Python_EXECUTABLE} has ${QUANTKIT_TORCH_VERSION}")
endif()
message(STATUS "quantkit: torch ${QUANTKIT_TORCH_VERSION} in ${QUANTKIT_TORCH_ROOT}")

add_library(torch_stable INTERFACE)
quantkit_include(torch_stable torch "${QUANTKIT_TORCH_ROOT}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000ULL)
target_link_libraries(torch_stable INTERFACE "${QUANTKIT_TORCH_ROOT}/lib/libtorch_cpu.so")

add_library(torch_stable_cuda INTERFACE)
target_link_libraries(torch_stable_cuda INTERFACE torch_stable)
target_compile_definitions(torch_stable_cuda INTERFACE USE_CUDA)
if(EXISTS "${QUANTKIT_TORCH_ROOT}/lib/libtorch_cuda.so")
  target_link_libraries(torch_stable_cuda INTERFACE "${QUANTKIT_TORCH_ROOT}/lib/libtorch_cuda.so")
endif()
