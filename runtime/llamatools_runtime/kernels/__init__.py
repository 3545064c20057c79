"""Products of quantized matrices as they lie in the file, and the threads that compute them. See docs/kernels.md."""
