"""The CuPy / NumPy transformer: a GGUF model as a list of steps. Knows nothing of llama.cpp and of comparisons."""
