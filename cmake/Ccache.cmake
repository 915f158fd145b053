# Compile through ccache when it is there. The base directory and NOHASHDIR are part of the launcher, so that a second
# clone of the project hits the first one's results however it is built: by make, by pip or by plain CMake.
if(DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
  return() # the caller has decided
endif()
find_program(QUANTKIT_CCACHE ccache)
if(QUANTKIT_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER
      ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${PROJECT_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${QUANTKIT_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
  message(STATUS "quantkit: compiling through ${QUANTKIT_CCACHE}")
endif()
