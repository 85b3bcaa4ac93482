// Runs a grid: workgroups are spread over threads, and each thread runs its workgroup's waves in turn.

namespace host {

template <void (*KERNEL)(void** arguments), int WAVE, int THREADS>
class Machine {
public:
    explicit Machine(void** arguments) : arguments_(arguments), lanes_(THREADS), stacks_(new char[THREADS * STACK_BYTES])
    {
        for (int i = 0; i < THREADS; ++i) {
            getcontext(&lanes_[i].start);
            lanes_[i].start.uc_stack.ss_sp = stacks_.get() + i * STACK_BYTES;
            lanes_[i].start.uc_stack.ss_size = STACK_BYTES;
            lanes_[i].start.uc_link = nullptr;
            const uintptr_t self = reinterpret_cast<uintptr_t>(this);
            const unsigned high = unsigned(self >> 32), low = unsigned(self);
            makecontext(&lanes_[i].start, reinterpret_cast<void (*)()>(&fiber), 2, high, low);
        }
    }

    // Null when the workgroup ran to its end, else what went wrong.
    const char* run(uint32_t workgroup)
    {
        for (int i = 0; i < THREADS; ++i) {
            lanes_[i].state = State::READY;
            lanes_[i].thread = uint32_t(i);
            lanes_[i].workgroup = workgroup;
        }
        for (;;) {
            int done = 0;
            for (int first = 0; first < THREADS; first += WAVE) {
                if (const char* error = run_wave(&lanes_[first])) return error;
                for (int i = first; i < first + WAVE; ++i) done += lanes_[i].state == State::DONE;
            }
            if (done == THREADS) return nullptr;
            if (release_groups()) continue;
            for (const Lane& lane : lanes_)
                if (lane.state == State::WAITING_FOR_GROUP) return "a barrier that not all lanes of the group of waves reach";
            // Every lane that is left waits at the barrier, and so all of them go on.
            for (Lane& lane : lanes_)
                if (lane.state == State::WAITING_AT_BARRIER) lane.state = State::READY;
        }
    }

private:
    // Lets the groups of waves go on whose lanes have all arrived at their barrier; true if there was one.
    bool release_groups()
    {
        bool released = false;
        for (size_t first = 0; first < lanes_.size(); ++first) {
            const size_t lanes = lanes_[first].group_lanes;
            if (lanes_[first].state != State::WAITING_FOR_GROUP || first % lanes) continue;
            const auto begin = lanes_.begin() + first, end = begin + lanes;
            const auto waits = [&](const Lane& each) {
                return each.state == State::WAITING_FOR_GROUP && each.group_lanes == lanes;
            };
            if (!std::all_of(begin, end, waits)) continue;
            for (size_t i = first; i < first + lanes; ++i) lanes_[i].state = State::READY;
            released = true;
        }
        return released;
    }

    // Runs one wave until every lane is at a barrier or done.
    static const char* run_wave(Lane* lanes)
    {
        for (;;) {
            int waiting = 0;
            for (int i = 0; i < WAVE; ++i) {
                if (lanes[i].state == State::READY) resume(lanes[i]);
                waiting += lanes[i].state == State::WAITING_FOR_WAVE;
            }
            if (waiting == 0) return nullptr;
            if (waiting != WAVE) return "a wave operation that not all lanes of the wave reach";
            for (int i = 1; i < WAVE; ++i)
                if (lanes[i].operation != lanes[0].operation) return "lanes of one wave at different wave operations";
            lanes[0].operation(lanes, WAVE);
            for (int i = 0; i < WAVE; ++i) lanes[i].state = State::READY;
        }
    }

    static void fiber(unsigned high, unsigned low)
    {
        const Machine* machine = reinterpret_cast<Machine*>(uintptr_t(high) << 32 | low);
        for (;;) {
            KERNEL(machine->arguments_);
            wait(State::DONE);
        }
    }

    void** arguments_;
    std::vector<Lane> lanes_;
    std::unique_ptr<char[]> stacks_;
};

// 0, or 1 with a message in `error`.
template <void (*KERNEL)(void** arguments), int WAVE, int THREADS>
static int launch(uint32_t grid, void** arguments, uint32_t cpu_threads, char* error, size_t error_size)
{
    std::atomic<uint32_t> next{0};
    std::atomic<const char*> failure{nullptr};
    auto work = [&] {
        Machine<KERNEL, WAVE, THREADS> machine(arguments);
        for (uint32_t workgroup; !failure && (workgroup = next++) < grid;)
            if (const char* message = machine.run(workgroup)) failure = message;
    };
    std::vector<std::thread> helpers;
    for (uint32_t i = 1; i < std::min(cpu_threads, grid); ++i) helpers.emplace_back(work);
    work();
    for (std::thread& helper : helpers) helper.join();
    if (failure) std::snprintf(error, error_size, "%s", failure.load());
    return failure ? 1 : 0;
}

}  // namespace host
