"""Products on a CPU by kernels in C: `build` compiles them, `library` calls them."""
