// The CPU: every lane of a workgroup is a fiber of its own, so that the kernel below runs unchanged.  A fiber runs until it needs
// its wave (a matrix instruction, a cross-lane move) or its workgroup (a barrier) and waits there until all the lanes that the
// hardware would need have arrived.  Lanes that would not meet on the hardware are an error here, not a guess.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define MLAGEN_DEVICE [[maybe_unused]] static inline
#define MLAGEN_SHARED static thread_local
#define MLAGEN_KERNEL(threads)

struct Fragment {
    uint32_t words[4];
    uint32_t& operator[](int i) { return words[i]; }
    uint32_t operator[](int i) const { return words[i]; }
};
struct Accumulator {
    float sums[4];
    float& operator[](int i) { return sums[i]; }
    float operator[](int i) const { return sums[i]; }
};

namespace host {

constexpr size_t STACK_BYTES = 64 * 1024;

struct Lane;

// An operation of a whole wave: reads every lane's `operand`, writes every lane's `result`.
using WaveOperation = void (*)(Lane* lanes, int count);

enum class State { READY, WAITING_FOR_WAVE, WAITING_FOR_GROUP, WAITING_AT_BARRIER, DONE };

struct Lane {
    State state = State::DONE;
    uint32_t thread = 0;
    uint32_t workgroup = 0;
    WaveOperation operation = nullptr;
    const void* operand = nullptr;
    void* result = nullptr;
    uint32_t group_lanes = 0;
    bool started = false;
    ucontext_t start;
    jmp_buf resume_at;
};

static thread_local Lane* running = nullptr;
static thread_local jmp_buf scheduler;

__attribute__((noinline)) static Lane& current() { return *running; }

// Leaves the fiber until the scheduler resumes it.
__attribute__((noinline)) static void wait(State state)
{
    Lane& lane = current();
    lane.state = state;
    if (_setjmp(lane.resume_at) == 0) _longjmp(scheduler, 1);
}

// Runs one lane until it waits or ends.
__attribute__((noinline)) static void resume(Lane& lane)
{
    running = &lane;
    lane.state = State::READY;
    if (_setjmp(scheduler) != 0) return;
    if (lane.started) _longjmp(lane.resume_at, 1);
    lane.started = true;
    setcontext(&lane.start);
}

template <class Operand, class Result>
static Result with_wave(WaveOperation operation, const Operand& operand)
{
    Lane& lane = current();
    Result result;
    lane.operation = operation;
    lane.operand = &operand;
    lane.result = &result;
    wait(State::WAITING_FOR_WAVE);
    return result;
}

template <class Operand>
static const Operand& operand_of(const Lane& lane) { return *static_cast<const Operand*>(lane.operand); }

struct Shuffle { uint32_t value, source; };

static void shuffle_wave(Lane* lanes, int count)
{
    for (int i = 0; i < count; ++i)
        *static_cast<uint32_t*>(lanes[i].result) = operand_of<Shuffle>(lanes[operand_of<Shuffle>(lanes[i]).source % count]).value;
}

static void first_of_wave(Lane* lanes, int count)
{
    for (int i = 0; i < count; ++i) *static_cast<uint32_t*>(lanes[i].result) = operand_of<uint32_t>(lanes[0]);
}

}  // namespace host

MLAGEN_DEVICE uint32_t workgroup_id() { return host::current().workgroup; }
MLAGEN_DEVICE uint32_t thread_id() { return host::current().thread; }
MLAGEN_DEVICE void barrier() { host::wait(host::State::WAITING_AT_BARRIER); }

//% if staging
// The lanes of one group of waves arrive before any goes on.
MLAGEN_DEVICE void group_barrier(uint32_t, uint32_t lanes)
{
    host::current().group_lanes = lanes;
    host::wait(host::State::WAITING_FOR_GROUP);
}

MLAGEN_DEVICE void publish_shared() { barrier(); }

MLAGEN_DEVICE uint8_t* dynamic_shared()
{
    MLAGEN_SHARED uint8_t shared[${target.lds_bytes}];
    return shared;
}

//% endif
//% if dependent
// Here kernels run one after another.
MLAGEN_DEVICE void dependents_may_start() {}
MLAGEN_DEVICE void wait_for_previous() {}

//% endif
MLAGEN_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) { return uint64_t(static_cast<unsigned __int128>(a) * b >> 64); }

MLAGEN_DEVICE uint32_t uniform(uint32_t value) { return host::with_wave<uint32_t, uint32_t>(host::first_of_wave, value); }

MLAGEN_DEVICE uint32_t shuffle(uint32_t value, uint32_t source)
{
    return host::with_wave<host::Shuffle, uint32_t>(host::shuffle_wave, {value, source});
}

MLAGEN_DEVICE float bits_to_float(uint32_t bits)
{
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

MLAGEN_DEVICE uint32_t float_to_bits(float value)
{
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

template <class Value>
MLAGEN_DEVICE void store_as(void* to, Value value) { std::memcpy(to, &value, sizeof value); }

template <int N>
MLAGEN_DEVICE void load_words(const void* from, uint32_t (&words)[N]) { std::memcpy(words, from, sizeof words); }

template <int N>
MLAGEN_DEVICE void store_words(void* to, const uint32_t (&words)[N]) { std::memcpy(to, words, sizeof words); }

MLAGEN_DEVICE Fragment load_fragment(const void* from)
{
    Fragment fragment;
    std::memcpy(&fragment, from, sizeof fragment);
    return fragment;
}

MLAGEN_DEVICE Fragment load_weights(const void* from) { return load_fragment(from); }

//% if staging
MLAGEN_DEVICE void store_shared(void* to, uint32_t word, bool wanted)
{
    if (wanted) std::memcpy(to, &word, sizeof word);
}

MLAGEN_DEVICE Fragment load_shared(const void* from) { return load_fragment(from); }

//% endif

// x within [-limit, limit]; NaN stays NaN.
MLAGEN_DEVICE float saturate(float x, float limit) { return x < -limit ? -limit : x > limit ? limit : x; }
