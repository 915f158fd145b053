# Flags of all our C++. Results must be the same bit for bit on every instruction set, so a multiplication and an
# addition are never contracted into one rounding, and nothing that reorders or drops operations is on (-ffast-math).
add_library(quantkit_flags INTERFACE)
target_include_directories(quantkit_flags INTERFACE "${PROJECT_SOURCE_DIR}/csrc")
target_compile_options(
  quantkit_flags
  INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-O3;-ffp-contract=off;-fno-math-errno;-fno-trapping-math;-Wall;-Wextra>
    $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${QUANTKIT_WERROR}>>:-Werror>
    # Error messages name source files as csrc/...; no path of the building machine ends up in a library.
    $<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=>)
