// Conversions.  A packed conversion takes the upper element first.

MLAGEN_DEVICE void widen(bf16, uint32_t word, float& first, float& second)
{
    first = bits_to_float(word << 16);
    second = bits_to_float(word & 0xffff0000u);
}

MLAGEN_DEVICE void widen(fp16, uint32_t word, float& first, float& second)
{
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(first), "=f"(second)
        : "r"(word));
}

MLAGEN_DEVICE uint32_t narrow(bf16, float first, float second)
{
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(first), "f"(second));
    return word;
}

MLAGEN_DEVICE uint32_t narrow(fp16, float first, float second)
{
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(first), "f"(second));
    return word;
}

MLAGEN_DEVICE uint32_t narrow(target_fp8, float first, float second, float third, float fourth)
{
    uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(low) : "f"(first), "f"(second));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(high) : "f"(third), "f"(fourth));
    return low | uint32_t(high) << 16;
}
