# _C_cuda: kernels by nvcc without any torch header, the torch boundary by the C++ compiler. Compiled wherever nvcc is;
# neither a GPU nor a CUDA build of torch is needed for that.
set(QUANTKIT_NVCC "")
set(QUANTKIT_CUDA_ARCHS_BUILT "")
if(QUANTKIT_CUDA STREQUAL "OFF")
  message(STATUS "quantkit: CUDA kernels are left out (QUANTKIT_CUDA=OFF)")
  return()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(QUANTKIT_CUDA STREQUAL "AUTO")
    message(STATUS "quantkit: CUDA kernels are left out, no nvcc found (put it on PATH or set CUDACXX)")
    return()
  endif()
  message(FATAL_ERROR "QUANTKIT_CUDA=ON, but no nvcc was found: put it on PATH, set CUDACXX, or use QUANTKIT_CUDA=OFF")
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 90a-real) # each target below sets its own; this one only serves the compiler check
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
# CMake before 3.25.2 does not know nvcc's flag for C++20.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()

# The folder is the architecture floor: csrc/cuda/common runs from sm_80 on, csrc/cuda/sm90 needs what only sm_90a has.
set(_archs_common 80-real 86-real 89-real 90a-real)
set(_archs_sm90 90a-real)
if(QUANTKIT_CUDA_ARCHS)
  list(TRANSFORM QUANTKIT_CUDA_ARCHS REPLACE "^([0-9]+[af]?)$" "\\1-real" OUTPUT_VARIABLE _archs_common)
  set(_archs_sm90 ${_archs_common})
  list(FILTER _archs_sm90 INCLUDE REGEX "^90a")
endif()

set(_objects "")
set(_has_sm90 0)
foreach(_folder IN ITEMS common sm90)
  file(GLOB _kernels CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/cuda/${_folder}/*.cu")
  if(NOT _kernels OR NOT _archs_${_folder})
    continue()
  endif()
  set(_target quantkit_cuda_${_folder})
  add_library(${_target} OBJECT ${_kernels})
  set_target_properties(
    ${_target} PROPERTIES CUDA_ARCHITECTURES "${_archs_${_folder}}" CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON
                          CUDA_VISIBILITY_PRESET hidden)
  target_compile_options(
    # -fmad=false is nvcc's -ffp-contract=off. Registers that are spilled, and arrays in local memory, are warned of.
    ${_target} PRIVATE --expt-relaxed-constexpr -fmad=false $<$<BOOL:${QUANTKIT_WERROR}>:-Werror=all-warnings>
                       -Xptxas=--warn-on-spills,--warn-on-local-memory-usage -Xcompiler=-Wall,-Wextra)
  target_link_libraries(${_target} PRIVATE quantkit_flags)
  list(APPEND _objects ${_target})
  set(_has_${_folder} 1)
endforeach()

file(GLOB _ops CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/ops/*_cuda.cpp")
add_library(_C_cuda MODULE ${_ops})
# Whether the kernels of csrc/cuda/sm90 are part of this build.
target_compile_definitions(_C_cuda PRIVATE QUANTKIT_CUDA_SM90=${_has_sm90})
target_link_libraries(_C_cuda PRIVATE quantkit_flags ${_objects} torch_stable_cuda CUDA::cudart)
set_target_properties(_C_cuda PROPERTIES PREFIX "")
set(QUANTKIT_NVCC "${CMAKE_CUDA_COMPILER_VERSION}")
list(JOIN _archs_common " " QUANTKIT_CUDA_ARCHS_BUILT)
install(TARGETS _C_cuda LIBRARY DESTINATION ${QUANTKIT_PACKAGE_DIR})
