# quantkit_include(<target> <name> <directory>): a system include directory, reached through a link of a fixed name in
# the build folder. Compiler caches compare paths, and a virtual environment made anew has a new one.
function(quantkit_include target name directory)
  set(link "${PROJECT_BINARY_DIR}/include/${name}")
  file(MAKE_DIRECTORY "${PROJECT_BINARY_DIR}/include")
  file(CREATE_LINK "${directory}" "${link}" SYMBOLIC)
  target_include_directories(${target} SYSTEM INTERFACE "${link}")
endfunction()
