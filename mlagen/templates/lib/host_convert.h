// Conversions in integer arithmetic, so that they mean the same on every CPU.

MLAGEN_DEVICE void widen(bf16, uint32_t word, float& first, float& second)
{
    first = bits_to_float(word << 16);
    second = bits_to_float(word & 0xffff0000u);
}

MLAGEN_DEVICE uint32_t bf16_bits(float x)
{
    const uint32_t bits = float_to_bits(x);
    if (x != x) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

MLAGEN_DEVICE uint32_t narrow(bf16, float first, float second) { return bf16_bits(first) | bf16_bits(second) << 16; }

MLAGEN_DEVICE float fp16_value(uint32_t half)
{
    const uint32_t sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x0400) return bits_to_float(sign | float_to_bits(float(magnitude) * 0x1p-24f));
    return bits_to_float(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

MLAGEN_DEVICE uint32_t fp16_bits(float x)
{
    const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000u) return sign | 0x7e00 | (magnitude >> 13 & 0x3ff);
    if (magnitude < (127u - 14u) << 23) return sign | uint32_t(std::nearbyint(bits_to_float(magnitude) * 0x1p24f));
    const uint32_t rounded = (magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13;
    return sign | std::min(rounded - ((127u - 15u) << 10), 0x7c00u);
}

MLAGEN_DEVICE void widen(fp16, uint32_t word, float& first, float& second)
{
    first = fp16_value(word & 0xffff);
    second = fp16_value(word >> 16);
}

MLAGEN_DEVICE uint32_t narrow(fp16, float first, float second) { return fp16_bits(first) | fp16_bits(second) << 16; }

// e4m3 with exponent bias BIAS and largest code LARGEST; beyond it NaN, as the hardware's conversion gives.
template <uint32_t BIAS, uint32_t LARGEST, bool FNUZ>
MLAGEN_DEVICE uint32_t e4m3_code(float x)
{
    constexpr uint32_t NOT_A_NUMBER = FNUZ ? 0x80 : 0x7f;
    const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffff, sign = bits >> 24 & 0x80;
    uint32_t code;
    if (magnitude < (128 - BIAS) << 23) {
        constexpr float STEPS = BIAS == 8 ? 0x1p10f : 0x1p9f;
        code = uint32_t(std::nearbyint(bits_to_float(magnitude) * STEPS));
    } else {
        code = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - ((127 - BIAS) << 3);
    }
    if (magnitude > 0x7f800000u || code > LARGEST) return FNUZ ? NOT_A_NUMBER : NOT_A_NUMBER | sign;
    return FNUZ && code == 0 ? 0 : code | sign;
}

MLAGEN_DEVICE uint32_t fp8_code(fp8_e4m3fn, float x) { return e4m3_code<7, 0x7e, false>(x); }
MLAGEN_DEVICE uint32_t fp8_code(fp8_e4m3fnuz, float x) { return e4m3_code<8, 0x7f, true>(x); }

MLAGEN_DEVICE uint32_t narrow(target_fp8 type, float first, float second, float third, float fourth)
{
    return fp8_code(type, first) | fp8_code(type, second) << 8 | fp8_code(type, third) << 16 | fp8_code(type, fourth) << 24;
}
