"""A small LLaMA runtime that maps a GGUF file and computes from the mapping."""
