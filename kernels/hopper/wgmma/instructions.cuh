// The instruction of Hopper's tensor cores that multiplies 64 rows, which four warps issue
// together.
#pragma once

// Names of ten registers in the text of an instruction, and eight operands behind it.
#define TEN(t)                                                                     \
    "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t \
    "8,"                                                                           \
    "%" #t "9,"
#define EIGHT(mode, d, i)                                                                       \
    mode(d[i]), mode(d[i + 1]), mode(d[i + 2]), mode(d[i + 3]), mode(d[i + 4]), mode(d[i + 5]), \
        mode(d[i + 6]), mode(d[i + 7])
#define FORTY_EIGHT(mode, d, i)                                                               \
    EIGHT(mode, d, i), EIGHT(mode, d, i + 8), EIGHT(mode, d, i + 16), EIGHT(mode, d, i + 24), \
        EIGHT(mode, d, i + 32), EIGHT(mode, d, i + 40)

// sums (64 x FACTORS) = left (64 x 32 bytes) right^T, added to the sums if `add`. A thread has of
// each 8 columns 2 of one row and 2 of the row 8 below.
#if INT8
DEVICE void multiply(int (&sums)[96], TileAddress left, TileAddress right, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k32.s32.s8.s8 {" TEN() TEN(1) TEN(2) TEN(3) TEN(4)
            TEN(5) TEN(6) TEN(7) TEN(8) "%90,%91,%92,%93,%94,%95}, %96, %97, p;\n}"
        : FORTY_EIGHT("+r", sums, 0), FORTY_EIGHT("+r", sums, 48)
        : "l"(left), "l"(right), "r"(static_cast<int>(add)));
}
#else
#if HALF_IS_BF16
#define TYPES "f32.bf16.bf16"
#else
#define TYPES "f32.f16.f16"
#endif
DEVICE void multiply(float (&sums)[128], TileAddress left, TileAddress right, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16." TYPES " {" TEN() TEN(1) TEN(2) TEN(3) TEN(4)
            TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10)
                TEN(11) "%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, p, 1, 1, 0, 0;\n}"
        : FORTY_EIGHT("+f", sums, 0), FORTY_EIGHT("+f", sums, 48), EIGHT("+f", sums, 96),
          EIGHT("+f", sums, 104), EIGHT("+f", sums, 112), EIGHT("+f", sums, 120)
        : "l"(left), "l"(right), "r"(static_cast<int>(add)));
}
#endif
