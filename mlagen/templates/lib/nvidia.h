// NVIDIA: HIP's other platform.  What the kernel needs of the hardware, without any header.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "this kernel is for ${target.arch}: its conversions are not there before"
#endif

#define MLAGEN_DEVICE [[maybe_unused]] static __device__ __forceinline__
#define MLAGEN_SHARED __shared__
//% if codes
// 1: a multiprocessor need not hold more workgroups, for which ptxas would otherwise spill registers.
#define MLAGEN_KERNEL(threads) __global__ __launch_bounds__(threads, 1)
//% else
#define MLAGEN_KERNEL(threads) __global__ __launch_bounds__(threads)
//% endif

using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long;
using uint64_t = unsigned long;
static_assert(sizeof(int64_t) == 8);

// 16 bytes of one lane: an operand of the matrix instructions.
struct alignas(16) Fragment {
    uint32_t words[4];
    __device__ uint32_t& operator[](int i) { return words[i]; }
    __device__ uint32_t operator[](int i) const { return words[i]; }
};
// One lane's fp32 sums.
struct Accumulator {
    float sums[4];
    __device__ float& operator[](int i) { return sums[i]; }
};

constexpr uint32_t EVERY_LANE = 0xffffffffu;

MLAGEN_DEVICE uint32_t workgroup_id() { return blockIdx.x; }
MLAGEN_DEVICE uint32_t thread_id() { return threadIdx.x; }

// A value that is the same in every lane of the warp.
MLAGEN_DEVICE uint32_t uniform(uint32_t value) { return __shfl_sync(EVERY_LANE, value, 0); }

// The value that lane `source` of the warp holds.
MLAGEN_DEVICE uint32_t shuffle(uint32_t value, uint32_t source) { return __shfl_sync(EVERY_LANE, value, source); }

// All warps of the block arrive before any goes on; what they wrote to shared memory before is seen after.
MLAGEN_DEVICE void barrier() { __syncthreads(); }

//% if staging
// The lanes of one group of waves arrive before any goes on.  Barrier 0 is that of all.
MLAGEN_DEVICE void group_barrier(uint32_t group, uint32_t lanes)
{
    asm volatile("bar.sync %0, %1;" :: "r"(group + 1), "r"(lanes) : "memory");
}

// What the block wrote to shared memory is seen by all of it, and by the unit that multiplies from there.
MLAGEN_DEVICE void publish_shared()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}

// The shared memory whose size the launch gives.
extern __shared__ uint4 launched_shared[];
MLAGEN_DEVICE uint8_t* dynamic_shared() { return reinterpret_cast<uint8_t*>(launched_shared); }

//% endif
//% if dependent
// The next kernel of the stream may start, if it was launched so.
MLAGEN_DEVICE void dependents_may_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// The kernel before has ended, and what it wrote is seen.
MLAGEN_DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

//% endif
MLAGEN_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }

MLAGEN_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }

//% if float_bits
MLAGEN_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }

//% endif
// This hardware takes no unaligned access.
//% if aligned
// The caller promises that every row starts at a multiple of 16 bytes.
template <class Value>
MLAGEN_DEVICE Value load_as(const void* from) { return *static_cast<const Value*>(from); }

template <class Value>
MLAGEN_DEVICE void store_as(void* to, Value value) { *static_cast<Value*>(to) = value; }

//% else
// Rows may start at any element: they are read and written in pieces that are always aligned.
template <class Value>
MLAGEN_DEVICE Value load_as(const void* from)
{
    Value value;
    for (uint32_t i = 0; i < sizeof(Value) / 2; ++i) reinterpret_cast<uint16_t*>(&value)[i] = static_cast<const uint16_t*>(from)[i];
    return value;
}

template <class Value>
MLAGEN_DEVICE void store_as(void* to, Value value)
{
    for (uint32_t i = 0; i < sizeof(Value); ++i) static_cast<uint8_t*>(to)[i] = reinterpret_cast<const uint8_t*>(&value)[i];
}

//% endif
struct alignas(8) Pair { uint32_t words[2]; };

template <int N>
MLAGEN_DEVICE void load_words(const void* from, uint32_t (&words)[N])
{
    if constexpr (N == 1) {
        words[0] = load_as<uint32_t>(from);
    } else if constexpr (N == 2) {
        const Pair pair = load_as<Pair>(from);
        words[0] = pair.words[0];
        words[1] = pair.words[1];
    } else {
        for (int i = 0; i < N; i += 4) {
            const Fragment four = load_as<Fragment>(static_cast<const uint8_t*>(from) + 4 * i);
            for (int j = 0; j < 4; ++j) words[i + j] = four.words[j];
        }
    }
}

template <int N>
MLAGEN_DEVICE void store_words(void* to, const uint32_t (&words)[N])
{
    if constexpr (N == 1) {
        store_as(to, words[0]);
    } else if constexpr (N == 2) {
        store_as(to, Pair{words[0], words[1]});
    } else {
        for (int i = 0; i < N; i += 4)
            store_as(static_cast<uint8_t*>(to) + 4 * i, Fragment{words[i], words[i + 1], words[i + 2], words[i + 3]});
    }
}

//% if aligned
// volatile: it is asked for where the kernel says so, not where it is first needed.
MLAGEN_DEVICE Fragment load_fragment(const void* from)
{
    Fragment four;
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(four.words[0]), "=r"(four.words[1]), "=r"(four.words[2]), "=r"(four.words[3])
        : "l"(from));
    return four;
}

//% else
MLAGEN_DEVICE Fragment load_fragment(const void* from) { return load_as<Fragment>(from); }

//% endif

// Packed weights are always aligned, nobody writes them while the kernel runs, and no other wave of the multiprocessor wants them.
// volatile: they are asked for where the kernel says so, before anything else.
MLAGEN_DEVICE Fragment load_weights(const void* from)
{
    Fragment four;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(four.words[0]), "=r"(four.words[1]), "=r"(four.words[2]), "=r"(four.words[3])
        : "l"(from));
    return four;
}

//% if staging
// Predicated: behind a branch, the loads of the words that follow would wait for it.
MLAGEN_DEVICE void store_shared(void* to, uint32_t word, bool wanted)
{
    asm volatile("{ .reg .pred wanted; setp.ne.u32 wanted, %2, 0; @wanted st.shared.b32 [%0], %1; }"
        :: "r"(uint32_t(__cvta_generic_to_shared(to))), "r"(word), "r"(uint32_t(wanted))
        : "memory");
}

MLAGEN_DEVICE Fragment load_shared(const void* from) { return *static_cast<const Fragment*>(from); }

//% endif

// x within [-limit, limit]; NaN stays NaN.
MLAGEN_DEVICE float saturate(float x, float limit)
{
    if (limit == ${fp8_largest}) return x;  // the conversion itself saturates at the format's limit
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(limit));
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(y), "f"(-limit));
    return y;
}
