// Rows of elements in memory, as fp32 values in registers.

// Reads N consecutive elements, in the widest accesses that hold them.
template <int N, class Element>
MLAGEN_DEVICE void load(const Element* from, float (&x)[N])
{
    if constexpr (sizeof(Element) == 4) {
        uint32_t words[N];
        load_words<N>(from, words);
        for (int i = 0; i < N; ++i) x[i] = bits_to_float(words[i]);
    } else if constexpr (N == 1) {
        float unused;
        widen(Element{}, uint32_t(from->bits), x[0], unused);
    } else {
        uint32_t words[N / 2];
        load_words<N / 2>(from, words);
        for (int i = 0; i < N / 2; ++i) widen(Element{}, words[i], x[2 * i], x[2 * i + 1]);
    }
}

// Writes N consecutive elements, each rounded to nearest even, in the widest accesses that hold them.
template <int N, class Element>
MLAGEN_DEVICE void store(Element* to, const float (&x)[N])
{
    constexpr int PER_WORD = 4 / sizeof(Element);
    if constexpr (N >= PER_WORD) {
        uint32_t words[N / PER_WORD];
        for (int i = 0; i < N / PER_WORD; ++i) {
            if constexpr (PER_WORD == 2) words[i] = narrow(Element{}, x[2 * i], x[2 * i + 1]);
            else words[i] = narrow(Element{}, x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
        }
        store_words<N / PER_WORD>(to, words);
    } else {
        for (int i = 0; i < N; ++i) {
            if constexpr (PER_WORD == 2) store_as(to + i, uint16_t(narrow(Element{}, x[i], 0.0f)));
            else to[i].bits = uint8_t(narrow(Element{}, x[i], 0.0f, 0.0f, 0.0f));
        }
    }
}

// Copies N consecutive elements bit for bit.
template <int N, class Element>
MLAGEN_DEVICE void copy(Element* to, const Element* from)
{
    if constexpr (N * sizeof(Element) >= 4) {
        uint32_t words[N * sizeof(Element) / 4];
        load_words<N * sizeof(Element) / 4>(from, words);
        store_words<N * sizeof(Element) / 4>(to, words);
    } else {
        for (int i = 0; i < N; ++i) to[i] = from[i];
    }
}

// Rounds each value to a 16-bit type, and keeps it as fp32.
template <class Element, int N>
MLAGEN_DEVICE void round_to(float (&x)[N])
{
    for (int i = 0; i < N; i += 2) {
        float unused = 0.0f;
        float& second = i + 1 < N ? x[i + 1] : unused;
        widen(Element{}, narrow(Element{}, x[i], second), x[i], second);
    }
}

// Element `i` of an index tensor, whose type is known at run time.
MLAGEN_DEVICE int64_t load_index(const void* indices, int32_t i, int32_t is_int64)
{
    // No branch: the load must not wait for others behind one.
    const int32_t* words = static_cast<const int32_t*>(indices) + (int64_t(i) << is_int64);
    const int32_t low = words[0], high = words[is_int64];  // the same word twice where there is only one
    return is_int64 ? int64_t(uint64_t(uint32_t(high)) << 32 | uint32_t(low)) : low;
}
