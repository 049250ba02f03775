# For CMAKE_ARGS="-C …/llama-only.cmake" while pip compiles llama-cpp-python: only what parity uses of it, llama.cpp and ggml.
# Its multimodal library and the library of its command-line tools are two thirds of the work. What is built is built as ever:
# the same sources, flags and kernels.
set(LLAVA_BUILD OFF CACHE BOOL "the multimodal library")
# llama-cpp-python forces LLAMA_BUILD_COMMON on in the cache; a variable of llama.cpp's own folder stands before it. This file
# is therefore read a second time, right after project("llama.cpp").
set(CMAKE_PROJECT_llama.cpp_INCLUDE "${CMAKE_CURRENT_LIST_FILE}" CACHE FILEPATH "read again in llama.cpp's folder")
if(PROJECT_NAME STREQUAL "llama.cpp")
  set(LLAMA_BUILD_COMMON OFF)
endif()
