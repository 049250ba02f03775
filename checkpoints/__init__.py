"""The ground: everything that is written to disk. Knows of no engine, no llama.cpp and no command."""
