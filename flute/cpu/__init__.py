"""What runs on a CPU by kernels in C (`flute/kernels/cpu`).

    targets, build   the library: what it is made of; prebuilt, or compiled at first use
    library          which variant runs, or why none
    products, pages  weights in CPU order: put into it, dequantised, multiplied; their memory
    structures       what is handed to the library, field by field
    ready, held      products, and whole modules, whose addresses are looked up once
    block, stack     a decoder block's token, or that of all blocks, in C
    dense            dense layers of few tokens
    quantize         nearest entries and scales

Nothing here imports a module of layers or models; those ask for it.
"""
