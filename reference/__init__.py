"""llama.cpp through llama-cpp-python, in a child process. Knows nothing of our engine and of comparisons."""
