# _C_cpu. The instruction set of a file is in its name: x_avx512.cpp, x_avx2.cpp; every other file is compiled for the
# baseline of the architecture. Which of them is called is decided at run time, by csrc/cpu/dispatch.cpp alone.
file(GLOB _kernels CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/cpu/*.cpp")
file(GLOB _ops CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/ops/*_cpu.cpp")

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(QUANTKIT_X86 1)
else()
  set(QUANTKIT_X86 0)
  list(FILTER _kernels EXCLUDE REGEX "_avx(2|512)\\.cpp$")
endif()
set(_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16 -mfma -mf16c
            -mprefer-vector-width=512)
foreach(_file IN LISTS _kernels)
  if(_file MATCHES "_avx512\\.cpp$")
    set_source_files_properties("${_file}" PROPERTIES COMPILE_OPTIONS "${_avx512}")
  elseif(_file MATCHES "_avx2\\.cpp$")
    set_source_files_properties("${_file}" PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  elseif(_file MATCHES "_portable\\.cpp$")
    # Wide vector types never cross a file's border, so how they are passed does not matter.
    set_source_files_properties("${_file}" PROPERTIES COMPILE_OPTIONS "-Wno-psabi")
  endif()
endforeach()

# The kernels are an object library of their own: torch's headers are not in their reach.
add_library(quantkit_cpu_kernels OBJECT ${_kernels})
target_link_libraries(quantkit_cpu_kernels PRIVATE quantkit_flags)
# Whether the AVX files are part of this build: what csrc/cpu may dispatch to.
target_compile_definitions(quantkit_cpu_kernels PRIVATE QUANTKIT_X86=${QUANTKIT_X86})

# The same objects for who takes some of them.
add_library(quantkit_cpu_archive STATIC $<TARGET_OBJECTS:quantkit_cpu_kernels>)

add_library(_C_cpu MODULE ${_ops})
target_link_libraries(_C_cpu PRIVATE quantkit_flags quantkit_cpu_kernels torch_stable)
set_target_properties(_C_cpu PROPERTIES PREFIX "")
install(TARGETS _C_cpu LIBRARY DESTINATION ${QUANTKIT_PACKAGE_DIR})
