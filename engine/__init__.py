"""The CuPy / NumPy transformer: a GGUF model as a list of steps. It knows nothing of llama.cpp or of comparisons."""
