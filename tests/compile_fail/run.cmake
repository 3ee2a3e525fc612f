# cmake -DCASE=file.cpp -DCOMPILER=g++ -DFLAGS="-I..." -P run.cmake
# Runs one case of tests/compile_fail; README.md says what a case is.
cmake_minimum_required(VERSION 3.25)

file(STRINGS ${CASE} expected REGEX "^// expect: ")
list(TRANSFORM expected REPLACE "^// expect: " "")
if(NOT expected)
  message(FATAL_ERROR "the case has no '// expect: <text>' line")
endif()
file(STRINGS ${CASE} limit REGEX "^// errors: [0-9]+")
string(REGEX REPLACE "^// errors: ([0-9]+).*" "\\1" limit "${limit}")

# -x c++: a case of the harness's own test is not named .cpp, so that nothing else takes it for one.
set(compile ${COMPILER} -std=c++20 -fsyntax-only -fdiagnostics-color=never ${FLAGS} -x c++ ${CASE})

execute_process(COMMAND ${compile} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "the valid twin does not compile\n${output}")
endif()

execute_process(COMMAND ${compile} -DSTEELYARD_INVALID
  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(result EQUAL 0)
  message(FATAL_ERROR "the invalid code compiles")
endif()
foreach(text IN LISTS expected)
  string(FIND "${output}" "${text}" at)
  if(at EQUAL -1)
    message(FATAL_ERROR "the compiler did not say '${text}'\n${output}")
  endif()
endforeach()
if(NOT limit STREQUAL "")
  string(REGEX MATCHALL "[: ]error: " errors "${output}")
  list(LENGTH errors count)
  if(count GREATER limit)
    message(FATAL_ERROR "${count} errors where at most ${limit} are allowed\n${output}")
  endif()
endif()
