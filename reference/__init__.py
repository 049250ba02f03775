"""llama.cpp through llama-cpp-python, in a child process. It knows nothing of our engine or of comparisons.

`client.Reference` is the entry point. Nothing is imported here, so that `child` can start llama.cpp before anything else is loaded.
"""
