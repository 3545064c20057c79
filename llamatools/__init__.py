"""llamatools: LLaMA model files, converted, explained, run and proven."""
