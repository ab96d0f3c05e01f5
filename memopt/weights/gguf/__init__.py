"""GGUF files, llama.cpp's format, read here: header, blocks of integers, names, tokenizer."""
