// One tile times four rows of a panel, group by group, in assembly: the 16 totals of a tile, the 8
// sums of half of it and their 8 operands are all registers, which compilers do not find.
// Included by vec_dotprod.h and vec_i8mm.h, which say how products are added up.
#pragma once

// What panel_halves (vec_dotprod.h, vec_i8mm.h) reads and writes. Rows come in units: single ones,
// or pairs (kernels/panel_dot.h); of pairs, the first two entries count.
struct PanelBlockArgs {
  float* totals;                 // 4 vectors of 16
  const uint8_t* const* groups;  // each 512 bytes of codes
  const float* scales;           // of the weights, per group: 16, or of pairs 32
  const float* mins;             // likewise
  int64_t count;                 // of groups
  const int8_t* codes[4];
  const float* unit_scales[4];
  const float* unit_sums[4];
};

// Registers: x0 totals, x1 groups, x2 scales, x3 mins, x4 count, x5-x8 codes, x9-x12 scales of
// units, x13-x16 their sums, x17 the group; v0-v7 sums, v8-v11 inputs, v12-v15 weights, v16-v31
// totals: 4 of each vector.
#define MLF_PANEL_BEGIN \
  "ldp x0, x1, [%[args]]\n"                                                                \
  "ldp x2, x3, [%[args], #16]\n"                                                           \
  "ldp x4, x5, [%[args], #32]\n"                                                           \
  "ldp x6, x7, [%[args], #48]\n"                                                           \
  "ldp x8, x9, [%[args], #64]\n"                                                           \
  "ldp x10, x11, [%[args], #80]\n"                                                         \
  "ldp x12, x13, [%[args], #96]\n"                                                         \
  "ldp x14, x15, [%[args], #112]\n"                                                        \
  "ldr x16, [%[args], #128]\n" MLF_PANEL_TOTALS("ldp") "1:\n"                              \
  "ldr x17, [x1], #8\n"
#define MLF_PANEL_END \
  "subs x4, x4, #1\n" \
  "b.ne 1b\n" MLF_PANEL_TOTALS("stp")
#define MLF_PANEL_TOTALS(move)                                                                     \
  move " q16, q17, [x0]\n" move " q18, q19, [x0, #32]\n" move " q20, q21, [x0, #64]\n" move        \
       " q22, q23, [x0, #96]\n" move " q24, q25, [x0, #128]\n" move " q26, q27, [x0, #160]\n" move \
       " q28, q29, [x0, #192]\n" move " q30, q31, [x0, #224]\n"

// Sums start as kFloatBias, by loads: their pipes are free where those of products are busy.
#define MLF_PANEL_BIAS      \
  "ldp q0, q1, [%[bias]]\n" \
  "ldp q2, q3, [%[bias]]\n" \
  "ldp q4, q5, [%[bias]]\n" \
  "ldp q6, q7, [%[bias]]\n"
// As floats.
#define MLF_PANEL_UNBIAS        \
  "ldr q12, [%[bias]]\n"        \
  "fsub v0.4s, v0.4s, v12.4s\n" \
  "fsub v1.4s, v1.4s, v12.4s\n" \
  "fsub v2.4s, v2.4s, v12.4s\n" \
  "fsub v3.4s, v3.4s, v12.4s\n" \
  "fsub v4.4s, v4.4s, v12.4s\n" \
  "fsub v5.4s, v5.4s, v12.4s\n" \
  "fsub v6.4s, v6.4s, v12.4s\n" \
  "fsub v7.4s, v7.4s, v12.4s\n"
#define MLF_FMLA(total, x, y) "fmla v" #total ".4s, v" #x ".4s, v" #y "\n"
#define MLF_FMUL(x, y) "fmul v" #x ".4s, v" #x ".4s, v" #y "\n"

#define MLF_PANEL_ASM(text)                                                                      \
  asm volatile(MLF_PANEL_BEGIN text MLF_PANEL_END                                                \
               :                                                                                 \
               : [args] "r"(&args), [bias] "r"(kFloatBiases)                                     \
               : "memory", "cc", "x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9",     \
                 "x10", "x11", "x12", "x13", "x14", "x15", "x16", "x17", "v0", "v1", "v2", "v3", \
                 "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15",   \
                 "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26",    \
                 "v27", "v28", "v29", "v30", "v31")
