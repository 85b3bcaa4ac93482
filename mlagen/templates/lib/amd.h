// AMD CDNA: what the kernel needs of the hardware, without any header.

#if defined(__HIP_DEVICE_COMPILE__) && !defined(__${target.arch}__)
#error "this kernel is for ${target.arch}: its fp8 flavour and its matrix instructions are that architecture's own"
#endif

#pragma clang fp contract(off)

#if !defined(__global__)
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#endif

#define MLAGEN_DEVICE [[maybe_unused]] static __device__ inline __attribute__((always_inline))
#define MLAGEN_SHARED __shared__
#define MLAGEN_KERNEL(threads) __global__ __attribute__((amdgpu_flat_work_group_size(threads, threads)))

using uint8_t = __UINT8_TYPE__;
using uint16_t = __UINT16_TYPE__;
using int32_t = __INT32_TYPE__;
using uint32_t = __UINT32_TYPE__;
using int64_t = __INT64_TYPE__;
using uint64_t = __UINT64_TYPE__;

using uint32x2 = uint32_t __attribute__((ext_vector_type(2)));
using uint32x4 = uint32_t __attribute__((ext_vector_type(4)));
using int16x4 = short __attribute__((ext_vector_type(4)));
using float16x2 = _Float16 __attribute__((ext_vector_type(2)));
using float16x4 = _Float16 __attribute__((ext_vector_type(4)));
using float16x8 = _Float16 __attribute__((ext_vector_type(8)));
using bfloat16x2 = __bf16 __attribute__((ext_vector_type(2)));
using bfloat16x8 = __bf16 __attribute__((ext_vector_type(8)));

// 16 bytes of one lane: an operand of the matrix instructions.
using Fragment = uint32x4;
// One lane's fp32 sums.
using Accumulator = float __attribute__((ext_vector_type(4)));

MLAGEN_DEVICE uint32_t workgroup_id() { return __builtin_amdgcn_workgroup_id_x(); }
MLAGEN_DEVICE uint32_t thread_id() { return __builtin_amdgcn_workitem_id_x(); }

// A value that is the same in every lane of the wave, as a scalar.
MLAGEN_DEVICE uint32_t uniform(uint32_t value) { return __builtin_amdgcn_readfirstlane(value); }

// The value that lane `source` of the wave holds.
MLAGEN_DEVICE uint32_t shuffle(uint32_t value, uint32_t source) { return __builtin_amdgcn_ds_bpermute(source * 4, value); }

// All waves of the workgroup arrive before any goes on; what they wrote to shared memory before is seen after.
MLAGEN_DEVICE void barrier()
{
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

MLAGEN_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) { return uint64_t(static_cast<unsigned __int128>(a) * b >> 64); }

MLAGEN_DEVICE float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

//% if float_bits
MLAGEN_DEVICE uint32_t float_to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

//% endif
// Rows may start at any element: the hardware takes unaligned accesses of any width.
template <class Value>
struct __attribute__((packed)) Unaligned { Value value; };

template <class Value>
MLAGEN_DEVICE Value load_as(const void* from) { return static_cast<const Unaligned<Value>*>(from)->value; }

template <class Value>
MLAGEN_DEVICE void store_as(void* to, Value value) { static_cast<Unaligned<Value>*>(to)->value = value; }

template <int N>
MLAGEN_DEVICE void load_words(const void* from, uint32_t (&words)[N])
{
    if constexpr (N == 1) {
        words[0] = load_as<uint32_t>(from);
    } else if constexpr (N == 2) {
        const uint32x2 pair = load_as<uint32x2>(from);
        words[0] = pair[0];
        words[1] = pair[1];
    } else {
        for (int i = 0; i < N; i += 4) {
            const uint32x4 four = load_as<uint32x4>(static_cast<const uint8_t*>(from) + 4 * i);
            for (int j = 0; j < 4; ++j) words[i + j] = four[j];
        }
    }
}

template <int N>
MLAGEN_DEVICE void store_words(void* to, const uint32_t (&words)[N])
{
    if constexpr (N == 1) {
        store_as(to, words[0]);
    } else if constexpr (N == 2) {
        store_as(to, uint32x2{words[0], words[1]});
    } else {
        for (int i = 0; i < N; i += 4)
            store_as(static_cast<uint8_t*>(to) + 4 * i, uint32x4{words[i], words[i + 1], words[i + 2], words[i + 3]});
    }
}

MLAGEN_DEVICE Fragment load_fragment(const void* from) { return load_as<Fragment>(from); }
MLAGEN_DEVICE Fragment load_weights(const void* from) { return *static_cast<const Fragment*>(from); }

// x within [-limit, limit]; NaN stays NaN, which v_med3_f32 alone would turn into a number.
MLAGEN_DEVICE float saturate(float x, float limit)
{
    const float clamped = __builtin_amdgcn_fmed3f(x, -limit, limit);
    return __builtin_isnan(x) ? x : clamped;
}
