"""The fast mode of qwen2 and llama on a CUDA device."""
