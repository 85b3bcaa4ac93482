// Conversions.  fp8 is the arch's own flavour; it does not saturate, so its argument must be within the format's range.

MLAGEN_DEVICE void widen(bf16, uint32_t word, float& first, float& second)
{
    first = bits_to_float(word << 16);
    second = bits_to_float(word & 0xffff0000u);
}

MLAGEN_DEVICE void widen(fp16, uint32_t word, float& first, float& second)
{
    const float16x2 pair = __builtin_bit_cast(float16x2, word);
    first = float(pair[0]);
    second = float(pair[1]);
}

MLAGEN_DEVICE uint32_t narrow(bf16, float first, float second)
{
    return __builtin_bit_cast(uint32_t, bfloat16x2{__bf16(first), __bf16(second)});
}

MLAGEN_DEVICE uint32_t narrow(fp16, float first, float second)
{
    return __builtin_bit_cast(uint32_t, float16x2{_Float16(first), _Float16(second)});
}

MLAGEN_DEVICE uint32_t narrow(target_fp8, float first, float second, float third, float fourth)
{
    const uint32_t low = __builtin_amdgcn_cvt_pk_fp8_f32(first, second, 0, false);
    return __builtin_amdgcn_cvt_pk_fp8_f32(third, fourth, low, true);
}
