"""llama.cpp through llama-cpp-python, in a child process. Knows nothing of our engine and of comparisons.

`client.Reference` is the way in. Nothing is imported here: `child` can start llama.cpp before anything else is loaded.
"""
